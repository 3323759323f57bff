"""The driver: what it writes, when, and how it goes on after every kind of end."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from search_toys import ToySearcher
from search_toys import ToySpace
from search_toys import write_recipe

from autodropout.search import driver
from autodropout.search import replay
from autodropout.search.driver import SearchResult
from autodropout.search.driver import resume_search
from autodropout.search.driver import start_search
from autodropout.search.driver import trial_seed
from autodropout.search.journal import Journal
from autodropout.search.journal import JournalError
from autodropout.search.journal import read_journal
from autodropout.search.recipe import load_recipe
from autodropout.search.replay import ReplayError
from autodropout.search.runners.base import Failed
from autodropout.search.runners.base import Finished
from autodropout.search.runners.base import OnReport
from autodropout.search.runners.base import Outcome
from autodropout.search.runners.base import Runner
from autodropout.search.runners.base import Task
from autodropout.search.runners.in_process import InProcessRunner
from autodropout.search.tpe import TPESearcher

Records = list[dict[str, Any]]


class Scripted(Runner):
    """Workers whose tasks end in the order, and as, a test says; by default the oldest first, with metric 0.5."""

    def __init__(self, slots: int = 1, outcomes: list[Any] | None = None) -> None:
        self.slots = slots
        self.outcomes = outcomes
        self.submitted: list[Task] = []
        self.running: list[Task] = []
        self.closed = False
        self.on_report: OnReport | None = None
        self.journal: Path | None = None

    def start(self, recipe: str, on_report: OnReport) -> None:
        self.on_report = on_report

    def submit(self, task: Task) -> None:
        assert len(self.running) < self.slots
        if self.journal is not None:  # the ask is on disk by now
            asks = [record["trial"] for record in read_journal(self.journal) if record["record"] == "ask"]
            assert task.number in asks
        self.submitted.append(task)
        self.running.append(task)

    def wait(self, timeout: float | None) -> list[Outcome]:
        outcome = self.outcomes.pop(0) if self.outcomes is not None else 0.5
        if isinstance(outcome, BaseException):
            raise outcome
        task = self.running.pop(0)
        if isinstance(outcome, str):
            return [Failed(task, outcome, "why", 2.0)]
        if isinstance(outcome, list):  # reports
            assert self.on_report is not None
            for step, value in enumerate(outcome, 1):
                if not self.on_report(task.number, step, value):
                    return [Finished(task, value, 1.0, step)]
            outcome = outcome[-1]
        return [Finished(task, outcome, 1.0)]

    def close(self) -> None:
        self.closed = True
        self.running.clear()


class Median:
    """Stops a trial below the median of the earlier ones' last values at the same step."""

    def __init__(self, least: int = 2) -> None:
        self.least = least
        self.values: dict[int, dict[int, float]] = {}

    def report(self, number: int, step: int, value: float) -> bool:
        earlier = self.values.setdefault(step, {})
        earlier[number] = value
        others = [v for n, v in earlier.items() if n != number]
        return len(others) < self.least or value >= statistics.median(others)

    def settings(self) -> dict[str, Any]:
        return {"name": "median", "least": self.least}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has written is there after its death; only for the machine's it must be on the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def start(path: Path, folder: Path, runner: Runner | None = None, searcher: Any = None, **options: Any) -> SearchResult:
    options.setdefault("trials", 6)
    return start_search(
        folder, load_recipe(path), searcher or ToySearcher(ToySpace()), runner or InProcessRunner(), **options
    )


def resume(
    path: Path, folder: Path, runner: Runner | None = None, searcher: Any = None, **options: Any
) -> SearchResult:
    searcher = searcher or ToySearcher(ToySpace())
    return resume_search(folder, load_recipe(path), searcher, runner or InProcessRunner(), **options)


def kinds(records: Records) -> list[str]:
    return [record["record"] for record in records]


def of_kind(records: Records, kind: str) -> Records:
    return [record for record in records if record["record"] == kind]


