"""One attempt at a trial, the same in every runner: it calls `train` and turns whatever comes of it into an outcome."""

from __future__ import annotations

import errno
import math
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from ...policy import Policy
from ..core import ALLOWED
from ..core import LARGEST
from ..recipe import Recipe
from ..recipe import load_recipe
from .base import Failed
from .base import Finished
from .base import Outcome
from .base import Task

# What torch's allocator of the CPU says; it raises a plain RuntimeError.
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


class TrialStopped(BaseException):
    """Raised by `report` to end a training. No `Exception`, so that a recipe's `except Exception` lets it through."""


class _Reports:
    """The `report` of one attempt.

    Whatever `go_on` itself raises is no failure of the training: it is kept in `broken` while the training unwinds.
    """

    def __init__(self, go_on: Callable[[int, float], bool]) -> None:
        self.go_on = go_on
        self.step: int | None = None
        self.value = math.nan
        self.ended = False
        self.broken: BaseException | None = None

    def __call__(self, step: int, value: float) -> None:
        """Hands a value on.

        Raises:
            TrialStopped: the trial is not worth going on with.
            TypeError: a step that is no integer, or a value that is no number.
            ValueError: a step that is negative or not above the last one, or a value that is not in [-1e100, 1e100].
        """
        if self.ended:
            self.end()
        if isinstance(step, bool) or not hasattr(step, "__index__"):
            raise TypeError(f"step must be an integer, got {step!r}")
        step = step.__index__()
        least = 0 if self.step is None else self.step + 1
        if step < least:
            last = "" if self.step is None else f", as the last one was {self.step}"
            raise ValueError(f"step must be at least {least}{last}, got {step}")
        self.value = _metric(f"value of report at step {step}", value)
        self.step = step
        try:
            going = self.go_on(step, self.value)
        except BaseException as error:
            self.broken = error
            self.end()
        if not going:
            self.end()

    def end(self) -> NoReturn:
        self.ended = True
        raise TrialStopped


def load(path: str) -> Recipe | Exception:
    """The recipe for `attempt`; or why it cannot be loaded here, with which every attempt then fails."""
    try:
        return load_recipe(path)
    except Exception as error:
        return error


def attempt(recipe: Recipe | Exception, task: Task, go_on: Callable[[int, float], bool]) -> Outcome:
    """Trains. A False from `go_on` ends it: the outcome is then the value of that report.

    Raises:
        KeyboardInterrupt: passed through.
        BaseException: what `go_on` raised.
    """
    if isinstance(recipe, Exception):
        return failed(task, recipe, 0.0)
    reports = _Reports(go_on)
    begin = time.perf_counter()
    failure: BaseException | None = None
    metric = math.nan
    try:
        metric = _metric("result of train", recipe.train(Policy.from_json(task.policy), task.seed, reports))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() in a recipe ends the trial, not the worker
        failure = error
    seconds = time.perf_counter() - begin
    if reports.broken is not None:
        raise reports.broken
    if reports.ended:  # however the training then ended
        return Finished(task, reports.value, seconds, reports.step)
    if failure is not None:
        return failed(task, failure, seconds)
    return Finished(task, metric, seconds)


def failed(task: Task, error: BaseException, seconds: float) -> Failed:
    """The failure of a task whose training raised this error: for lack of memory, or for another reason."""
    trace = error.__traceback__
    if trace is not None and trace.tb_next is not None:
        trace = trace.tb_next  # the first frame is our own
    message = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
    return Failed(task, "memory" if out_of_memory(error) else "raised", message, seconds)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking: that of Python, NumPy, an accelerator, the system, or torch on the CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def _metric(name: str, value: object) -> float:
    """The value as a float, tensors and NumPy's numbers included."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not abs(number) <= LARGEST:  # nor is NaN
        raise ValueError(f"{name} must be {ALLOWED}, got {number}")
    return number
