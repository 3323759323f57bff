"""What the records of a journal say: the trials, updates and failures so far, for whoever shows or exports them.

A `History` is an observer of a driver, and is filled from a journal file in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .journal import Record
from .journal import read_journal


@dataclass
class TrialHistory:
    """One trial. `ended`: seconds of searching before its result (pauses excepted); None while it is unfinished.

    `metric` is None while it is unfinished and when it has `failed`, which is then the kind of its last failure.
    `stopped`: the step at which it was stopped early.
    """

    number: int
    choices: tuple[int, ...]
    update: int
    ended: float | None = None
    metric: float | None = None
    seconds: float = 0.0
    stopped: int | None = None
    failed: str | None = None


class History:
    """Attributes:

    header: the first record.
    runner: the settings of the runner, which resuming may have changed.
    commands: with which it was begun and resumed.
    budget: trials to propose in all.
    trials: in the order of their numbers.
    told: finished trials in the order in which they finished.
    updates: the records of updates.
    failures: the records of failed attempts.
    failed: trials that failed for good.
    elapsed: seconds of searching up to the last record, pauses excepted.
    """

    def __init__(self) -> None:
        self.header: Record = {}
        self.runner: dict[str, Any] = {}
        self.commands: list[list[str]] = []
        self.budget = 0
        self.trials: list[TrialHistory] = []
        self.told: list[TrialHistory] = []
        self.updates: list[Record] = []
        self.failures: list[Record] = []
        self.failed = 0
        self.elapsed = 0.0
        self._before = 0.0
        self._begun = 0.0
        self._best: TrialHistory | None = None

    @classmethod
    def of(cls, records: Iterable[Record]) -> History:
        """The history that the records tell."""
        history = cls()
        for record in records:
            history(record)
        return history

    def __call__(self, record: Record, replayed: bool = False) -> None:
        """Takes the next record."""
        kind, now = record["record"], posix(record["time"])
        if kind in ("run", "resume"):
            self._before, self._begun = self.elapsed, now
            self.budget = record["trials"]
            self.commands.append(record["command"])
            self.header = self.header or record
            self.runner = record["runner"]
        self.elapsed = self._before + max(0.0, now - self._begun)
        if kind == "ask":
            self.trials.append(TrialHistory(record["trial"], tuple(record["choices"]), record["update"]))
        elif kind == "tell":
            trial = self.trials[record["trial"]]
            trial.ended, trial.metric = self.elapsed, record["metric"]
            trial.seconds, trial.stopped = record["seconds"], record["stopped"]
            self.told.append(trial)
            if trial.stopped is None and (self._best is None or self.better(trial, self._best)):
                self._best = trial
        elif kind == "fail":
            self.failures.append(record)
            if record["final"]:
                self.failed += 1
                trial = self.trials[record["trial"]]
                trial.ended, trial.failed, trial.seconds = self.elapsed, record["kind"], record["seconds"]
        elif kind == "update":
            self.updates.append(record)

    @property
    def recipe(self) -> dict[str, str]:
        """Name, path and sha256."""
        recipe: dict[str, str] = self.header["recipe"]
        return recipe

    @property
    def sign(self) -> int:
        """1 if a larger metric is better, else -1."""
        return 1 if self.header["direction"] == "max" else -1

    @property
    def best(self) -> TrialHistory | None:
        """The finished trial with the best metric, the first told of equals.

        A trial that was stopped early has no final metric and is left out.
        """
        return self._best

    @property
    def unfinished(self) -> int:
        """Trials whose result is not in."""
        return len(self.trials) - len(self.told) - self.failed

    def better(self, trial: TrialHistory, other: TrialHistory) -> bool:
        """Whether the first of two finished trials has the better metric."""
        assert trial.metric is not None
        assert other.metric is not None
        return self.sign * trial.metric > self.sign * other.metric

    def leaders(self, count: int) -> list[TrialHistory]:
        """The best finished trials with different choices, best first, of equals the earlier number.

        A trial that was stopped early has no final metric and is left out.
        """
        whole = [trial for trial in self.told if trial.stopped is None and trial.metric is not None]
        whole.sort(key=lambda trial: (-self.sign * (trial.metric or 0.0), trial.number))
        distinct: dict[tuple[int, ...], TrialHistory] = {}
        for trial in whole:
            distinct.setdefault(trial.choices, trial)
        return list(distinct.values())[:count]


def read_history(folder: Path) -> History:
    """The history of the run in `folder`, which may be running.

    Raises:
        JournalError, OSError: as `read_journal`.
    """
    return History.of(read_journal(folder))


def posix(time: str) -> float:
    """Seconds since 1970 of a record's time."""
    return datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp()


def total_entropy(update: Record) -> float | None:
    """The searcher's entropy at an update in nats, if it has one."""
    entropy: Any = update["figures"].get("entropy")
    return float(entropy) if isinstance(entropy, int | float) else None
