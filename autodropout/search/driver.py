"""The loop of a search: proposals to workers, results to the searcher, and all of it to the journal first.

An ask is in the journal before its trial is submitted, a result before the searcher is told. So whenever the process
dies, the journal holds all that anyone has acted upon: resuming replays it, submits the unfinished trials again with
the same numbers and seeds, and goes on. With one trial at a time, what follows is bit for bit what would have followed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .core import ALLOWED
from .core import LARGEST
from .core import Search
from .core import Update
from .journal import Journal
from .journal import Record
from .recipe import Recipe
from .replay import Ledger
from .replay import Observer
from .replay import ReplayError
from .replay import Stopper
from .replay import compare_versions
from .replay import replay
from .replay import versions
from .runners.base import Finished
from .runners.base import Outcome
from .runners.base import Runner
from .runners.base import Task
from .searcher import Searcher
from .snapshot import SnapshotError
from .snapshot import read_snapshot
from .snapshot import write_snapshot

# A snapshot is written when the searcher has worked for so long since the last: what resuming has to do again.
SNAPSHOT_SECONDS = 5.0


@dataclass(frozen=True)
class SearchResult:
    """What a driver leaves behind.

    Args:
        folder: of the run.
        trials: that were to be proposed in all.
        metrics: of the finished trials, by number.
        failed: numbers of the trials that failed for good.
        best: number of the finished trial with the best metric, the earliest of equals; None if none is finished. Those
            that were stopped early have no final metric, and are left out.
        interrupted: by Ctrl-C, so that trials are missing.
    """

    folder: Path
    trials: int
    metrics: dict[int, float]
    failed: tuple[int, ...]
    best: int | None
    interrupted: bool


def start_search(
    folder: Path,
    recipe: Recipe,
    searcher: Searcher,
    runner: Runner,
    *,
    trials: int,
    seed: int = 0,
    retries: int = 1,
    stopper: Stopper | None = None,
    observers: Sequence[Observer] = (),
    searcher_name: str | None = None,
    runner_settings: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    snapshot_seconds: float = SNAPSHOT_SECONDS,
) -> SearchResult:
    """Begins a search in `folder` and runs it to its end.

    Args:
        folder: made if needed; must not hold a search.
        recipe: what is trained.
        searcher: a fresh one, for the recipe's space.
        runner: not yet started; closed at the end, whatever that is.
        trials: to propose, failed ones included.
        seed: of the trials, see `trial_seed`.
        retries: how often an attempt that failed is repeated before the trial counts as failed.
        stopper: decides from the reports which trials end early; None: none does.
        observers: each receives all records.
        searcher_name: for the journal; None: the class's name.
        runner_settings: for the journal; None: the class's name and the number of workers.
        command: for the journal; None: that of this process.
        snapshot_seconds: work of the searcher after which its state is saved.

    Raises:
        ValueError: an argument; or the folder holds a search (`JournalError`).
        OSError: the journal cannot be written. What is in it is safe, and the search can be resumed.
    """
    _at_least("trials", trials, 1)
    _at_least("retries", retries, 0)
    with runner:
        header = {
            "recipe": {"name": recipe.name, "path": str(recipe.path), "sha256": recipe.sha256},
            "direction": recipe.direction,
            "space": searcher.space.to_json(),
            "searcher": _searcher_json(searcher, searcher_name),
            "trials": trials,
            "seed": seed,
            "runner": _runner_json(runner, runner_settings),
            "retries": retries,
            "stopper": None if stopper is None else stopper.settings(),
            "versions": versions(searcher.packages),
            "command": list(sys.argv if command is None else command),
        }
        journal, first = Journal.create(folder, header)
        with journal:
            driver = _Driver(journal, first, Search(searcher, recipe.direction), runner, stopper, observers)
            driver.see(first, replayed=False)
            return driver.run(recipe, snapshot_seconds)


def resume_search(
    folder: Path,
    recipe: Recipe,
    searcher: Searcher,
    runner: Runner,
    *,
    trials: int | None = None,
    stopper: Stopper | None = None,
    observers: Sequence[Observer] = (),
    searcher_name: str | None = None,
    runner_settings: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    snapshot_seconds: float = SNAPSHOT_SECONDS,
) -> SearchResult:
    """Goes on with the search in `folder`, to its end; the arguments are those of `start_search`, save

    Args:
        recipe, searcher, stopper: made again as they were for `start_search`; fresh ones. That they are the same is
            checked as far as the journal tells.
        runner: any; the number of workers may be another one.
        trials: more than before; None: as many as before.

    Raises:
        ValueError: an argument; what is made again differs, or does not repeat what it did (`ReplayError`); there is no
            journal, it is in use or damaged (`JournalError`).
        OSError: as for `start_search`.
    """
    with runner:
        journal, records = Journal.open(folder)
        with journal:
            header = records[0]
            _same(
                "recipe.sha256 (the recipe's file has changed: put it back, or begin another search)",
                header["recipe"]["sha256"],
                recipe.sha256,
            )
            _same("recipe.direction", header["direction"], recipe.direction)
            _same("space", header["space"], searcher.space.to_json())
            _same("searcher", header["searcher"], _searcher_json(searcher, searcher_name))
            _same("stopper", header["stopper"], None if stopper is None else stopper.settings())
            driver = _Driver(journal, header, Search(searcher, recipe.direction), runner, stopper, observers)
            update = driver.replay(records)
            before = driver.ledger.trials
            if trials is not None:
                _at_least("trials, which can only be raised,", trials, before)
            if update is not None:
                driver.record_update(update)
            driver.record(
                {
                    "record": "resume",
                    "trials": before if trials is None else trials,
                    # The attempts that were under way died with their driver.
                    "unfinished": [[number, attempt + 1] for number, attempt in driver.ledger.attempts.items()],
                    "notices": driver.notices,
                    "runner": _runner_json(runner, runner_settings),
                    "versions": versions(searcher.packages),
                    "command": list(sys.argv if command is None else command),
                }
            )
            return driver.run(recipe, snapshot_seconds)


def trial_seed(seed: int, number: int) -> int:
    """The seed of trial `number` in a search with `seed`, in [0, 2^31): part of a SHA-256, the same everywhere."""
    return int.from_bytes(hashlib.sha256(repr((seed, number)).encode()).digest()[:4], "big") >> 1


class _Driver:
    def __init__(
        self,
        journal: Journal,
        header: Record,
        search: Search,
        runner: Runner,
        stopper: Stopper | None,
        observers: Sequence[Observer],
    ) -> None:
        self.journal, self.search = journal, search
        self.runner, self.stopper, self.observers = runner, stopper, observers
        self.seed: int = header["seed"]
        self.retries: int = header["retries"]
        self.ledger = Ledger()
        self.notices = list(journal.notices)
        self.running: dict[int, Task] = {}
        self.stopped: set[int] = set()
        self.waiting: deque[int] = deque()
        self.searching = 0.0  # seconds of the searcher's work that no snapshot covers

    def replay(self, records: list[Record]) -> Update | None:
        """See `replay.replay`; from the snapshot, if one fits."""
        covered = 0
        fresh = copy.deepcopy(self.search.state_dict())
        try:
            snapshot = read_snapshot(self.journal)
            if snapshot is not None:
                covered, state = snapshot
                try:
                    self.search.load_state_dict(state)
                except Exception as error:  # whatever a searcher makes of the state of another version
                    covered = 0
                    self.search.load_state_dict(fresh)
                    raise SnapshotError(f"the searcher does not take its state ({error})") from error
        except SnapshotError as error:
            self.notices.append(f"the snapshot was not used, and the whole journal replayed: {error}")
        with self._clock():
            update = replay(records, self.search, self.stopper, covered, lambda record: self.see(record, replayed=True))
        if set(self.ledger.attempts) != set(self.search.unfinished):
            raise ReplayError("the snapshot and the journal differ in which trials are unfinished; delete the snapshot")
        difference = compare_versions(self.ledger.versions, self.search.searcher.packages)
        if difference:
            self.notices.append(f"goes on in another environment: {difference}")
        self.waiting.extend(self.search.unfinished)
        return update

    def see(self, record: Record, *, replayed: bool) -> None:
        self.ledger.add(record)
        if record["record"] == "tell" and record["stopped"] is not None:
            self.stopped.add(record["trial"])
        for observer in self.observers:
            observer(record, replayed)

    def record(self, record: Record) -> None:
        """On disk first, then to everyone else."""
        self.see(self.journal.append(record), replayed=False)

    def record_update(self, update: Update) -> None:
        fields = {"update": update.number, "trials": list(update.trials), "ages": list(update.ages)}
        self.record({"record": "update", **fields, "figures": _finite(update.figures)})

    def run(self, recipe: Recipe, snapshot_seconds: float) -> SearchResult:
        interrupted = False
        try:
            self.runner.start(str(recipe.path), self._on_report)
            self._fill()
            while self.running:
                for outcome in self.runner.wait(None):
                    self._end(outcome)
                    self._fill()
                    if self.searching >= snapshot_seconds:
                        write_snapshot(self.journal, self.search)
                        self.searching = 0.0
        except KeyboardInterrupt:
            interrupted = True
        ledger, sign = self.ledger, 1 if recipe.direction == "max" else -1
        whole = ledger.metrics.keys() - self.stopped
        best = max(whole, key=lambda number: (sign * ledger.metrics[number], -number), default=None)
        folder = self.journal.path.parent
        return SearchResult(folder, ledger.trials, ledger.metrics, tuple(ledger.failed), best, interrupted)

    def _fill(self) -> None:
        """Gives every free worker a task: unfinished trials first."""
        while len(self.running) < self.runner.slots:
            if self.waiting:
                number = self.waiting.popleft()
            elif self.search.asked < self.ledger.trials:
                number = self._ask()
            else:
                return
            policy = self.search.searcher.space.decode(self.search.unfinished[number].choices)
            task = Task(number, self.ledger.attempts[number], policy.to_json(), trial_seed(self.seed, number))
            self.running[number] = task
            self.runner.submit(task)

    def _ask(self) -> int:
        with self._clock():
            trial = self.search.ask()
        fields = {"choices": list(trial.choices), "log_prob": trial.log_prob, "update": trial.update}
        self.record({"record": "ask", "trial": trial.number, **fields})
        return trial.number

    def _on_report(self, number: int, step: int, value: float) -> bool:
        go_on = self.stopper is None or self.stopper.report(number, step, value)
        fields = {"attempt": self.running[number].attempt, "step": step, "value": value, "go_on": go_on}
        self.record({"record": "report", "trial": number, **fields})
        return go_on

    def _end(self, outcome: Outcome) -> None:
        task = self.running.pop(outcome.task.number)
        number, seconds = task.number, round(outcome.seconds, 3)
        if isinstance(outcome, Finished) and abs(outcome.metric) <= LARGEST:
            fields = {"metric": float(outcome.metric), "seconds": seconds, "stopped": outcome.stopped}
            self.record({"record": "tell", "trial": number, **fields})
            with self._clock():
                update = self.search.tell(number, outcome.metric)
            if update is not None:
                self.record_update(update)
            return
        if isinstance(outcome, Finished):
            kind, message = "raised", f"the metric must be {ALLOWED}, got {outcome.metric}"
        else:
            kind, message = outcome.kind, outcome.message
        final = self.ledger.failures[number] >= self.retries
        failure = {"attempt": task.attempt, "kind": kind, "message": message, "seconds": seconds, "final": final}
        self.record({"record": "fail", "trial": number, **failure})
        if final:
            with self._clock():
                self.search.fail(number)
        else:
            self.waiting.append(number)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.searching += time.perf_counter() - begun


def _searcher_json(searcher: Searcher, name: str | None) -> dict[str, Any]:
    return {"name": type(searcher).__name__ if name is None else name, **searcher.settings()}


def _runner_json(runner: Runner, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"kind": type(runner).__name__, "workers": runner.slots} if settings is None else dict(settings)


def _same(name: str, recorded: object, now: object) -> None:
    now = json.loads(json.dumps(now))  # as the journal holds it: lists for tuples
    if recorded != now:
        raise ReplayError(f"{name} must be what the search began with, {recorded!r}, got {now!r}")


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _finite(value: Any) -> Any:
    """The value as JSON has it: null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
