"""Asynchronous successive halving: by hand, against a naive twin, and whatever is reported twice."""

from __future__ import annotations

import math
import random

import pytest

from autodropout.search.asha import Asha


class Twin:
    """Goes through everything reported so far, every time."""

    def __init__(self, sign: int, grace: int, reduction: int) -> None:
        self.sign, self.grace, self.reduction = sign, grace, reduction
        self.seen: list[tuple[int, int, float]] = []

    def report(self, number: int, step: int, value: float) -> bool:
        self.seen.append((number, step, value))
        rung = max((k for k in range(20) if self.grace * self.reduction**k <= step), default=None)
        if rung is None:
            return True
        low, high = self.grace * self.reduction**rung, self.grace * self.reduction ** (rung + 1)
        first: dict[int, float] = {}
        for other, at, seen in self.seen:
            if low <= at < high:
                first.setdefault(other, self.sign * seen)
        if [at for other, at, _ in self.seen if other == number and low <= at < high] != [step]:
            return True  # not the first at this rung
        ranked = sorted(first.values(), reverse=True)
        return first[number] >= ranked[max(1, len(ranked) // self.reduction) - 1]


@pytest.mark.parametrize(("direction", "sign"), [("max", 1), ("min", -1)])
@pytest.mark.parametrize("reduction", [2, 3, 4])
@pytest.mark.parametrize("every", [1, 3])
def test_it_answers_like_a_naive_twin(direction: str, sign: int, reduction: int, every: int) -> None:
    generator = random.Random(f"{direction}/{reduction}/{every}")
    asha, twin = Asha(direction, 2, reduction), Twin(sign, 2, reduction)
    step = dict.fromkeys(range(12), 0)
    begun = len(step)
    answers = []
    while begun < 80:
        number = generator.choice(sorted(step))
        step[number] += generator.randint(1, every)
        value = generator.randrange(40) / 8  # equal values occur
        answers.append(asha.report(number, step[number], value))
        assert answers[-1] == twin.report(number, step[number], value)
        if not answers[-1] or step[number] > 40:
            del step[number]
            step[begun] = 0
            begun += 1
    assert answers.count(False) > 20
    assert answers.count(True) > 20


def test_by_hand() -> None:
    asha = Asha("max", grace=1, reduction=4)
    # n = 1: the first goes on. n = 2, 3: only the best so far. n = 4..7: still only the best one.
    assert [asha.report(number, 1, value) for number, value in enumerate([5, 4, 6, 6, 5.5, 3, 1])] == [
        True,
        False,
        True,
        True,
        False,
        False,
        False,
    ]
    # n = 8: the best two, which are 6 and 6. A third equal goes on as well, 5.9 does not.
    assert asha.report(7, 1, 5.9) is False
    assert asha.report(8, 1, 6) is True
    # The next comparison is at step 4, and begins anew.
    assert asha.report(0, 2, -100) is True
    assert asha.report(0, 3, -100) is True
    assert asha.report(0, 4, 7) is True
    assert asha.report(2, 4, 6.9) is False
    # Past 4 without a report at 4: compared there, with what it has by then.
    assert asha.report(3, 6, 7.1) is True
    # From 1 right to 16: recorded at 16 only, so that 7.2 at step 4 is still the best there.
    assert asha.report(8, 17, 99) is True
    assert asha.report(9, 5, 7.2) is True


def test_smaller_is_better() -> None:
    asha = Asha("min", grace=3, reduction=2)
    assert asha.report(0, 2, 1e9) is True  # within the grace
    assert [asha.report(number, 3, value) for number, value in enumerate([0.5, 0.6, 0.4, 0.45])] == [
        True,
        False,
        True,
        True,
    ]


def test_a_trial_that_is_trained_again_gets_the_same_answers_and_counts_once() -> None:
    asha = Asha("max", grace=2, reduction=2)
    assert asha.report(0, 2, 1.0)
    assert not asha.report(1, 2, 0.5)
    for _ in range(3):
        assert asha.report(1, 1, 0.9)
        assert not asha.report(1, 2, 0.5)
        assert not asha.report(1, 3, 0.5)
        assert asha.report(0, 2, 1.0)
    # Two values at step 2, not eight: the best one goes on; of eight it would be the best four.
    assert not asha.report(2, 2, 0.9)
    # Four values now: the best two.
    assert asha.report(3, 2, 0.95)


def test_what_must_be_refused() -> None:
    with pytest.raises(ValueError, match="direction must be one of 'max', 'min', got 'up'"):
        Asha("up", 1)
    with pytest.raises(ValueError, match=r"grace must be an integer in \[1, \d+\], got 0"):
        Asha("max", 0)
    with pytest.raises(ValueError, match=r"reduction must be an integer in \[2, \d+\], got 1"):
        Asha("max", 1, 1)
    for grace in (1.5, "1"):
        with pytest.raises(TypeError, match=rf"grace must be an integer in .* got {grace!r} of type"):
            Asha("max", grace)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"reduction must be an integer in .* got 2.5 of type float"):
        Asha("max", 1, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="value must be finite, got nan for trial 3 at step 1"):
        Asha("max", 2).report(3, 1, math.nan)
    assert Asha("min", 5).settings() == {"name": "asha", "direction": "min", "grace": 5, "reduction": 4}
