"""From a journal back to the search that wrote it: the same calls again, and each proposal compared with the record."""

from __future__ import annotations

import platform
from collections.abc import Callable
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any
from typing import Protocol

import torch

from .core import Search
from .core import Update
from .journal import Record

# Receives every record of a run: first those of an earlier life (True: replayed), then each as it is written (False).
Observer = Callable[[Record, bool], None]


class ReplayError(ValueError):
    """The journal and the search do not fit; the message is one line for the user."""


class Stopper(Protocol):
    """Decides from the reports of all trials which one is not worth going on with: see `asha.Asha`.

    The same reports in the same order get the same answers. A further attempt at a trial reports the same steps again.
    """

    def report(self, number: int, step: int, value: float) -> bool:
        """Whether trial `number`, which has come to `value` at `step`, goes on."""

    def settings(self) -> dict[str, Any]:
        """What determines it, JSON values by name: recorded, compared when resumed."""


class Ledger:
    """What the records say of trials, besides what the search itself knows of them.

    Attributes:
        trials: to be proposed in all.
        attempts: the next attempt of each unfinished trial, by number.
        failures: failed attempts of each unfinished trial, by number; those that died with their driver do not count.
        metrics: of finished trials, by number.
        failed: trials that have failed for good.
        versions: of the driver that wrote last, see `versions`.
    """

    def __init__(self) -> None:
        self.trials = 0
        self.attempts: dict[int, int] = {}
        self.failures: dict[int, int] = {}
        self.metrics: dict[int, float] = {}
        self.failed: list[int] = []
        self.versions: dict[str, str] = {}

    def add(self, record: Record) -> None:
        """Takes the next record into account."""
        kind, number = record["record"], record.get("trial", -1)
        if kind in ("run", "resume"):
            self.trials = record["trials"]
            self.versions = record["versions"]
            self.attempts.update(dict(record.get("unfinished", ())))
        elif kind == "ask":
            self.attempts[number] = self.failures[number] = 0
        elif kind == "fail":
            self.attempts[number] = record["attempt"] + 1
            self.failures[number] += 1
            if record["final"]:
                self._end(number)
                self.failed.append(number)
        elif kind == "tell":
            self._end(number)
            self.metrics[number] = record["metric"]

    def _end(self, number: int) -> None:
        del self.attempts[number], self.failures[number]


def replay(
    records: Sequence[Record],
    search: Search,
    stopper: Stopper | None = None,
    covered: int = 0,
    on_record: Callable[[Record], None] = lambda record: None,
) -> Update | None:
    """Brings `search` and `stopper` to where they were after the records.

    Args:
        records: of a journal, from its first.
        search: a fresh one; or one with the state after the first `covered` records, which it is not told again.
        stopper: a fresh one.
        covered: see `search`.
        on_record: called with every record.

    Returns:
        The update that followed from the last record, if its own record was never written.

    Raises:
        ReplayError: the search makes another proposal or update than the recorded one, or the stopper another decision,
            or the records are not in an order that a search writes.
    """
    update: Update | None = None
    for line, record in enumerate(records, 1):
        kind = record["record"]
        if line > covered:
            if (kind == "update") != (update is not None):
                due = "no update is due" if update is None else f"that of update {update.number} is due"
                raise ReplayError(f"line {line} of the journal holds a record of kind {kind!r} where {due}")
            try:
                update = _search_again(line, record, records, search, update)
            except KeyError as error:
                raise ReplayError(f"line {line} of the journal does not fit those before: {error.args[0]}") from error
        if kind == "report" and stopper is not None:
            go_on = stopper.report(record["trial"], record["step"], record["value"])
            if go_on != record["go_on"]:
                raise _difference(line, records, search, f"to go on: {record['go_on']}", f"{go_on}")
        on_record(record)
    return update


def _search_again(
    line: int, record: Record, records: Sequence[Record], search: Search, update: Update | None
) -> Update | None:
    kind = record["record"]
    if kind == "ask":
        trial = search.ask()
        now = {"choices": list(trial.choices), "log_prob": trial.log_prob, "update": trial.update}
        for name, value in {"trial": trial.number, **now}.items():
            if value != record[name]:
                raise _difference(
                    line, records, search, f"{name} {record[name]} for trial {record['trial']}", f"{value}"
                )
    elif kind == "tell":
        return search.tell(record["trial"], record["metric"])
    elif kind == "fail" and record["final"]:
        search.fail(record["trial"])
    elif kind == "update":
        assert update is not None
        recorded = (record["update"], tuple(record["trials"]), tuple(record["ages"]))
        if recorded != (update.number, update.trials, update.ages):
            what = "update {}, of trials {} with ages {}".format(*recorded)
            raise _difference(line, records, search, what, f"{update.number}, {update.trials}, {update.ages}")
    return None


def _difference(line: int, records: Sequence[Record], search: Search, recorded: str, now: str) -> ReplayError:
    recorded_versions = next(r["versions"] for r in reversed(records[:line]) if r["record"] in ("run", "resume"))
    difference = compare_versions(recorded_versions, search.searcher.packages)
    return ReplayError(
        f"the search does not repeat what it did: line {line} of the journal holds {recorded}, and now it gives {now}. "
        f"Versions, machine or code must differ from those of the run: {difference or 'no version differs'}"
    )


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """What the last bits of a searcher's state can depend on; `packages`: see `Searcher`."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "autodropout": version("autodropout"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()} {capability}",
        **{name: version(name) for name in packages},
    }


def compare_versions(recorded: dict[str, str], packages: Sequence[str] = ()) -> str:
    """One line: which of the recorded versions are others in this process; empty if none is."""
    now = versions(packages)
    different = [name for name in sorted(recorded) if recorded[name] != now.get(name)]
    return "; ".join(f"{name} was {recorded[name]}, is {now.get(name)}" for name in different)
