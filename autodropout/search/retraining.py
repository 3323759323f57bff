"""Trains policies again with seeds that the search has not used, and keeps what is done in a journal of its own.

    DIR/retraining/journal.jsonl    {"record": "retrained", "policy": KEY, "seed": S, "metric": M, "seconds": T, ...}

The same policies and seeds a second time cost nothing: what is in the journal is not trained again.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..policy import Policy
from .history import History
from .journal import FILE
from .journal import Journal
from .journal import JournalError
from .journal import Record
from .recipe import Recipe
from .runners.base import Failed
from .runners.base import Finished
from .runners.base import Outcome
from .runners.base import Runner
from .runners.base import Task

FOLDER = "retraining"

# Told before the first outcome and after each: how many trainings are over, and how many there are.
OnProgress = Callable[[int, int], None]


def fresh_seeds(seed: int, used: set[int], count: int) -> list[int]:
    """The first `count` seeds in [0, 2^31) of a sequence that `seed` determines, without those that are used."""
    found: list[int] = []
    number = 0
    while len(found) < count:
        digest = hashlib.sha256(repr((seed, "retraining", number)).encode()).digest()
        candidate = int.from_bytes(digest[:4], "big") >> 1
        if candidate not in used and candidate not in found:
            found.append(candidate)
        number += 1
    return found


def retrain(
    folder: Path,
    history: History,
    recipe: Recipe,
    policies: Sequence[Policy],
    seeds: Sequence[int],
    runner: Runner,
    on_progress: OnProgress = lambda done, total: None,
) -> list[list[float | None]]:
    """The metrics of each policy, by seed; None where every attempt failed.

    Seed by seed, so that what an interrupted run leaves is paired.

    Args:
        folder: of the search.
        history: of the search: its retries are used.
        recipe: of the search.
        policies: different ones.
        seeds: different ones.
        runner: not yet started; closed at the end.
        on_progress: called in between.

    Raises:
        JournalError: the journal of the retraining is damaged, in use, or of another recipe.
        OSError: it cannot be written.
    """
    with runner:
        journal, records = _open(folder / FOLDER, recipe)
        with journal:
            keys = [_key(policy) for policy in policies]
            done = {(r["policy"], r["seed"]): r["metric"] for r in records if r["record"] == "retrained"}
            jobs = [(i, seed) for seed in seeds for i in range(len(policies))]
            missing = [job for job in jobs if (keys[job[0]], job[1]) not in done]
            over = len(jobs) - len(missing)
            on_progress(over, len(jobs))
            if missing:
                runner.start(str(recipe.path), lambda number, step, value: True)
            waiting = deque(Task(number, 0, policies[i].to_json(), seed) for number, (i, seed) in enumerate(missing))
            running = 0
            while waiting or running:
                while waiting and running < runner.slots:
                    runner.submit(waiting.popleft())
                    running += 1
                for outcome in runner.wait(None):
                    running -= 1
                    task = outcome.task
                    i, seed = missing[task.number]
                    journal.append(_record(keys[i], seed, outcome))
                    if isinstance(outcome, Finished):
                        done[keys[i], seed] = outcome.metric
                    elif task.attempt < history.header["retries"]:
                        waiting.append(Task(task.number, task.attempt + 1, task.policy, seed))
                        continue
                    over += 1
                    on_progress(over, len(jobs))
    return [[done.get((key, seed)) for seed in seeds] for key in keys]


def _open(folder: Path, recipe: Recipe) -> tuple[Journal, list[Record]]:
    header = {"recipe": {"name": recipe.name, "path": str(recipe.path), "sha256": recipe.sha256}}
    if (folder / FILE).exists():
        journal, records = Journal.open(folder)
        found = records[0]["recipe"]["sha256"]
        if found != recipe.sha256:
            journal.close()
            # Its policies and seeds can be those of this search, and its metrics are not.
            raise JournalError(
                f"{folder / FILE} is of another recipe than the search: its sha256 is {found[:12]}..., and that of "
                f"{recipe.path} is {recipe.sha256[:12]}...; move it away, then export again"
            )
        return journal, records
    journal, first = Journal.create(folder, header)
    return journal, [first]


def _record(key: str, seed: int, outcome: Outcome) -> dict[str, Any]:
    shared = {"policy": key, "seed": seed, "attempt": outcome.task.attempt, "seconds": round(outcome.seconds, 3)}
    if isinstance(outcome, Failed):
        return {"record": "fail", **shared, "kind": outcome.kind, "message": outcome.message}
    return {"record": "retrained", **shared, "metric": float(outcome.metric)}


def _key(policy: Policy) -> str:
    """16 hexadecimal digits that stand for the sites and patterns."""
    return hashlib.sha256(json.dumps(policy.to_json()["sites"], sort_keys=True).encode()).hexdigest()[:16]
