"""Kill the driver at any point, resume, as often as it takes: the search is the one that was never killed, bit for bit.

Each life of a driver is a fork of this process. It is killed by SIGKILL at a step that the test chooses: before, in the
middle of and after each write of the journal, before and after each sync, and around each replacement of a file.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from search_toys import ToySearcher
from search_toys import ToySpace
from search_toys import write_recipe

from autodropout.search.asha import Asha
from autodropout.search.driver import resume_search
from autodropout.search.driver import start_search
from autodropout.search.driver import trial_seed
from autodropout.search.journal import read_journal
from autodropout.search.recipe import load_recipe
from autodropout.search.reinforce import ControllerSearcher
from autodropout.search.runners.in_process import InProcessRunner
from autodropout.search.runners.processes import ProcessRunner
from autodropout.search.searcher import Searcher

# Some trainings fail for good; the others report, and some of those are stopped.
BODY = """
if seed % 3 == 0:
    raise RuntimeError("divisible by three")
report(1, metric)
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
        trials, snapshot_seconds: of the search.
        workers: processes; None: this process.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Path,
        make: Callable[[], Searcher],
        trials: int,
        snapshot_seconds: float,
        workers: int | None = None,
    ) -> None:
        self.folder, self.recipe, self.make = folder, recipe, make
        self.trials, self.snapshot_seconds, self.workers = trials, snapshot_seconds, workers

    def live(self) -> None:
        """Starts or resumes, runs to the end and leaves the state of the searcher."""
        searcher = self.make()
        runner = InProcessRunner() if self.workers is None else ProcessRunner(self.workers)
        options: dict[str, Any] = {"snapshot_seconds": self.snapshot_seconds, "stopper": Asha("max", 1, 2)}
        if (self.folder / "journal.jsonl").exists():
            resume_search(self.folder, load_recipe(self.recipe), searcher, runner, **options)
        else:
            start_search(self.folder, load_recipe(self.recipe), searcher, runner, trials=self.trials, **options)
        torch.save(searcher.state_dict(), self.folder / "final.pt")

    def fork(self, last: int | None = None, until: Callable[[], bool] | None = None) -> int | None:
        """One life, killed at step `last` or when `until` says so; if that never comes, the number of its steps."""
        child = os.fork()
        if child == 0:
            try:
                steps = Steps(last)
                self.live()
                (self.folder / "steps").write_text(str(steps.count))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        ended, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
        while not ended:
            if until is not None and until():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
            ended, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL)
        return int((self.folder / "steps").read_text()) if code == 0 else None

    def records(self) -> list[dict[str, Any]]:
        return read_journal(self.folder) if (self.folder / "journal.jsonl").exists() else []

    def outcome(self) -> tuple[Any, Any]:
        """All that may not depend on the lives: what was asked and told in which order, and the state at the end."""
        content = []
        for record in self.records():
            if record["record"] in ("ask", "tell", "update") or (record["record"] == "fail" and record["final"]):
                content.append({k: v for k, v in record.items() if k not in ("time", "seconds", "attempt")})
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


def controller() -> Searcher:
    return ControllerSearcher(ToySpace(), seed=1, batch_size=4)


