"""What a search costs besides its trainings: `python bench/search_scale.py`, in the root of a checkout.

Runs the real driver, journal and controller over the paper's proxy (WRN-28-2: 25 sites, 200 tokens), with trainings
that take no time: 16,384 trials on one core. Prints the driver's time for a trial, the journal's size and the time to
resume, each beside its bound. Then charges that time to the clock of the simulator: how busy 512 workers stay by the
asynchronous and the synchronous rule, and how short trainings may be. About 10 minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from autodropout.reproduce.proxy import network_sites
from autodropout.reproduce.training import Recipe as TrainingRecipe
from autodropout.search.conv_space import ConvSpace
from autodropout.search.core import Search
from autodropout.search.driver import resume_search
from autodropout.search.driver import start_search
from autodropout.search.journal import FILE
from autodropout.search.random_search import RandomSearcher
from autodropout.search.recipe import Recipe
from autodropout.search.recipe import load_recipe
from autodropout.search.reinforce import ControllerSearcher
from autodropout.search.runners.base import Finished
from autodropout.search.runners.base import OnReport
from autodropout.search.runners.base import Outcome
from autodropout.search.runners.base import Runner
from autodropout.search.runners.base import Task
from autodropout.search.searcher import Proposal
from autodropout.search.searcher import Sample
from autodropout.search.simulator import DriverTime
from autodropout.search.simulator import Simulation
from autodropout.search.simulator import simulate

TRIALS = 16_384
SLOTS = 64
WORKERS = 512
TRAINING_SECONDS = 600.0
BUSY = 0.97
BOUNDS = {"driver": 60.0, "journal": 60.0, "resume": 15.0}  # ms a trial, MB, s
SNAPSHOT_SECONDS = 5.0  # of the searcher's work, at most, that resuming repeats: the driver's default
NETWORK = TrainingRecipe(28, 2, epochs=200, batch_size=128, learning_rate=0.1, weight_decay=5e-4, augment="flip_crop")
RECIPE = "DIRECTION = 'max'\n\ndef space(): ...\n\ndef train(policy, seed, report): ...\n"


@dataclass(frozen=True)
class Scale:
    """Seconds of processor time, this process's, unless said otherwise.

    Args:
        trials, tokens: of the search.
        batch_size: of the searcher.
        propose, update: of the searcher in all.
        disk: real time of waiting for the disk (fsync).
        driver: of everything in all, the waiting included.
        wall: real time of everything.
        journal: bytes.
        resume: from opening the journal to where trainings go on, just before another snapshot would have been due.
        resume_wall: the same in real time.
        repeated: the searcher's work in it.
    """

    trials: int
    tokens: int
    batch_size: int
    propose: float
    update: float
    disk: float
    driver: float
    wall: float
    journal: int
    resume: float
    resume_wall: float
    repeated: float

    def driver_time(self) -> DriverTime:
        """For the simulator: half of what is not the searcher's belongs to asking, half to telling."""
        rest = (self.driver - self.propose - self.update) / self.trials / 2
        return DriverTime(self.propose / self.trials + rest, rest, self.update / (self.trials // self.batch_size))


class TimedSearcher(ControllerSearcher):
    """Knows its processor time, and the real time since its state was last asked for, as it is for a snapshot."""

    proposing = updating = since = 0.0

    def propose(self, number: int) -> Proposal:
        begun, real = time.process_time(), time.perf_counter()
        proposal = super().propose(number)
        self.proposing += time.process_time() - begun
        self.since += time.perf_counter() - real
        return proposal

    def update(self, samples: Sequence[Sample]) -> dict[str, Any]:
        begun, real = time.process_time(), time.perf_counter()
        figures = super().update(samples)
        self.updating += time.process_time() - begun
        self.since += time.perf_counter() - real
        return figures

    def state_dict(self) -> dict[str, Any]:
        self.since = 0.0
        return super().state_dict()


class InstantRunner(Runner):
    """Trainings that take no time, and end in random order. From `last` trials on it interrupts the driver: before the
    next snapshot is due, so that resuming has most to do; or at once.
    """

    slots = SLOTS

    def __init__(self, searcher: TimedSearcher, last: int) -> None:
        self.searcher, self.last = searcher, last
        self.ended = 0
        self.replayed: tuple[float, float] | None = None
        self._random = random.Random(0)
        self._tasks: list[Task] = []

    def start(self, recipe: str, on_report: OnReport) -> None:
        """Nothing is trained; what comes before is what resuming takes."""
        self.replayed = (time.process_time(), time.perf_counter())

    def submit(self, task: Task) -> None:
        self._tasks.append(task)

    def wait(self, timeout: float | None) -> list[Outcome]:
        if self.ended >= self.last and (not self.last or self.searcher.since > 0.9 * SNAPSHOT_SECONDS):
            raise KeyboardInterrupt
        self.ended += 1
        task = self._tasks.pop(self._random.randrange(len(self._tasks)))
        return [Finished(task, self._random.gauss(0.9, 0.015), 600.0)]

    def close(self) -> None:
        self._tasks.clear()


class TimedFsync:
    """`os.fsync`, and how long the process only waited in it."""

    def __init__(self, fsync: Callable[[int], None]) -> None:
        self.fsync, self.waited = fsync, 0.0

    def __call__(self, file: int) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        self.fsync(file)
        self.waited += (time.perf_counter() - wall) - (time.process_time() - cpu)


def measure(folder: Path, trials: int) -> Scale:
    """Runs a search of so many trials in `folder`, and resumes it where there is most to repeat."""
    recipe, run = _recipe(folder), folder / "run"
    searcher = TimedSearcher(_space())
    # An interruption just before a snapshot is due falls among the last trials: 5 s are work for less than 600 of them.
    runner = InstantRunner(searcher, max(1, trials - 600))
    cpu, wall = time.process_time(), time.perf_counter()
    with mock.patch("os.fsync", TimedFsync(os.fsync)) as fsync:
        start_search(run, recipe, searcher, runner, trials=trials, snapshot_seconds=SNAPSHOT_SECONDS, command=["bench"])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    again = TimedSearcher(_space())
    resumed = InstantRunner(again, 0)
    begun = time.process_time(), time.perf_counter()
    resume_search(run, recipe, again, resumed, snapshot_seconds=SNAPSHOT_SECONDS, command=["bench"])
    assert resumed.replayed is not None
    return Scale(
        trials=runner.ended,
        tokens=len(searcher.space.tokens),
        batch_size=searcher.batch_size,
        propose=searcher.proposing,
        update=searcher.updating,
        disk=fsync.waited,
        driver=cpu + fsync.waited,
        wall=wall,
        journal=(run / FILE).stat().st_size,
        resume=resumed.replayed[0] - begun[0],
        resume_wall=resumed.replayed[1] - begun[1],
        repeated=again.proposing + again.updating,
    )


@cache
def _space() -> ConvSpace:
    return ConvSpace(network_sites(NETWORK, channels=3, side=32))


def _recipe(folder: Path) -> Recipe:
    path = folder / "nothing.py"
    path.write_text(RECIPE)
    return load_recipe(path)


def busy(driver: DriverTime, batch_size: int, seconds: float, *, synchronous: bool = False) -> Simulation:
    """512 workers for twelve trials each. Which sequences are proposed plays no part in how busy they are."""
    searcher = RandomSearcher(ConvSpace(_space().conv_sites[:1]))
    searcher.batch_size = batch_size
    return simulate(
        Search(searcher),
        lambda trial: 0.9,
        workers=WORKERS,
        trials=12 * WORKERS,
        mean_seconds=seconds,
        driver=driver,
        synchronous=synchronous,
    )


def shortest_training(driver: DriverTime, batch_size: int, share: float = BUSY) -> float:
    """The mean seconds of a training at which workers are busy for just this share, to one per cent."""
    low, high = 1e-3, TRAINING_SECONDS
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        if busy(driver, batch_size, middle).busy >= share:
            high = middle
        else:
            low = middle
    return high


def table(scale: Scale) -> list[str]:
    """The lines that are printed, 80 columns."""
    each = 1000 / scale.trials
    rest = scale.driver - scale.disk - scale.propose - scale.update
    driver = scale.driver_time()
    asynchronous = busy(driver, scale.batch_size, TRAINING_SECONDS)
    synchronous = busy(driver, scale.batch_size, TRAINING_SECONDS, synchronous=True)
    shortest = shortest_training(driver, scale.batch_size)
    ages = sorted(asynchronous.ages)
    return [
        f"{scale.trials} trials of {scale.tokens} tokens, batches of {scale.batch_size}, {SLOTS} at a time",
        f"  {'propose':<36}{scale.propose * each:>9.2f} ms a trial",
        f"  {'update, its share':<36}{scale.update * each:>9.2f} ms a trial",
        f"  {'journal, queues, policies, snapshots':<36}{rest * each:>9.2f} ms a trial",
        f"  {'waiting for the disk':<36}{scale.disk * each:>9.2f} ms a trial",
        f"  {'driver in all':<36}{scale.driver * each:>9.2f} ms a trial   below {BOUNDS['driver']:.0f}",
        f"  {'driver in real time':<36}{scale.wall * each:>9.2f} ms a trial",
        f"  {'journal':<36}{scale.journal / 1e6:>9.1f} MB           below {BOUNDS['journal']:.0f}",
        f"  {'resume':<36}{scale.resume:>9.1f} s            below {BOUNDS['resume']:.0f}",
        f"  {'of which work of the searcher':<36}{scale.repeated:>9.1f} s",
        f"  {'resume in real time':<36}{scale.resume_wall:>9.1f} s",
        "",
        f"{WORKERS} workers, trainings of {TRAINING_SECONDS / 60:.0f} minutes on average, 10-fold spread",
        f"  {'busy, asynchronous':<36}{asynchronous.busy:>9.2%}              at least {BUSY:.0%}",
        f"  {'busy, synchronous':<36}{synchronous.busy:>9.2%}",
        f"  {'trials an hour, asynchronous':<36}{asynchronous.trials_per_hour:>9.0f}",
        f"  {'trials an hour, synchronous':<36}{synchronous.trials_per_hour:>9.0f}",
        f"  {'age of a sample, median and greatest':<36}{ages[len(ages) // 2]:>6}, {ages[-1]} updates",
        f"  {f'asynchronous below {BUSY:.0%} for trainings of':<36}{shortest:>9.1f} s and less",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=TRIALS, help="default: %(default)s")
    trials = parser.parse_args().trials
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, one is used; torch {torch.__version__}; processor time",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        scale = measure(Path(folder), trials)
    print("\n".join(table(scale)))


if __name__ == "__main__":
    main()
