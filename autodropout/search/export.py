"""Policies from a search: the best of few, retrained with new seeds, as the metric of one trial is mostly luck.

    DIR/policies/best.json          the finalist with the best mean, for `apply_policy` and `table2_cifar.py --policy`
    DIR/policies/finalist-1.json    all finalists, best first; finalist-1 is best

The trials with the best metrics are trained again with seeds that the search has not used, the same for each, and
"off" at every site beside them. Choosing by those means instead of by the trials keeps the lucky ones out; the mean of
the chosen one is still the best of a few, and so a little too good: a comparison needs a further training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..policy import Policy
from ..policy import load_policy
from ..provenance import commit
from .driver import trial_seed
from .history import History
from .history import TrialHistory
from .journal import FILE as JOURNAL
from .replay import versions
from .retraining import FOLDER as RETRAINING
from .retraining import OnProgress
from .retraining import fresh_seeds
from .retraining import retrain
from .run_folder import open_search
from .runners.base import Runner
from .space import SearchSpace
from .statistics import mean_and_half_width
from .statistics import student_t

FOLDER = "policies"
BEST = "best.json"


@dataclass(frozen=True)
class Finalist:
    """A policy that was retrained. `trial`: in which it was found; None for "off" at every site."""

    trial: TrialHistory | None
    policy: Policy
    metrics: tuple[float, ...]


@dataclass(frozen=True)
class Export:
    """`finalists`: best mean first. `off`: the reference. `lost`: candidates of which a retraining failed. `sign`: 1
    where a higher metric is better, else -1.
    """

    seeds: tuple[int, ...]
    finalists: tuple[Finalist, ...]
    off: Finalist
    lost: tuple[TrialHistory, ...]
    sign: int


def export_policies(
    folder: Path,
    runner: Runner,
    top: int,
    seeds: int,
    command: Sequence[str],
    on_progress: OnProgress = lambda done, total: None,
) -> Export:
    """Retrains the best trials of the search in `folder`, and writes the policies.

    Args:
        folder: of the run, which may still be running.
        runner: not yet started; closed at the end.
        top: how many different policies are retrained, at least 1.
        seeds: trainings of each, at least 1.
        command: for the provenance.
        on_progress: called in between with the trainings that are over, and how many there are.

    Raises:
        ValueError: an argument; no trial is finished, or no retraining; the recipe has changed; as `open_search` and
            `retrain`.
        OSError: a file cannot be read or written.
        ImportError: there are intervals to compute, and SciPy is not installed.
    """
    for name, value in (("top", top), ("seeds", seeds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seeds > 1:
        student_t()  # whoever lacks it should hear of that before the trainings
    history, recipe, space = open_search(folder)
    if recipe.sha256 != history.recipe["sha256"]:
        raise ValueError(f"the recipe must be what the search was made with, but {recipe.path} has changed")
    leaders = history.leaders(top + 1)
    policies = [space.decode(trial.choices) for trial in leaders]
    if not policies:
        raise ValueError(f"{folder} has no finished trial to export")
    off = Policy(tuple(replace(site, pattern=None) for site in policies[0].sites))
    # "Off" takes part anyway.
    chosen = [pair for pair in zip(leaders, policies, strict=True) if pair[1] != off][:top]
    if not chosen:
        raise ValueError(f"{folder} has no finished trial but one that drops nothing")
    used = {trial_seed(history.header["seed"], number) for number in range(history.budget)}
    new = fresh_seeds(history.header["seed"], used, seeds)
    metrics = retrain(folder, history, recipe, [off, *(policy for _, policy in chosen)], new, runner, on_progress)
    whole = [tuple(m for m in row if m is not None) for row in metrics]
    if len(whole[0]) < seeds:
        raise ValueError(f"retraining with nothing dropped failed, see {folder / RETRAINING / JOURNAL}")
    finalists = [
        Finalist(trial, policy, row)
        for (trial, policy), row in zip(chosen, whole[1:], strict=True)
        if len(row) == seeds
    ]
    lost = tuple(trial for (trial, _), row in zip(chosen, whole[1:], strict=True) if len(row) < seeds)
    if not finalists:
        raise ValueError(f"of each candidate a retraining failed, see {folder / RETRAINING / JOURNAL}")
    finalists.sort(key=lambda finalist: (-history.sign * sum(finalist.metrics), finalist.trial.number))  # type: ignore[union-attr]
    result = Export(tuple(new), tuple(finalists), Finalist(None, off, whole[0]), lost, history.sign)
    _write(folder / FOLDER, history, space, result, command)
    return result


def difference(finalist: Finalist, other: Finalist) -> tuple[float, float | None]:
    """Mean of the paired differences of the metrics, and half the width of its 95% interval."""
    return mean_and_half_width([a - b for a, b in zip(finalist.metrics, other.metrics, strict=True)])


def exported(folder: Path, history: History, space: SearchSpace) -> list[Policy]:
    """The finalists that are in the folder of a run, best first; empty before an export.

    Those of another search, which was in the folder before, are left out.

    Raises:
        ValueError: a file is not a policy.
        OSError: a file cannot be read.
    """
    numbered = _numbered(folder / FOLDER)
    policies = [load_policy(numbered[number]) for number in sorted(numbered)]
    origin, trials = _plain(_origin(history, space)), [_found(trial) for trial in history.told]
    return [
        policy
        for policy in policies
        if origin.items() <= policy.provenance.items() and policy.provenance.get("trial") in trials
    ]


def _numbered(folder: Path) -> dict[int, Path]:
    """The files of finalists by rank. A file with another name is not ours, to read or to delete."""
    found = ((re.fullmatch(r"finalist-([1-9][0-9]*)\.json", path.name), path) for path in folder.glob("*.json"))
    return {int(match[1]): path for match, path in found if match}


def _write(folder: Path, history: History, space: SearchSpace, result: Export, command: Sequence[str]) -> None:
    """All policies are made before the first file of an earlier export is replaced."""
    policies = {}
    for rank, finalist in enumerate(result.finalists, 1):
        provenance = _provenance(history, space, result, finalist, rank, command)
        policies[folder / f"finalist-{rank}.json"] = replace(finalist.policy, provenance=provenance)
    best = next(iter(policies.values()))
    folder.mkdir(exist_ok=True)
    for path, policy in {folder / BEST: best, **policies}.items():
        policy.save(path)
    for old in set(_numbered(folder).values()) - set(policies):
        old.unlink()


def _provenance(
    history: History, space: SearchSpace, result: Export, finalist: Finalist, rank: int, command: Sequence[str]
) -> dict[str, Any]:
    trial = finalist.trial
    assert trial is not None
    gain, gain_half = difference(finalist, result.off)
    provenance = {
        **_origin(history, space),
        "trials": {"proposed": len(history.trials), "finished": len(history.told), "failed": history.failed},
        "trial": _found(trial),
        "retrained": {
            "rank": rank,
            "of": len(result.finalists),
            "seeds": list(result.seeds),
            "metrics": list(finalist.metrics),
            **_estimate(finalist.metrics),
        },
        "off": {"metrics": list(result.off.metrics), **_estimate(result.off.metrics)},
        "gain_over_off": {"mean": gain, "half_width_95": gain_half},
        "commit": commit(),
        "versions": versions(),
        "commands": [*history.commands, list(command)],
    }
    copy: dict[str, Any] = _plain(provenance)
    return copy


def _origin(history: History, space: SearchSpace) -> dict[str, Any]:
    """The search, as the provenance of what it found has it."""
    header = history.header
    return {
        "kind": "searched",
        "recipe": {"name": history.recipe["name"], "sha256": history.recipe["sha256"]},
        "space": space.fingerprint(),
        "direction": header["direction"],
        "searcher": header["searcher"],
        "seed": header["seed"],
    }


def _found(trial: TrialHistory) -> dict[str, Any]:
    return {"number": trial.number, "metric": trial.metric}


def _estimate(metrics: Sequence[float]) -> dict[str, float | None]:
    mean, half_width = mean_and_half_width(metrics)
    return {"mean": mean, "half_width_95": half_width}


def _plain(value: Any) -> Any:
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(value))
