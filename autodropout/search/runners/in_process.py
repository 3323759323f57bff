"""Trials in this process, one after the other: for tests, debugging and trainings that use the whole machine."""

from __future__ import annotations

from ..recipe import Recipe
from ..recipe import load_recipe
from .attempt import attempt
from .base import OnReport
from .base import Outcome
from .base import Runner
from .base import Task


class InProcessRunner(Runner):
    """Trains inside `wait`, which therefore returns when the training ends, whatever its timeout.

    A training that hangs, or that takes the process down, takes the driver with it. KeyboardInterrupt passes through
    `wait`, without an outcome.
    """

    slots = 1

    def __init__(self) -> None:
        self._recipe: Recipe | None = None
        self._on_report: OnReport | None = None
        self._task: Task | None = None

    def start(self, recipe: str, on_report: OnReport) -> None:
        """See `Runner.start`.

        Raises:
            Exception: as `load_recipe`.
        """
        self._recipe = load_recipe(recipe)
        self._on_report = on_report

    def submit(self, task: Task) -> None:
        if self._task is not None:
            raise RuntimeError(f"submit must be called while a slot is free, but trial {self._task.number} is running")
        self._task = task

    def wait(self, timeout: float | None) -> list[Outcome]:
        task, recipe, on_report = self._task, self._recipe, self._on_report
        if task is None or recipe is None or on_report is None:
            return []
        self._task = None
        return [attempt(recipe, task, lambda step, value: on_report(task.number, step, value))]

    def close(self) -> None:
        self._task = None
