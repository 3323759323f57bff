"""A search in virtual time: the real core and searcher, thousands of workers that only wait, no clock but the heap's.

Two rules say when a worker gets its next trial. Asynchronous, the paper's and the driver's: at once, whatever the
others do. Synchronous: when all trials of a generation, one a worker, are finished and learned from. What differs is
how much of the time workers train, and how old samples are when they are learned from.

The driver is one server: proposing, recording and learning take time, and what arrives meanwhile waits its turn.
Everything is a function of the arguments; no real time is measured.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from .core import Search
from .core import Trial
from .core import Update


@dataclass(frozen=True)
class DriverTime:
    """Seconds that the driver takes to propose a trial, to take a result in, and for one update of the searcher.

    Raises:
        ValueError: one of them is negative or not finite.
    """

    ask: float = 0.0
    tell: float = 0.0
    update: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ask", "tell", "update"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be in [0, inf), got {value}")

    def per_trial(self, batch_size: int) -> float:
        """Seconds for one trial, its share of an update included."""
        return self.ask + self.tell + self.update / batch_size


@dataclass(frozen=True)
class Simulation:
    """What came of it, until the moment at which one more trial would have been proposed.

    Args:
        seconds: virtual ones, until that moment.
        busy: share of these seconds that workers trained, on average over workers.
        trials_per_hour: results taken in, over the time.
        ages: of all samples that were learned from, in order.
    """

    seconds: float
    busy: float
    trials_per_hour: float
    ages: tuple[int, ...]


def trial_seconds(number: int, mean: float, spread: float, seed: int) -> float:
    """How long trial `number` takes: log-uniform, the longest `spread` times the shortest, `mean` on average."""
    if spread == 1:
        return mean
    shortest = mean * math.log(spread) / (spread - 1)
    return shortest * float(spread ** random.Random(f"time/{seed}/{number}").random())


def simulate(
    search: Search,
    value: Callable[[Trial], float],
    *,
    workers: int,
    trials: int,
    mean_seconds: float,
    spread: float = 10.0,
    driver: DriverTime | None = None,
    synchronous: bool = False,
    seed: int = 0,
) -> Simulation:
    """Runs a search on `workers` workers until `trials` are proposed and one more could be.

    Args:
        search: a fresh one. Asked and told as by the driver; what is unfinished in the end stays so.
        value: the metric that a trial reaches.
        workers: at least 1.
        trials: a multiple of `workers` for the synchronous rule, at least `workers` for the other.
        mean_seconds: of a training, above 0.
        spread: the longest training over the shortest, at least 1.
        driver: what the driver takes; None: nothing.
        synchronous: the rule.
        seed: of the trainings' times.

    Raises:
        ValueError: an argument outside these ranges, or a search that has begun.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if trials < workers:
        raise ValueError(f"trials must be at least {workers}, the number of workers, got {trials}")
    if synchronous and trials % workers:
        raise ValueError(f"trials must be a multiple of {workers}, the number of workers, got {trials}")
    if not 0 < mean_seconds < math.inf:
        raise ValueError(f"mean_seconds must be in (0, inf), got {mean_seconds}")
    if not 1 <= spread < math.inf:
        raise ValueError(f"spread must be in [1, inf), got {spread}")
    if search.asked:
        raise ValueError(f"search must be fresh, got one with {search.asked} trials")
    cluster = _Cluster(search, value, driver or DriverTime(), lambda n: trial_seconds(n, mean_seconds, spread, seed))
    end = cluster.run_synchronous(workers, trials) if synchronous else cluster.run_asynchronous(workers, trials)
    return Simulation(
        seconds=end,
        busy=cluster.trained(end) / (workers * end),
        trials_per_hour=cluster.told * 3600 / end,
        ages=tuple(cluster.ages),
    )


class _Cluster:
    """Workers and the driver's queue. `free`: when the driver has done all that it was given so far."""

    def __init__(
        self, search: Search, value: Callable[[Trial], float], driver: DriverTime, seconds: Callable[[int], float]
    ) -> None:
        self.search, self.value, self.driver, self.seconds = search, value, driver, seconds
        self.free = 0.0
        self.told = 0
        self.ages: list[int] = []
        self.spans: list[tuple[float, float]] = []  # when a worker began to train, and when it ended
        self.running: list[tuple[float, int]] = []  # a heap: end of the training, number of the trial

    def trained(self, end: float) -> float:
        """Seconds of training before `end`, over all workers."""
        return math.fsum(min(stop, end) - start for start, stop in self.spans if start < end)

    def ask(self) -> None:
        """The driver proposes a trial as soon as it can; a worker starts on it at once."""
        trial = self.search.ask()
        self.free += self.driver.ask
        stop = self.free + self.seconds(trial.number)
        self.spans.append((self.free, stop))
        heapq.heappush(self.running, (stop, trial.number))

    def receive(self) -> int:
        """The next training ends: the driver takes the result in, after what it was given before."""
        stop, number = heapq.heappop(self.running)
        self.free = max(self.free, stop) + self.driver.tell
        self.told += 1
        return number

    def learn(self, number: int) -> None:
        """The searcher is told."""
        update: Update | None = self.search.tell(number, self.value(self.search.unfinished[number]))
        if update is not None:
            self.free += self.driver.update
            self.ages.extend(update.ages)

    def run_asynchronous(self, workers: int, trials: int) -> float:
        for _ in range(workers):
            self.ask()
        while True:
            self.learn(self.receive())
            if self.search.asked == trials:
                return self.free
            self.ask()

    def run_synchronous(self, workers: int, trials: int) -> float:
        while self.search.asked < trials:
            for _ in range(workers):
                self.ask()
            for number in [self.receive() for _ in range(workers)]:
                self.learn(number)
        return self.free
