"""Trials on a Ray cluster: many machines, or one with several GPUs. Needs the extra `ray`."""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from ...patterns.checks import integer
from .attempt import attempt
from .attempt import load
from .base import Failed
from .base import OnReport
from .base import Outcome
from .base import Runner
from .base import Task
from .guard import Guard

OBJECT_STORE_BYTES = 128 << 20  # of a local cluster; only policies, reports and outcomes are exchanged


class RayRunner(Runner):
    """Trains in actors, each with the given resources of one node. A dead, late or memory-starved actor is replaced.

    The content of the recipe's file travels to the nodes: one where the same content is at the same path loads that,
    so that the recipe may read files beside it, any other a copy. Everything that the recipe imports, this package
    included, must be installed on every node. What trials write to stdout and stderr is in Ray's logs.

    Args:
        workers: how many actors, at least 1.
        cpus_per_trial: cores of each, above 0; torch gets `max(1, int(cpus_per_trial))` threads.
        gpus_per_trial: GPUs of each, which Ray chooses and makes the only visible ones; may be a fraction.
        address: "auto" for the cluster that this machine is part of, or `host:port`. None: a cluster of this machine
            alone is started, and ended at `close`; as many actors run on its CPU as are asked for, whatever it has.
        timeout: seconds that an attempt may take, counted from when its actor begins; then the actor is killed.

    Raises:
        ImportError: Ray is not installed.
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        workers: int,
        cpus_per_trial: float = 1,
        gpus_per_trial: float = 0,
        address: str | None = None,
        timeout: float | None = None,
    ) -> None:
        self.slots = integer("workers", workers, 1, 2**20)
        if not 0 < cpus_per_trial < math.inf:
            raise ValueError(f"cpus_per_trial must be above 0 and finite, got {cpus_per_trial}")
        if not 0 <= gpus_per_trial < math.inf:
            raise ValueError(f"gpus_per_trial must be at least 0 and finite, got {gpus_per_trial}")
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be above 0 and finite, or None, got {timeout}")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
        try:
            import ray
        except ImportError as error:
            message = "the Ray runner needs Ray: pip install 'autodropout[ray]'"
            raise ImportError(message, name=error.name) from error
        self._ray: Any = ray
        self._cpus = cpus_per_trial
        self._gpus = gpus_per_trial
        self._address = address
        self._timeout = timeout
        self._on_report: OnReport | None = None
        self._connected = False
        self._mailbox: Any = None
        self._letters: Any = None
        self._trainer: Any = None
        self._workers: dict[int, _Worker] = {}

    def start(self, recipe: str, on_report: OnReport) -> None:
        """See `Runner.start`.

        Raises:
            OSError: the recipe cannot be read.
            ConnectionError: there is no cluster at `address`.
            ValueError: the cluster is too small for the workers.
        """
        ray = self._ray
        path = Path(recipe).resolve()
        source = path.read_bytes()
        self._on_report = on_report
        if not ray.is_initialized():
            self._connect()
            self._connected = True
        capacity = _capacity(ray.nodes(), self._cpus, self._gpus)
        if capacity < self.slots:
            each = f"{self._cpus:g} CPUs and {self._gpus:g} GPUs"
            raise ValueError(f"workers must be at most {capacity} on this cluster with {each} each, got {self.slots}")
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        mailbox = ray.remote(num_cpus=0, max_concurrency=2 * self.slots + 2, scheduling_strategy=here)(Mailbox)
        self._mailbox = mailbox.remote()
        self._letters = self._mailbox.collect.remote()
        trainer = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus)(Trainer)
        threads = max(1, int(self._cpus))
        self._trainer = lambda slot: trainer.remote(str(path), source, threads, slot, self._mailbox)
        for slot in range(self.slots):
            self._workers[slot] = _Worker(self._trainer(slot))

    def _connect(self) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if self._address is not None:
            self._ray.init(address=self._address, **quiet)
            return
        cores = max(os.cpu_count() or 1, math.ceil(self.slots * self._cpus))
        store = OBJECT_STORE_BYTES
        self._ray.init(address="local", num_cpus=cores, object_store_memory=store, include_dashboard=False, **quiet)

    def submit(self, task: Task) -> None:
        for slot in range(self.slots):
            if slot not in self._workers:
                self._workers[slot] = _Worker(self._trainer(slot))
            worker = self._workers[slot]
            if worker.task is None:
                worker.task = task
                worker.since = None
                worker.result = worker.actor.run.remote(task)
                return
        raise RuntimeError(f"submit must be called while a slot is free, but all {self.slots} are busy")

    def wait(self, timeout: float | None) -> list[Outcome]:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            busy = {slot: worker for slot, worker in self._workers.items() if worker.task is not None}
            if not busy:
                return []
            waiting = [self._letters, *(worker.result for worker in busy.values())]
            now = time.monotonic()
            until = min([deadline, *(self._deadline(worker) for worker in busy.values())])
            patience = None if until == math.inf else max(0.0, until - now)
            self._ray.wait(waiting, num_returns=1, timeout=patience)
            ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
            if self._letters in ready:
                self._answer(self._ray.get(self._letters))
                self._letters = self._mailbox.collect.remote()
            outcomes = [self._outcome(slot) for slot, worker in busy.items() if worker.result in ready]
            if not outcomes:
                outcomes = [self._expire(slot) for slot, worker in busy.items() if self._deadline(worker) <= now]
            if outcomes or deadline <= time.monotonic():
                return outcomes

    def close(self) -> None:
        for slot in list(self._workers):
            self._end(slot)
        if self._mailbox is not None:
            self._ray.kill(self._mailbox)
            self._mailbox = self._letters = None
        if self._connected:
            self._ray.shutdown()
            self._connected = False

    def _deadline(self, worker: _Worker) -> float:
        return math.inf if self._timeout is None or worker.since is None else worker.since + self._timeout

    def _answer(self, letters: list[Letter]) -> None:
        """Notes which trainings have begun, and answers reports.

        An actor that is gone may have left letters. Its reports are answered as well: a call that waits for ever would
        hold one of those that the mailbox takes at a time, and without any left nothing arrives here.
        """
        for slot, task, report in letters:
            worker = self._workers.get(slot)
            if worker is None or worker.task is None or (worker.task.number, worker.task.attempt) != task:
                if report is not None:
                    self._mailbox.answer.remote(slot, task, False)
            elif report is None:
                worker.since = time.monotonic()
            elif self._on_report is not None:
                self._mailbox.answer.remote(slot, task, self._on_report(task[0], *report))

    def _outcome(self, slot: int) -> Outcome:
        worker = self._workers[slot]
        task = worker.task
        assert task is not None
        seconds = 0.0 if worker.since is None else time.monotonic() - worker.since
        outcome: Outcome
        try:
            outcome = self._ray.get(worker.result)
        except self._ray.exceptions.RayTaskError:
            raise  # `Trainer.run` itself went wrong, not the training
        except self._ray.exceptions.OutOfMemoryError as error:
            outcome = Failed(task, "memory", str(error), seconds)
        except self._ray.exceptions.RayError as error:
            outcome = Failed(task, "died", str(error), seconds)
        worker.task = None
        if isinstance(outcome, Failed) and outcome.kind != "raised":
            self._end(slot)
        return outcome

    def _expire(self, slot: int) -> Outcome:
        worker = self._workers[slot]
        assert worker.task is not None
        assert worker.since is not None
        seconds = time.monotonic() - worker.since
        self._end(slot)
        return Failed(worker.task, "timeout", f"killed: ran past its limit of {self._timeout:g} s", seconds)

    def _end(self, slot: int) -> None:
        self._ray.kill(self._workers.pop(slot).actor)


class _Worker:
    """The driver's side of an actor: its task and that task's future result, and when the training began."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.task: Task | None = None
        self.result: Any = None
        self.since: float | None = None


