"""What every runner is: it trains tasks somewhere and hands back what came of them."""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# How an attempt can fail: `train` raised; its worker died; it ran out of memory; it ran past its time limit.
FAILURES = ("raised", "died", "memory", "timeout")

# (number of the trial, step, value) -> whether the trial may go on. Called in the driver's process.
OnReport = Callable[[int, int, float], bool]


@dataclass(frozen=True)
class Task:
    """One attempt at a trial: what a worker needs to know.

    Args:
        number: of the trial.
        attempt: from 0.
        policy: `Policy.to_json()`.
        seed: handed to `train`; the same for every attempt.
    """

    number: int
    attempt: int
    policy: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Finished:
    """The trial has a metric. `stopped`: the step at which `on_report` ended it, on the value of its last report."""

    task: Task
    metric: float
    seconds: float
    stopped: int | None = None


@dataclass(frozen=True)
class Failed:
    """The attempt failed. `kind`: one of `FAILURES`; `message`: one line or a traceback, for the journal."""

    task: Task
    kind: str
    message: str
    seconds: float


Outcome = Finished | Failed


class Runner(ABC):
    """Runs `train` of a recipe for tasks, at most `slots` at a time.

    A context manager: `close` is called at its end, and leaves no process behind. A runner knows neither journal nor
    searcher; retries are the driver's.

    Attributes:
        slots: tasks that run at a time.
    """

    slots: int

    @abstractmethod
    def start(self, recipe: str, on_report: OnReport) -> None:
        """Called once, before anything else. `recipe`: the path of the recipe's file."""

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Begins a task. Only called while fewer than `slots` are running."""

    @abstractmethod
    def wait(self, timeout: float | None) -> list[Outcome]:
        """Blocks until at least one task has an outcome, or for so many seconds; reports are handed on meanwhile."""

    @abstractmethod
    def close(self) -> None:
        """Ends what is still running, without outcomes, and frees everything. May be called twice."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