def test_a_search_in_this_process(recipe_path: Path, tmp_path: Path) -> None:
    """The journal of a whole search, record by record, with metrics computed here."""
    result = start(recipe_path, tmp_path / "run", trials=5, seed=3, command=["autodropout", "search"])
    records = read_journal(tmp_path / "run")
    assert kinds(records) == [
        *["run", "ask", "tell", "ask", "tell", "update", "ask", "tell", "ask", "tell", "update", "ask", "tell"]
    ]
    recipe, space = load_recipe(recipe_path), ToySpace()
    header = {key: value for key, value in records[0].items() if key not in ("time", "versions")}
    assert header == {
        "record": "run",
        "schema": 1,
        "recipe": {"name": "toy", "path": str(recipe_path), "sha256": recipe.sha256},
        "direction": "max",
        "space": {"name": "toy", "sites": 2},
        "searcher": {"name": "ToySearcher", "seed": 0, "batch_size": 2},
        "trials": 5,
        "seed": 3,
        "runner": {"kind": "InProcessRunner", "workers": 1},
        "retries": 1,
        "stopper": None,
        "command": ["autodropout", "search"],
    }
    assert set(records[0]["versions"]) == {"autodropout", "python", "torch", "machine"}
    metrics = {}
    for ask, tell in zip(of_kind(records, "ask"), of_kind(records, "tell"), strict=True):
        number = ask["trial"]
        assert tell["trial"] == number
        metrics[number] = recipe.train(space.decode(ask["choices"]), trial_seed(3, number), lambda step, value: None)
        assert tell["metric"] == metrics[number]
        assert tell["stopped"] is None
    assert [record["trials"] for record in of_kind(records, "update")] == [[0, 1], [2, 3]]
    assert [record["update"] for record in of_kind(records, "ask")] == [0, 0, 1, 1, 2]
    assert result == SearchResult(tmp_path / "run", 5, metrics, (), max(metrics, key=lambda n: metrics[n]), False)


def test_a_smaller_metric_can_be_better(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, direction="min")
    result = start(path, tmp_path / "run", Scripted(outcomes=[3.0, 1.0, 2.0, 1.0]), trials=4)
    assert result.best == 1
    assert of_kind(read_journal(tmp_path / "run"), "update")[0]["figures"] == {"reward": [-3.0, -1.0]}


def test_trial_seeds_are_fixed_for_ever() -> None:
    """Golden: a journal of today must be resumable tomorrow."""
    golden = {(0, 0): 1318842689, (0, 1): 1390763824, (1, 0): 1906578111, (-5, 16383): 2063948914}
    assert {arguments: trial_seed(*arguments) for arguments in golden} == golden
    seeds = {trial_seed(seed, number) for seed in range(20) for number in range(100)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_asks_are_on_disk_before_workers_know_and_all_workers_are_kept_busy(recipe_path: Path, tmp_path: Path) -> None:
    runner = Scripted(slots=3)
    runner.journal = tmp_path / "run"
    start(recipe_path, tmp_path / "run", runner, trials=7)
    assert kinds(read_journal(tmp_path / "run"))[1:6] == ["ask", "ask", "ask", "tell", "ask"]
    assert [task.number for task in runner.submitted] == list(range(7))
    assert [task.seed for task in runner.submitted] == [trial_seed(0, number) for number in range(7)]
    assert runner.closed


def test_failed_attempts_are_repeated_so_often_then_the_trial_has_failed(recipe_path: Path, tmp_path: Path) -> None:
    searcher = ToySearcher(ToySpace())
    runner = Scripted(outcomes=["died", "timeout", 0.1, "raised", "memory", "raised", 0.2, 0.3])
    result = start(recipe_path, tmp_path / "run", runner, searcher, trials=4, retries=2)
    attempts = [(task.number, task.attempt) for task in runner.submitted]
    assert attempts == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0)]
    assert len({task.seed for task in runner.submitted}) == 4
    fails = of_kind(read_journal(tmp_path / "run"), "fail")
    assert [(r["trial"], r["attempt"], r["kind"], r["final"]) for r in fails] == [
        (0, 0, "died", False),
        (0, 1, "timeout", False),
        (1, 0, "raised", False),
        (1, 1, "memory", False),
        (1, 2, "raised", True),
    ]
    assert (fails[0]["message"], fails[0]["seconds"]) == ("why", 2.0)
    assert (result.metrics, result.failed, result.best) == ({0: 0.1, 2: 0.2, 3: 0.3}, (1,), 3)
    assert searcher.lost == 1


