"""Kill the driver at any point, resume, as often as it takes: the search is the one that was never killed, bit for bit.

Each life of a driver is a fork of this process. It is killed by SIGKILL at a step that the test chooses: before, in the
middle of and after each write of the journal, before and after each sync, and around each replacement of a file.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from search_toys import ToySearcher
from search_toys import ToySpace
from search_toys import write_recipe

from autodropout.search.driver import resume_search
from autodropout.search.driver import start_search
from autodropout.search.journal import read_journal
from autodropout.search.recipe import load_recipe
from autodropout.search.runners.in_process import InProcessRunner
from autodropout.search.searcher import Searcher

# All trainings report, and some fail for good.
BODY = """
report(1, metric)
if seed % 3 == 0:
    raise RuntimeError("divisible by three")
"""


class Steps:
    """Counts the steps of file calls in this process, and kills it at one of them."""

    def __init__(self, last: int | None) -> None:
        self.count, self.last = 0, last
        self.write, self.fsync, self.replace = os.write, os.fsync, os.replace
        os.write, os.fsync, os.replace = self._write, self._fsync, self._replace

    def step(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, file: int, data: Any) -> int:
        data = bytes(data)
        self.step()
        if self.count + 1 == self.last:
            self.write(file, data[: random.Random(self.last).randrange(1, len(data))])
        self.step()
        written = self.write(file, data)
        self.step()
        return written

    def _fsync(self, file: int) -> None:
        """Only the death of the machine needs the disk; here it would cost time."""
        self.step()

    def _replace(self, source: Any, target: Any) -> None:
        self.step()
        self.replace(source, target)
        self.step()


class Lives:
    """One search in a folder, by drivers that are killed.

    Args:
        folder: of the run.
        recipe: a path.
        make: a fresh searcher.
        options: of `start_search` and `resume_search`.
    """

    def __init__(self, folder: Path, recipe: Path, make: Callable[[], Searcher], **options: Any) -> None:
        self.folder, self.recipe, self.make, self.options = folder, recipe, make, options
        self.trials = options.pop("trials")

    def live(self) -> None:
        """Starts or resumes, runs to the end and leaves the state of the searcher."""
        searcher = self.make()
        common = (self.folder, load_recipe(self.recipe), searcher, InProcessRunner())
        if (self.folder / "journal.jsonl").exists():
            resume_search(*common, **self.options)
        else:
            start_search(*common, trials=self.trials, **self.options)
        torch.save(searcher.state_dict(), self.folder / "final.pt")

    def fork(self, last: int | None = None, seconds: float | None = None) -> int | None:
        """One life, killed at step `last` or after some seconds, if it lives so long; else how many steps it took."""
        child = os.fork()
        if child == 0:
            try:
                steps = Steps(last)
                self.live()
                (self.folder / "steps").write_text(str(steps.count))
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(1)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return int((self.folder / "steps").read_text()) if code == 0 else None

    def outcome(self) -> tuple[Any, Any]:
        """All that may not depend on the lives: what was asked and told in which order, and the state at the end."""
        content = []
        for record in read_journal(self.folder):
            kept = {key: value for key, value in record.items() if key not in ("time", "seconds", "attempt")}
            if record["record"] in ("ask", "tell", "update") or (record["record"] == "fail" and record["final"]):
                # A traceback is that of the attempt.
                content.append(kept)
        return content, bits(torch.load(self.folder / "final.pt", weights_only=True))


def bits(state: Any) -> Any:
    """The state with tensors as bytes and floats in hexadecimal, so that equal means equal bit for bit."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), tuple(state.shape), state.contiguous().numpy().tobytes()
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [bits(value) for value in state]
    return state.hex() if isinstance(state, float) else state


def toy() -> Searcher:
    return ToySearcher(ToySpace())


def test_killed_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of a small search is the last of one driver; its successor goes on undisturbed."""
    recipe = write_recipe(tmp_path, BODY)
    options: dict[str, Any] = {"trials": 3, "snapshot_seconds": 0}
    whole = Lives(tmp_path / "whole", recipe, toy, **options)
    steps = whole.fork()
    assert steps is not None
    expected = whole.outcome()
    assert {record["record"] for record in expected[0]} == {"ask", "tell", "update", "fail"}
    monkeypatch.setattr(os, "fsync", lambda file: None)
    for last in range(1, steps + 1):
        killed = Lives(tmp_path / f"{last}", recipe, toy, **options)
        assert killed.fork(last) is None
        killed.live()
        assert killed.outcome() == expected, f"killed at step {last}"


@pytest.mark.parametrize("snapshot_seconds", [0.0, 1000.0])
def test_killed_at_random_steps_again_and_again(tmp_path: Path, snapshot_seconds: float) -> None:
    generator = random.Random(4)
    recipe = write_recipe(tmp_path, BODY)
    options: dict[str, Any] = {"trials": 40, "snapshot_seconds": snapshot_seconds}
    whole = Lives(tmp_path / "whole", recipe, toy, **options)
    assert whole.fork() is not None
    killed = Lives(tmp_path / "killed", recipe, toy, **options)
    kills = 0
    while killed.fork(generator.randrange(1, 60)) is None:
        kills += 1
    assert kills >= 25
    assert killed.outcome() == whole.outcome()


def test_killed_from_outside_at_random_times(tmp_path: Path) -> None:
    """Without chosen steps: wherever the signal falls."""
    generator = random.Random(5)
    recipe = write_recipe(tmp_path, BODY)
    options: dict[str, Any] = {"trials": 60, "snapshot_seconds": 0.01}
    whole = Lives(tmp_path / "whole", recipe, toy, **options)
    begun = time.perf_counter()
    assert whole.fork() is not None
    lifetime = time.perf_counter() - begun
    killed = Lives(tmp_path / "killed", recipe, toy, **options)
    for _ in range(10):
        killed.fork(seconds=generator.uniform(0, lifetime / 4))
    assert killed.fork() is not None
    assert killed.outcome() == whole.outcome()