@pytest.fixture(autouse=True, scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What torch imports at the first use of an optimizer takes longer than a life: once here, not in every fork.

    On one thread: OpenMP waits for ever in a fork of a process that has used several.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("warm")
    Lives(folder / "run", write_recipe(folder), controller, trials=5, snapshot_seconds=0).live()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_killed_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of a small search is the last of one driver; its successor goes on undisturbed."""
    recipe = write_recipe(tmp_path, BODY)
    whole = Lives(tmp_path / "whole", recipe, toy, trials=3, snapshot_seconds=0)
    steps = whole.fork()
    assert steps is not None
    expected = whole.outcome()
    assert {record["record"] for record in expected[0]} == {"ask", "tell", "update", "fail"}
    monkeypatch.setattr(os, "fsync", lambda file: None)
    for last in range(1, steps + 1):
        killed = Lives(tmp_path / f"{last}", recipe, toy, trials=3, snapshot_seconds=0)
        assert killed.fork(last) is None
        killed.live()
        assert killed.outcome() == expected, f"killed at step {last}"


@pytest.mark.parametrize(
    ("make", "trials", "snapshot_seconds", "least"),
    [
        (toy, 40, 0, 25),
        pytest.param(controller, 40, 1000, 50, marks=pytest.mark.slow),
        (controller, 10, 0, 8),
    ],
)
def test_killed_at_random_steps_again_and_again(
    tmp_path: Path, make: Callable[[], Searcher], trials: int, snapshot_seconds: float, least: int
) -> None:
    """From snapshots after every result, and from the journal alone; the sequence, and the searcher at the end."""
    generator = random.Random(4)
    recipe = write_recipe(tmp_path, BODY)
    whole = Lives(tmp_path / "whole", recipe, make, trials, snapshot_seconds)
    assert whole.fork() is not None
    killed = Lives(tmp_path / "killed", recipe, make, trials, snapshot_seconds)
    kills = 0
    while killed.fork(generator.randrange(1, 30)) is None:
        kills += 1
    assert kills >= least
    assert killed.outcome() == whole.outcome()


def test_killed_from_outside_at_random_times(tmp_path: Path) -> None:
    """Without chosen steps: wherever the signal falls."""
    generator = random.Random(5)
    recipe = write_recipe(tmp_path, BODY)
    whole = Lives(tmp_path / "whole", recipe, controller, 24, snapshot_seconds=0.1)
    begun = time.perf_counter()
    assert whole.fork() is not None
    lifetime = time.perf_counter() - begun
    killed = Lives(tmp_path / "killed", recipe, controller, 24, snapshot_seconds=0.1)
    for _ in range(10):
        end = time.perf_counter() + generator.uniform(0, lifetime / 2)
        killed.fork(until=lambda end=end: time.perf_counter() > end)  # type: ignore[misc]
    assert killed.fork() is not None
    assert killed.outcome() == whole.outcome()


def test_a_new_process_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Forks share the seed of Python's string hashes and all that was ever set in this process; this one does not."""
    recipe = write_recipe(tmp_path, BODY)
    whole = Lives(tmp_path / "whole", recipe, controller, 12, snapshot_seconds=1000)
    assert whole.fork() is not None
    killed = Lives(tmp_path / "killed", recipe, controller, 12, snapshot_seconds=1000)
    assert killed.fork(100) is None
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_kill import Lives, controller
Lives(Path({str(killed.folder)!r}), Path({str(recipe)!r}), controller, 12, 1000).live()
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    assert killed.outcome() == whole.outcome()


@pytest.mark.slow
def test_no_result_of_a_process_is_lost_or_counted_twice(tmp_path: Path) -> None:
    """Fifty drivers of two workers die, some before a worker is ready. What was told stays told; each ends once."""
    generator = random.Random(6)
    path = write_recipe(tmp_path, BODY)
    killed = Lives(tmp_path / "killed", path, toy, trials=40, snapshot_seconds=0, workers=2)
    before: list[dict[str, Any]] = []
    for _ in range(50):
        assert killed.fork(generator.randrange(1, 40)) is None
        records = killed.records()
        assert records[: len(before)] == before
        before = records
    assert killed.fork() is not None
    records = killed.records()
    assert records[: len(before)] == before
    check_trials(records, path, 40)


def check_trials(records: list[dict[str, Any]], path: Path, trials: int) -> None:
    """All trials were asked and ended once, with the metrics that their choices and seeds have."""
    recipe, space = load_recipe(path), ToySpace()
    choices = {record["trial"]: record["choices"] for record in records if record["record"] == "ask"}
    assert [record["trial"] for record in records if record["record"] == "ask"] == list(range(trials))
    ended = []
    for record in records:
        if record["record"] == "fail" and record["final"]:
            ended.append(record["trial"])
            assert trial_seed(0, record["trial"]) % 3 == 0
        elif record["record"] == "tell":
            ended.append(record["trial"])
            # Also of a trial that was stopped at its only report, whose value is the metric.
            policy, seed = space.decode(choices[record["trial"]]), trial_seed(0, record["trial"])
            assert record["metric"] == recipe.train(policy, seed, lambda step, value: None)
    assert sorted(ended) == list(range(trials))