@pytest.mark.parametrize("metric", [float("nan"), float("inf"), sys.float_info.max])
def test_metrics_that_are_not_finite_or_too_large_are_failures(
    recipe_path: Path, tmp_path: Path, metric: float
) -> None:
    result = start(recipe_path, tmp_path / "run", Scripted(outcomes=[metric, 0.5]), trials=1, retries=1)
    (fail,) = of_kind(read_journal(tmp_path / "run"), "fail")
    assert (fail["kind"], fail["message"], fail["final"]) == (
        "raised",
        f"the metric must be in [-1e+100, 1e+100], got {metric}",
        False,
    )
    assert result.metrics == {0: 0.5}


def test_trainings_that_raise_are_recorded_with_their_traceback(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, body="if seed % 2:\n    raise RuntimeError(f'odd {seed}')")
    result = start(path, tmp_path / "run", trials=10)
    odd = tuple(number for number in range(10) if trial_seed(0, number) % 2)
    assert result.failed == odd
    assert odd
    fails = of_kind(read_journal(tmp_path / "run"), "fail")
    assert [fail["trial"] for fail in fails] == [number for number in odd for _ in range(2)]
    assert f"RuntimeError: odd {trial_seed(0, odd[0])}" in fails[0]["message"]


def test_reports_are_recorded_and_end_hopeless_trials(recipe_path: Path, tmp_path: Path) -> None:
    outcomes = [[0.1, 0.2], [0.3, 0.4], [0.0, 0.9], [0.5, 0.3]]
    start(recipe_path, tmp_path / "run", Scripted(outcomes=outcomes), trials=4, stopper=Median())
    records = read_journal(tmp_path / "run")
    reports = [(r["trial"], r["attempt"], r["step"], r["value"], r["go_on"]) for r in of_kind(records, "report")]
    assert reports == [
        (0, 0, 1, 0.1, True),
        (0, 0, 2, 0.2, True),
        (1, 0, 1, 0.3, True),
        (1, 0, 2, 0.4, True),
        (2, 0, 1, 0.0, False),
        (3, 0, 1, 0.5, True),
        (3, 0, 2, 0.3, False),
    ]
    assert [(r["metric"], r["stopped"]) for r in of_kind(records, "tell")] == [
        (0.2, None),
        (0.4, None),
        (0.0, 1),
        (0.3, 2),
    ]


def test_a_trial_that_was_stopped_is_not_the_best(recipe_path: Path, tmp_path: Path) -> None:
    """Its metric is that of a part of a training, and no export would take it."""
    runner = Scripted(outcomes=[[0.6, 0.1], [0.6, 0.2], [0.5, 0.9]])
    result = start(recipe_path, tmp_path / "run", runner, trials=3, stopper=Median())
    assert (result.metrics, result.best) == ({0: 0.1, 1: 0.2, 2: 0.5}, 1)
    runner = Scripted(outcomes=[[0.7, 0.15]])
    assert resume(recipe_path, tmp_path / "run", runner, trials=4, stopper=Median()).best == 1


def test_a_training_is_ended_by_its_report(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, body="for step in range(1, 4):\n    report(step, metric + step)")
    start(path, tmp_path / "run", trials=8, stopper=Median())
    records = read_journal(tmp_path / "run")
    stopped = {record["trial"]: record for record in of_kind(records, "tell") if record["stopped"] is not None}
    assert stopped
    for number, tell in stopped.items():
        last = [record for record in of_kind(records, "report") if record["trial"] == number][-1]
        assert (last["step"], last["value"], last["go_on"]) == (tell["stopped"], tell["metric"], False)


def test_observers_see_every_record_replayed_ones_too(recipe_path: Path, tmp_path: Path) -> None:
    seen: list[tuple[dict[str, Any], bool]] = []
    start(recipe_path, tmp_path / "run", trials=2, observers=[lambda *seeing: seen.append(seeing)])
    first = read_journal(tmp_path / "run")
    assert seen == [(record, False) for record in first]
    seen.clear()
    resume(recipe_path, tmp_path / "run", trials=4, observers=[lambda *seeing: seen.append(seeing)])
    whole = read_journal(tmp_path / "run")
    assert seen == [(record, position < len(first)) for position, record in enumerate(whole)]