# Slot, (number, attempt) of its task, and (step, value) of a report; None says that the training begins.
Letter = tuple[int, tuple[int, int], tuple[int, float] | None]


class Mailbox:
    """An actor on the driver's node, through which trainings report and are told whether to go on."""

    def __init__(self) -> None:
        self._letters: asyncio.Queue[Letter] = asyncio.Queue()
        # By slot and task: a slot may have a new actor by the time that an answer for the last one arrives.
        self._answers: dict[tuple[int, tuple[int, int]], asyncio.Future[bool]] = {}

    async def begin(self, slot: int, task: tuple[int, int]) -> None:
        for key in [key for key in self._answers if key[0] == slot]:
            self._answers.pop(key).cancel()  # the actor that asked is gone
        self._letters.put_nowait((slot, task, None))

    async def report(self, slot: int, task: tuple[int, int], step: int, value: float) -> bool:
        """Waits for the driver's answer."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers[slot, task] = answer
        self._letters.put_nowait((slot, task, (step, value)))
        return await answer

    async def collect(self) -> list[Letter]:
        """The letters that are there, at least one."""
        letters = [await self._letters.get()]
        while not self._letters.empty():
            letters.append(self._letters.get_nowait())
        return letters

    async def answer(self, slot: int, task: tuple[int, int], go_on: bool) -> None:
        answer = self._answers.pop((slot, task), None)
        if answer is not None and not answer.done():  # else the actor that asked has died
            answer.set_result(go_on)


class Trainer:
    """An actor that trains: it loads the recipe once."""

    def __init__(self, path: str, source: bytes, threads: int, slot: int, mailbox: Any) -> None:
        import torch

        torch.set_num_threads(threads)
        # A killed actor takes along what its training has begun, such as the workers of a data loader.
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
        self._guard = Guard()
        self._guard.add(os.getpid())
        self._slot = slot
        self._mailbox = mailbox
        self._recipe = load(_recipe_here(path, source))

    def run(self, task: Task) -> Outcome:
        import ray

        key = (task.number, task.attempt)
        ray.get(self._mailbox.begin.remote(self._slot, key))

        def go_on(step: int, value: float) -> bool:
            return bool(ray.get(self._mailbox.report.remote(self._slot, key, step, value)))

        return attempt(self._recipe, task, go_on)


def _recipe_here(path: str, source: bytes) -> str:
    """The recipe's file on this node: the one at its path if that has the same content, or else a copy."""
    try:
        if Path(path).read_bytes() == source:
            return path
    except OSError:
        pass
    copy = Path(tempfile.mkdtemp(prefix="autodropout-"), Path(path).name)
    copy.write_bytes(source)
    return str(copy)


def _capacity(nodes: list[dict[str, Any]], cpus: float, gpus: float) -> int:
    """How many actors with these resources fit on the nodes, each on one."""
    total = 0
    for node in nodes:
        if node["Alive"]:
            fits = [math.floor(node["Resources"].get("CPU", 0) / cpus + 1e-6)]
            if gpus:
                fits.append(math.floor(node["Resources"].get("GPU", 0) / gpus + 1e-6))
            total += min(fits)
    return total
