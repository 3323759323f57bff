"""The asynchronous core: two queues between a searcher and whoever trains. No processes, files or clocks.

Proposals wait in `unfinished` (the paper's q_unfinished) until their result is told, then in `finished` (q_finished)
until there are enough for an update, which takes the oldest `batch_size` of them, in the order in which they were told.
So no update waits for a slow trial; the price is that samples come from an older state of the searcher, whose age
is recorded.
"""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass
from typing import Any

from .searcher import Sample
from .searcher import Searcher
from .space import Choices

DIRECTIONS = ("max", "min")
LARGEST = 1e100  # of metrics, whatever their sign: of larger ones the squares, or their sum, may not be finite
ALLOWED = f"in [{-LARGEST:g}, {LARGEST:g}]"


@dataclass(frozen=True)
class Trial:
    """One proposal. `update`: how many updates the searcher had made when it proposed it."""

    number: int
    choices: Choices
    log_prob: float | None
    update: int


@dataclass(frozen=True)
class Update:
    """One update of the searcher: its number, from 0, the trials it took, their ages, and the searcher's figures."""

    number: int
    trials: tuple[int, ...]
    ages: tuple[int, ...]
    figures: dict[str, Any]


class Search:
    """Ask and tell.

    Args:
        searcher: a fresh one, or one whose state goes with the state given to `load_state_dict`.
        direction: "max" if a larger metric is better, "min" if a smaller one is: rewards are then its negative.

    Raises:
        ValueError: an unknown direction.
    """

    def __init__(self, searcher: Searcher, direction: str = "max") -> None:
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(map(repr, DIRECTIONS))}, got {direction!r}")
        self.searcher = searcher
        self.direction = direction
        self.asked = 0
        self.updates = 0
        self.unfinished: dict[int, Trial] = {}
        self.finished: list[tuple[Trial, float]] = []

    def ask(self) -> Trial:
        """The next trial, which is unfinished from now on."""
        proposal = self.searcher.propose(self.asked)
        trial = Trial(self.asked, proposal.choices, proposal.log_prob, self.updates)
        self.unfinished[trial.number] = trial
        self.asked += 1
        return trial

    def tell(self, number: int, metric: float) -> Update | None:
        """The result of an unfinished trial; returns the update, if this result was the last one it waited for.

        Raises:
            KeyError: the trial was never asked, or has been told or failed already.
            ValueError: the metric is not in [-1e100, 1e100], or no number.
        """
        if not abs(metric) <= LARGEST:  # nor is NaN
            raise ValueError(f"metric must be {ALLOWED}, got {metric} for trial {number}")
        trial = self._take(number)
        self.finished.append((trial, metric if self.direction == "max" else -metric))
        size = self.searcher.batch_size
        if len(self.finished) < size:
            return None
        batch, self.finished = self.finished[:size], self.finished[size:]
        samples = [
            Sample(trial.number, trial.choices, trial.log_prob, reward, self.updates - trial.update)
            for trial, reward in batch
        ]
        figures = self.searcher.update(samples)
        update = Update(
            self.updates, tuple(sample.number for sample in samples), tuple(sample.age for sample in samples), figures
        )
        self.updates += 1
        return update

    def fail(self, number: int) -> None:
        """An unfinished trial will never have a result: it takes no part in any update.

        Raises:
            KeyError: as for `tell`.
        """
        self._take(number)
        self.searcher.failed(number)

    def _take(self, number: int) -> Trial:
        if number not in self.unfinished:
            state = "is told or failed already" if 0 <= number < self.asked else "was never asked"
            raise KeyError(f"number must be that of an unfinished trial, got {number}, which {state}")
        return self.unfinished.pop(number)

    def state_dict(self) -> dict[str, Any]:
        """The queues, the counters and the searcher's own state."""
        return {
            "asked": self.asked,
            "updates": self.updates,
            "unfinished": [asdict(trial) for trial in self.unfinished.values()],
            "finished": [(asdict(trial), reward) for trial, reward in self.finished],
            "searcher": self.searcher.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.asked = state["asked"]
        self.updates = state["updates"]
        self.unfinished = {trial["number"]: _trial(trial) for trial in state["unfinished"]}
        self.finished = [(_trial(trial), reward) for trial, reward in state["finished"]]
        self.searcher.load_state_dict(state["searcher"])


def _trial(fields: dict[str, Any]) -> Trial:
    return Trial(**{**fields, "choices": tuple(fields["choices"])})