def content(folder: Path) -> Records:
    """What a search did, without what may differ between one life and several: times, attempts, reports."""
    kept = []
    for record in read_journal(folder):
        if record["record"] in ("ask", "tell", "update") or (record["record"] == "fail" and record["final"]):
            kept.append({k: v for k, v in record.items() if k not in ("time", "seconds", "attempt")})
    return kept


@pytest.mark.parametrize("snapshot_seconds", [0.0, 1000.0])
def test_a_search_can_be_prolonged(recipe_path: Path, tmp_path: Path, snapshot_seconds: float) -> None:
    """10 + 15 trials are what 25 in one go are; from a snapshot, and from the journal alone."""
    whole, halves = ToySearcher(ToySpace()), ToySearcher(ToySpace())
    start(recipe_path, tmp_path / "whole", searcher=whole, trials=25)
    start(recipe_path, tmp_path / "run", trials=10, snapshot_seconds=snapshot_seconds)
    assert (tmp_path / "run" / "snapshot.pt").exists() == (snapshot_seconds == 0)
    result = resume(recipe_path, tmp_path / "run", searcher=halves, trials=25)
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert halves.state_dict() == whole.state_dict()
    assert result.trials == 25
    (record,) = of_kind(read_journal(tmp_path / "run"), "resume")
    assert (record["trials"], record["unfinished"], record["notices"]) == (25, [], [])
    with pytest.raises(ValueError, match="trials, which can only be raised, must be at least 25, got 24"):
        resume(recipe_path, tmp_path / "run", trials=24)
    assert resume(recipe_path, tmp_path / "run").metrics == result.metrics  # nothing to do: the same result again


def test_ctrl_c_is_an_outcome_and_unfinished_trials_run_again(recipe_path: Path, tmp_path: Path) -> None:
    runner = Scripted(3, [0.1, "died", KeyboardInterrupt()])
    result = start(recipe_path, tmp_path / "run", runner, trials=5, retries=1)
    assert result.interrupted
    assert (result.metrics, result.failed, runner.closed) == ({0: 0.1}, (), True)
    again = Scripted(3)
    result = resume(recipe_path, tmp_path / "run", again)
    assert not result.interrupted
    attempts = [(task.number, task.attempt) for task in again.submitted]
    assert attempts[:4] == [(1, 2), (2, 1), (3, 1), (4, 0)]
    first = {task.number: task for task in runner.submitted}
    for task in again.submitted[:3]:
        assert dataclasses.replace(task, attempt=0) == dataclasses.replace(first[task.number], attempt=0)
    (record,) = of_kind(read_journal(tmp_path / "run"), "resume")
    assert record["unfinished"] == [[1, 2], [2, 1], [3, 1]]
    assert set(result.metrics) == set(range(5))


def test_attempts_that_died_with_their_driver_do_not_count_as_failures(recipe_path: Path, tmp_path: Path) -> None:
    start(recipe_path, tmp_path / "run", Scripted(outcomes=[KeyboardInterrupt()]), trials=1, retries=1)
    for _ in range(3):
        assert resume(recipe_path, tmp_path / "run", Scripted(outcomes=[KeyboardInterrupt()])).interrupted
    last = Scripted(outcomes=["died", KeyboardInterrupt()])
    assert resume(recipe_path, tmp_path / "run", last).failed == ()
    last = Scripted(outcomes=["died"])
    assert resume(recipe_path, tmp_path / "run", last).failed == (0,)
    fails = of_kind(read_journal(tmp_path / "run"), "fail")
    assert [(r["attempt"], r["final"]) for r in fails] == [(4, False), (6, True)]


