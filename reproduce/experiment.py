"""Tunes every method, trains the final models, and keeps what is done: the same command goes on where it stopped.

    runs/<name>-<key>/run.json       the settings behind the key, and the name of this run's file in results/
    runs/<name>-<key>/<model>.pt     checkpoint of a model in training, removed when it is finished
    runs/<name>-<key>/<model>.json   record of a finished model
    results/<name>-<date>-<key>.jsonl   the records, one line a model; written here and never read. A number that is
                                        not finite is a string there, "inf", because JSON has none

Keys are hashes of everything that determines a result, the source files included: changed code trains anew. A record
is stored under runs/ first and then appended to results/; at every start that file is rewritten, whole and atomically,
from the records. So a line is neither lost nor doubled whenever the process is killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import os
import platform
import time
from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from filelock import Timeout

from autodropout import Policy
from autodropout.files import write_atomically
from autodropout.provenance import commit

from .methods import policy_origin

SCHEMA = 1
# Seeds of tuning are far from those of the final models, whose seeds begin at 0.
TUNING_SEED = 1000
# What only shows results; everything else in the package may change one.
PRESENTATION = ("report.py", "results_page.py", "draw.py", "cli.py")
PACKAGES = ("autodropout", "autodropout.kernels", "autodropout.reproduce")


class RunError(ValueError):
    """The experiment cannot start; the message is one line for the user."""


@dataclass(frozen=True)
class Settings:
    """One experiment.

    Args:
        name, preset: of the script.
        recipe: what determines a training besides data, policy and seed: a dataclass with a field `epochs`.
        methods: compared.
        seeds: final models of each method.
        tuning_seeds: models of each strength that is tried.
        final_on_all: whether the final models are trained on training and validation data together.
        policy_name, policy: of the method "autodropout", also where it is a part of another ("uda+autodropout").
    """

    name: str
    preset: str
    recipe: Any
    methods: tuple[str, ...]
    seeds: int
    tuning_seeds: int
    final_on_all: bool
    policy_name: str
    policy: Policy


@dataclass(frozen=True)
class Job:
    """One model to train. `phase` "tune" is measured on the validation data, "final" on the test data."""

    phase: str
    method: str
    strength: float | None
    seed: int


@dataclass(frozen=True)
class Trained:
    """`value`: of the task's metric. `figures`: others to record. `arguments`: what of the data was used, to record."""

    value: float
    seconds: float
    arguments: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Final values of one method at its tuned strength, by seed 0, 1, ...; `records`: what else is known of each."""

    method: str
    strength: float | None
    values: tuple[float, ...]
    records: tuple[dict[str, Any], ...] = field(default=(), compare=False)  # with times


class Task(ABC):
    """What an experiment trains, and on what.

    Attributes:
        settings: of the experiment.
        title, fingerprint: of the data.
        metric: its name in the records.
        larger_is_better: of the metric.
        strengths: what is tried for each method; none for one that has nothing to tune.
        labels: how many, or what share, of the training images have one; None: all, or the task has no labels.
    """

    settings: Settings
    title: str
    fingerprint: str
    metric: str
    larger_is_better: bool
    strengths: Mapping[str, tuple[float, ...]]
    labels: float | None = None

    @abstractmethod
    def applied(self, job: Job) -> object:
        """What the method of a job puts on the network, as JSON: it determines the model, with the job."""

    @abstractmethod
    def try_policy(self, method: str, strength: float | None) -> None:
        """Puts the policy of a method at a strength on a network that is not kept.

        Raises:
            TypeError, ValueError: it does not fit there.
        """

    def check_policies(self) -> None:
        """Tries every policy of the experiment once, so that a refusal comes before any training.

        Raises:
            RunError: naming method, strength and what is refused.
        """
        for method in self.settings.methods:
            for strength in self.strengths[method] or (None,):
                try:
                    self.try_policy(method, strength)
                except (ValueError, TypeError) as error:
                    raise RunError(f"{method} at strength {strength}: {' '.join(str(error).split())}") from error

    @abstractmethod
    def train(self, job: Job, device: torch.device, checkpoint: Path, on_epoch: Callable[[], None]) -> Trained:
        """Trains a model, or on from `checkpoint` if that file exists, which is left there.

        `on_epoch` is called after every epoch of the recipe, and once for each that the checkpoint has behind it.
        """


class Experiment:
    """Runs one `Task`, in `folder` (the current directory's runs/ and results/).

    Raises:
        RunError: the same experiment is being run by another process.
    """

    def __init__(self, task: Task, device: torch.device, folder: Path = Path()) -> None:
        self.task, self.device = task, device
        self.settings = settings = task.settings
        shared = {
            "schema": SCHEMA,
            "recipe": dataclasses.asdict(settings.recipe),
            "data": task.fingerprint,
            "labels": task.labels,
            "final_on_all": settings.final_on_all,
            "policy": settings.policy.to_json(),
            "versions": versions(),
            "source": source_fingerprint(),
            # Kernels, and so the last bits, differ between processors and numbers of threads.
            "device": device_name(device),
            "threads": torch.get_num_threads(),
        }
        self.shared = shared
        key = _key(shared)
        self.runs = folder / "runs" / f"{settings.name}-{key}"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.runs / "lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"another process is running this experiment (it holds {self.runs / 'lock'})") from None
        state = self.runs / "run.json"
        if not state.exists():
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            _write_json(state, {"results": f"{settings.name}-{stamp}-{key}.jsonl", **shared})
        self.results = folder / "results" / json.loads(state.read_text(encoding="utf-8"))["results"]
        stored = [json.loads(path.read_text(encoding="utf-8")) for path in self.runs.glob("*.json") if path != state]
        self.records: dict[str, dict[str, Any]] = {
            record["key"]: record for record in sorted(stored, key=lambda record: record["number"])
        }
        for key in self.records:  # left over by a kill between the record and the removal
            (self.runs / f"{key}.pt").unlink(missing_ok=True)
        if self.records:
            self._rewrite_results()

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def tuning_jobs(self) -> list[Job]:
        """The same number of trials for every method that has a strength."""
        seeds = range(TUNING_SEED, TUNING_SEED + self.settings.tuning_seeds)
        return [
            Job("tune", method, strength, seed)
            for method in self.settings.methods
            for strength in self.task.strengths[method]
            for seed in seeds
        ]

    def model_count(self) -> int:
        """Models of the whole experiment, finished ones included."""
        return len(self.tuning_jobs()) + len(self.settings.methods) * self.settings.seeds

    def run(self, on_model: Callable[[Job], None], on_epoch: Callable[[], None]) -> list[Result]:
        """Trains what is not yet done and returns the results in the order of the methods.

        `on_model` is called before each model, `on_epoch` once per epoch, both also for those already done.
        """

        def train(job: Job) -> dict[str, Any]:
            on_model(job)
            return self.record(job, on_epoch)

        metric = self.task.metric
        trials = {job: train(job)[metric] for job in self.tuning_jobs()}
        chosen = {method: self._best(method, trials) for method in self.settings.methods}
        # Seed by seed, so that what an interrupted run has is paired.
        jobs = [Job("final", m, chosen[m], seed) for seed in range(self.settings.seeds) for m in self.settings.methods]
        finals = {job: train(job) for job in jobs}
        results = []
        for method in self.settings.methods:
            records = tuple(record for job, record in finals.items() if job.method == method)
            values = tuple(record[metric] for record in records)
            results.append(Result(method, chosen[method], values, records))
        return results

    def record(self, job: Job, on_epoch: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The record of one model: kept, or made by training it now."""
        key = _key({**self.shared, "job": dataclasses.asdict(job), "applied": self.task.applied(job)})
        if key in self.records:
            for _ in range(self.settings.recipe.epochs):
                on_epoch()
        else:
            checkpoint = self.runs / f"{key}.pt"
            trained = self.task.train(job, self.device, checkpoint, on_epoch)
            self._store(self._record(job, key, trained))
            checkpoint.unlink()
        return self.records[key]

    def _record(self, job: Job, key: str, trained: Trained) -> dict[str, Any]:
        settings = self.settings
        return {
            "schema": SCHEMA,
            "key": key,
            "number": len(self.records),
            "experiment": settings.name,
            "preset": settings.preset,
            "phase": job.phase,
            "method": job.method,
            "policy": settings.policy_name if job.method.endswith("autodropout") else None,
            "policy_origin": policy_origin(settings.policy) if job.method.endswith("autodropout") else None,
            "strength": job.strength,
            "seed": job.seed,
            "metric": self.task.metric,
            "split": "validation" if job.phase == "tune" else "test",
            self.task.metric: trained.value,
            **trained.figures,
            "arguments": {
                **dataclasses.asdict(settings.recipe),
                **trained.arguments,
                "final_on_all": settings.final_on_all,
            },
            "data": {"title": self.task.title, "fingerprint": self.task.fingerprint},
            "seconds": round(trained.seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": self.shared["versions"],
            "device": self.shared["device"],
            "threads": self.shared["threads"],
            "source": self.shared["source"],
            "commit": commit(),
        }

    def _best(self, method: str, trials: dict[Job, float]) -> float | None:
        """The strength with the best mean on the validation data; the weaker of equals."""
        strengths = self.task.strengths[method]
        if not strengths:
            return None
        totals = dict.fromkeys(sorted(strengths), 0.0)
        for job, value in trials.items():
            if job.method == method and job.strength is not None:
                better = value if self.task.larger_is_better else -value
                totals[job.strength] += better if math.isfinite(better) else -math.inf  # a training that diverged
        # Sums of equal results may differ in their last bits.
        return max(totals, key=lambda strength: round(totals[strength], 9))

    def _store(self, record: dict[str, Any]) -> None:
        _write_json(self.runs / f"{record['key']}.json", record)
        self.records[record["key"]] = record
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.results, "ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def _rewrite_results(self) -> None:
        self.results.parent.mkdir(parents=True, exist_ok=True)
        lines = b"".join(_line(record) for record in self.records.values())
        write_atomically(self.results, lambda file: file.write(lines))


def source_fingerprint(packages: Sequence[str] = PACKAGES) -> str:
    """SHA-256 (hex) of the Python and JSON files of the packages, without those that only show results."""
    digest = hashlib.sha256()
    for package in packages:
        root = Path(importlib.import_module(package).__path__[0])
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
            if path.name not in PRESENTATION:
                digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of Python and the packages that take part in a training."""
    names = (
        "autodropout",
        "torch",
        "torchvision",
        "numpy",
        "scikit-learn",
        "datasets",
        "pillow",
        "tokenizers",
        "sacrebleu",
    )
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu" with the instruction set that PyTorch's kernels use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _key(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(_strict(record), allow_nan=False).encode() + b"\n"


def _strict(value: Any) -> Any:
    """With a string for each number that is not finite, which `float` reads."""
    if isinstance(value, dict):
        return {name: _strict(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))
