"""What a searcher is measured on: a space, the true value of each of its sequences, and noisy observations of it."""

from __future__ import annotations

import math
from abc import ABC
from abc import abstractmethod
from collections.abc import Sequence

from autodropout.search.core import Search
from autodropout.search.core import Trial
from autodropout.search.searcher import Searcher
from autodropout.search.simulator import simulate
from autodropout.search.space import Choices
from autodropout.search.space import SearchSpace

LAST = 50  # proposals over which `late_regret` averages


class BenchmarkTask(ABC):
    """A search problem whose answer is known.

    Attributes:
        name: of the task.
        space: what is searched.
        optimum: the largest `value` of a sequence of the space.
    """

    name: str
    space: SearchSpace
    optimum: float

    @abstractmethod
    def value(self, choices: Sequence[int]) -> float:
        """The accuracy of a sequence, in [0, 1], without the noise of a single training.

        Raises:
            ValueError: not a sequence of the space.
        """

    @abstractmethod
    def observe(self, choices: Sequence[int], seed: int) -> float:
        """The accuracy that one training with this seed sees."""

    def simple_regret(self, choices: Sequence[Sequence[int]], observed: Sequence[float]) -> float:
        """What the policy that a search returns lacks: that of the best observation, the earliest of equal ones."""
        return self.optimum - self.value(choices[max(range(len(observed)), key=observed.__getitem__)])

    def late_regret(self, choices: Sequence[Sequence[int]]) -> float:
        """What the last 50 proposals of a search lack on average, without noise: has its view of the space improved?"""
        last = choices[-LAST:]
        return self.optimum - math.fsum(self.value(each) for each in last) / len(last)


def play(
    task: BenchmarkTask, searcher: Searcher, trials: int, seed: int, workers: int = 1
) -> tuple[list[Choices], list[float], list[int]]:
    """One search of so many finished trials, in the order in which they finish.

    Args:
        task: what is searched; observations come with the seeds `seed * 2^20 + number of the trial`.
        searcher: a fresh one for the space of the task.
        trials: at least 1.
        seed: of the observations and of the trainings' times.
        workers: trainings at a time; their times vary tenfold, so with several of them samples are stale.

    Returns:
        Choices and observed accuracies by trial, and the age of every sample that was learned from.
    """
    choices: list[Choices] = []
    observed: list[float] = []

    def train(trial: Trial) -> float:
        choices.append(trial.choices)
        observed.append(task.observe(trial.choices, (seed << 20) + trial.number))
        return observed[-1]

    # When one more could be proposed, all but `workers - 1` trials are finished.
    found = simulate(Search(searcher), train, workers=workers, trials=trials + workers - 1, mean_seconds=1.0, seed=seed)
    return choices, observed, list(found.ages)