def test_a_stopper_is_where_it_was_after_a_resume(recipe_path: Path, tmp_path: Path) -> None:
    outcomes: list[Any] = [[0.4, 0.4], [0.2, 0.2], [0.3, 0.1], [0.1, 0.5], [0.5, 0.5], [0.31, 0.0]]
    whole, resumed = Median(), Median()
    start(recipe_path, tmp_path / "whole", Scripted(outcomes=list(outcomes)), stopper=whole)
    lives = [*outcomes[:3], KeyboardInterrupt()]
    start(recipe_path, tmp_path / "run", Scripted(outcomes=lives), stopper=Median())
    resume(recipe_path, tmp_path / "run", Scripted(outcomes=outcomes[3:]), stopper=resumed)
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert resumed.values == whole.values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"searcher": ToySearcher(ToySpace(3))}, "space must be what the search began with, .*'sites': 2.*'sites': 3"),
        ({"searcher": ToySearcher(ToySpace(), seed=1)}, "searcher must be what the search began with"),
        ({"searcher": ToySearcher(ToySpace(), batch_size=3)}, "searcher must be what the search began with"),
        ({"searcher_name": "other"}, "searcher must be what the search began with"),
        ({"stopper": Median()}, "stopper must be what the search began with, None, got .*median"),
        ({"trials": 5}, "trials, which can only be raised, must be at least 6, got 5"),
    ],
)
def test_resuming_with_something_else_is_refused(
    recipe_path: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    start(recipe_path, tmp_path / "run", Scripted(outcomes=[0.5, KeyboardInterrupt()]))
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    runner = Scripted()
    with pytest.raises(ValueError, match=message):
        resume(recipe_path, tmp_path / "run", runner, **change)
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before
    assert runner.closed
    assert not runner.submitted
    resume(recipe_path, tmp_path / "run")  # and the lock is free


def test_a_changed_recipe_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    start(recipe_path, tmp_path / "run")
    with recipe_path.open("a") as file:
        file.write("\n")
    with pytest.raises(
        ReplayError, match="recipe.sha256 .the recipe's file has changed: put it back, or begin another search. must be"
    ):
        resume(recipe_path, tmp_path / "run")


class Drifting(ToySearcher):
    """Proposes something else for trial 3 than its parent."""

    def propose(self, number: int) -> Any:
        proposal = super().propose(number)
        if number != 3:
            return proposal
        assert proposal.log_prob is not None
        return dataclasses.replace(proposal, log_prob=proposal.log_prob + 1e-15)


def test_a_searcher_that_does_not_repeat_itself_is_an_error(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the last bit of one number; the message names the trial, and what differs in the environment."""
    start(recipe_path, tmp_path / "run", trials=6)
    searcher = Drifting(ToySpace())
    with pytest.raises(
        ReplayError, match="does not repeat .* line 9 .* log_prob .* for trial 3, .* no version differs"
    ):
        resume(recipe_path, tmp_path / "run", searcher=searcher, searcher_name="ToySearcher", trials=9)
    monkeypatch.setattr(replay, "versions", lambda packages: {"torch": "3.0"})
    with pytest.raises(ReplayError, match="torch was 2.*, is 3.0"):
        resume(recipe_path, tmp_path / "run", searcher=searcher, searcher_name="ToySearcher", trials=9)


def test_a_stopper_that_does_not_repeat_itself_is_an_error(recipe_path: Path, tmp_path: Path) -> None:
    class Wayward(Median):
        def report(self, number: int, step: int, value: float) -> bool:
            return False

    start(recipe_path, tmp_path / "run", Scripted(outcomes=[[0.1]]), trials=1, stopper=Median())
    with pytest.raises(ReplayError, match="line 3 of the journal holds to go on: True, and now it gives False"):
        resume(recipe_path, tmp_path / "run", stopper=Wayward())


def test_another_environment_is_said(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(recipe_path, tmp_path / "run", trials=2)
    monkeypatch.setattr(driver, "versions", lambda packages: {"torch": "3.0"})
    monkeypatch.setattr(replay, "versions", lambda packages: {"torch": "3.0"})
    resume(recipe_path, tmp_path / "run")
    resume(recipe_path, tmp_path / "run")
    first, second = of_kind(read_journal(tmp_path / "run"), "resume")
    assert len(first["notices"]) == 1
    assert "goes on in another environment" in first["notices"][0]
    assert second["notices"] == []


def test_what_a_searcher_depends_on_is_recorded_and_compared(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def versions_of(*names: str) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in names}

    def tpe() -> TPESearcher:
        return TPESearcher(ToySpace())

    with monkeypatch.context() as patch:
        patch.setattr(TPESearcher, "packages", ())  # as it was recorded before it was asked for
        start(recipe_path, tmp_path / "run", searcher=tpe(), trials=2)
    resume(recipe_path, tmp_path / "run", searcher=tpe(), trials=3)
    other = {"optuna": "9.9"}
    monkeypatch.setattr(replay, "version", lambda name: other.get(name) or importlib.metadata.version(name))
    resume(recipe_path, tmp_path / "run", searcher=tpe(), trials=4)
    records = read_journal(tmp_path / "run")
    assert "optuna" not in records[0]["versions"]
    first, second = of_kind(records, "resume")
    assert versions_of("optuna", "numpy").items() <= first["versions"].items()
    assert first["notices"] == []
    optuna = importlib.metadata.version("optuna")
    assert second["notices"] == [f"goes on in another environment: optuna was {optuna}, is 9.9"]
    assert second["versions"]["optuna"] == "9.9"


def damage_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def damage_state(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)


def another_schema(path: Path) -> None:
    head, _, state = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps({**json.loads(head), "schema": 2}).encode() + b"\n" + state)


def another_journal(path: Path) -> None:
    head, _, state = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps({**json.loads(head), "journal": "0" * 64}).encode() + b"\n" + state)


def longer_journal(path: Path) -> None:
    head, _, state = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps({**json.loads(head), "records": 1000}).encode() + b"\n" + state)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_tail, "it is incomplete or damaged"),
        (damage_state, "it is incomplete or damaged"),
        (another_schema, "it has schema 2"),
        (another_journal, "it is of another journal"),
        (longer_journal, "it is of another journal"),
        (lambda path: path.write_bytes(b""), "its first line is damaged"),
        (lambda path: path.write_bytes(b"[1]\n"), "its first line is damaged"),
        (Path.unlink, None),
    ],
)
def test_snapshots_that_do_not_fit_are_not_used_and_that_is_said(
    recipe_path: Path, tmp_path: Path, damage: Any, reason: str | None
) -> None:
    whole, resumed = ToySearcher(ToySpace()), ToySearcher(ToySpace())
    start(recipe_path, tmp_path / "whole", searcher=whole, trials=12)
    start(recipe_path, tmp_path / "run", trials=8, snapshot_seconds=0)
    damage(tmp_path / "run" / "snapshot.pt")
    resume(recipe_path, tmp_path / "run", searcher=resumed, trials=12)
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert resumed.state_dict() == whole.state_dict()
    (record,) = of_kind(read_journal(tmp_path / "run"), "resume")
    if reason is None:
        assert record["notices"] == []
    else:
        assert len(record["notices"]) == 1
        assert record["notices"][0].startswith(f"the snapshot was not used, and the whole journal replayed: {reason}")


class Picky(ToySearcher):
    """Takes half of a foreign state before it finds out."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lost = state["lost"]
        self.means = [list(means) for means in state["averages" if state["means"][0] != [0.0, 0.0] else "means"]]


def test_a_state_that_the_searcher_does_not_take_is_not_used(recipe_path: Path, tmp_path: Path) -> None:
    whole, resumed = ToySearcher(ToySpace()), Picky(ToySpace())
    start(recipe_path, tmp_path / "whole", searcher=whole, trials=12)
    start(recipe_path, tmp_path / "run", trials=8, snapshot_seconds=0)
    resume(recipe_path, tmp_path / "run", searcher=resumed, searcher_name="ToySearcher", trials=12)
    assert resumed.state_dict() == whole.state_dict()
    (record,) = of_kind(read_journal(tmp_path / "run"), "resume")
    assert "the searcher does not take its state ('averages')" in record["notices"][0]


def test_resuming_from_a_snapshot_replays_only_the_rest(recipe_path: Path, tmp_path: Path) -> None:
    proposed: list[int] = []

    class Counting(ToySearcher):
        def propose(self, number: int) -> Any:
            proposed.append(number)
            return super().propose(number)

    start(recipe_path, tmp_path / "run", trials=20, snapshot_seconds=0)
    resume(recipe_path, tmp_path / "run", searcher=Counting(ToySpace()), searcher_name="ToySearcher", trials=22)
    assert proposed == [20, 21]


def test_an_update_that_was_never_recorded_is_recorded_first(recipe_path: Path, tmp_path: Path) -> None:
    """The driver died between the tell and its update."""
    start(recipe_path, tmp_path / "run", trials=2)
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    resume(recipe_path, tmp_path / "run")
    records = read_journal(tmp_path / "run")
    assert kinds(records) == ["run", "ask", "tell", "ask", "tell", "update", "resume"]
    assert {**records[5], "time": 0} == {**json.loads(lines[-1][:-21] + b"}"), "time": 0}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 2, 3, 4, 6], "line 6 of the journal holds a record of kind 'ask' where that of update 0 is due"),
        ([0, 1, 5], "line 3 of the journal holds a record of kind 'update' where no update is due"),
        ([0, 1, 2, 4, 3, 5], "line 4 of the journal does not fit those before: .* got 1, which was never asked"),
        ([0, 1, 2, 2], "line 4 of the journal does not fit those before: .* got 0, which is told or failed already"),
        ([0, 3], "line 2 of the journal holds trial 1 for trial 1, and now it gives 0"),
    ],
)
def test_records_in_an_order_that_no_search_writes_are_refused(
    recipe_path: Path, tmp_path: Path, order: list[int], message: str
) -> None:
    """Lines that are whole, but were moved, doubled or taken away."""
    start(recipe_path, tmp_path / "run", trials=4)
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[index] for index in order))
    with pytest.raises(ReplayError, match=message):
        resume(recipe_path, tmp_path / "run")


