"""Early stopping of hopeless trials: asynchronous successive halving (ASHA; Li et al. 2020), its stopping form."""

from __future__ import annotations

import math
from bisect import bisect_right
from bisect import insort
from typing import Any

from ..patterns.checks import integer
from .core import DIRECTIONS


class Asha:
    """Compares a trial with those that got as far, at the steps `grace * reduction**k`, k = 0, 1, 2, ...

    At the first report at or past such a step the value is recorded there, and the trial goes on if it is among the
    best `max(1, n // reduction)` of the n values recorded there so far, its own included; equals of the last of them go
    on, too. A report past several of these steps at once is recorded at the last one only, as earlier ones hold values
    of shorter trainings. Nobody waits for others: the first trial to reach a step always goes on.

    The answers are a function of the reports and their order. A report that was answered before, because its trial
    is trained again after a failure, gets the same answer, and is not recorded a second time.

    Args:
        direction: "max" if a larger value is better, "min" if a smaller one is.
        grace: the first step at which a trial may be stopped, at least 1, in the recipe's own count of steps.
        reduction: the share that goes on is one in so many, at least 2.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(self, direction: str, grace: int, reduction: int = 4) -> None:
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(map(repr, DIRECTIONS))}, got {direction!r}")
        self.direction = direction
        self.grace = integer("grace", grace, 1, 2**53)
        self.reduction = integer("reduction", reduction, 2, 2**53)
        self._recorded: set[tuple[int, int]] = set()  # (step of comparison, number)
        self._scores: dict[int, list[float]] = {}  # by step of comparison: ascending, larger is better
        self._stopped: dict[int, int] = {}  # step at which a trial was told to stop, by number

    def report(self, number: int, step: int, value: float) -> bool:
        """Whether trial `number` may go on.

        Raises:
            ValueError: the value is not finite.
        """
        if not math.isfinite(value):
            raise ValueError(f"value must be finite, got {value} for trial {number} at step {step}")
        if number in self._stopped:
            return step < self._stopped[number]
        at = self._comparison(step)
        if at is None or (at, number) in self._recorded:
            return True
        self._recorded.add((at, number))
        score = value if self.direction == "max" else -value
        scores = self._scores.setdefault(at, [])
        insort(scores, score)
        better = len(scores) - bisect_right(scores, score)
        if better < max(1, len(scores) // self.reduction):
            return True
        self._stopped[number] = step
        return False

    @property
    def compared(self) -> bool:
        """Whether any report has come to a step of comparison."""
        return bool(self._scores)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON values by name: recorded with a search, and compared when it is resumed."""
        return {"name": "asha", "direction": self.direction, "grace": self.grace, "reduction": self.reduction}

    def _comparison(self, step: int) -> int | None:
        """The last step of comparison that is not past this step."""
        if step < self.grace:
            return None
        at = self.grace
        while at * self.reduction <= step:
            at *= self.reduction
        return at