def test_a_full_disk_ends_the_search_and_it_can_be_resumed(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = ToySearcher(ToySpace()), ToySearcher(ToySpace())
    start(recipe_path, tmp_path / "whole", searcher=whole, trials=60)
    genuine = os.write
    budget = [4000]

    def write(file: int, data: Any) -> int:
        if budget[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = genuine(file, bytes(data)[: budget[0]])
        budget[0] -= done
        return done

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space left on device: the search stops here, and can be resumed"):
            start(recipe_path, tmp_path / "run", trials=60)
    count = len(of_kind(read_journal(tmp_path / "run"), "tell"))
    assert 6 < count < 60
    result = resume(recipe_path, tmp_path / "run", searcher=resumed)
    assert len(result.metrics) == 60
    (record,) = of_kind(read_journal(tmp_path / "run"), "resume")
    assert record["notices"] == []
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert resumed.state_dict() == whole.state_dict()


def test_a_report_that_cannot_be_written_ends_the_search_not_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, body="try:\n    report(1, metric)\nexcept Exception:\n    pass")
    genuine = Journal.append

    def append(self: Journal, record: dict[str, Any]) -> dict[str, Any]:
        if record["record"] == "report":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return genuine(self, record)

    monkeypatch.setattr(Journal, "append", append)
    with pytest.raises(OSError, match="No space left"):
        start(path, tmp_path / "run", trials=2)
    assert kinds(read_journal(tmp_path / "run")) == ["run", "ask"]


def test_sigint_ends_a_training_in_this_process(tmp_path: Path) -> None:
    """A real signal, in the middle of `train` of trial 2."""
    path = write_recipe(tmp_path, body=f"if seed == {trial_seed(0, 2)}:\n    signal.raise_signal(signal.SIGINT)")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result = start(path, tmp_path / "run", trials=4)
    assert result.interrupted
    assert list(result.metrics) == [0, 1]
    assert kinds(read_journal(tmp_path / "run"))[-1] == "ask"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trials": 0}, ValueError, "trials must be at least 1, got 0"),
        ({"trials": 2.0}, TypeError, "trials must be an integer, got 2.0 of type float"),
        ({"retries": -1}, ValueError, "retries must be at least 0, got -1"),
        ({"trials": True}, TypeError, "trials must be an integer"),
    ],
)
def test_bad_arguments_begin_nothing(
    recipe_path: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        start(recipe_path, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_run_is_neither_begun_twice_nor_by_two(recipe_path: Path, tmp_path: Path) -> None:
    start(recipe_path, tmp_path / "run")
    with pytest.raises(JournalError, match="exists: go on with it by resuming"):
        start(recipe_path, tmp_path / "run")
    with Journal.open(tmp_path / "run")[0], pytest.raises(JournalError, match="another process is running this search"):
        resume(recipe_path, tmp_path / "run")
