"""Trials in processes of this machine, which may raise, hang, die or fill their memory without harm to the search."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import IO
from typing import Any

from ...patterns.checks import integer
from .base import Failed
from .base import Finished
from .base import OnReport
from .base import Outcome
from .base import Runner
from .base import Task
from .guard import Guard

START_SECONDS = 600.0  # most that a worker may take to import what it needs and to load the recipe
GRACE_SECONDS = 1.0  # between SIGTERM and SIGKILL
TICK_SECONDS = 0.1  # between two looks at whether a worker is alive and within its limit
LARGEST_LIMIT = 2**63 - 1  # bytes; setrlimit takes no more
TAIL_BYTES = 2000  # of what a worker wrote before it died, for the message of the failure

# The driver's own sys.path, before anything is imported: a worker finds what the driver finds. The driver's script is
# not run again.
PROGRAM = "import sys; sys.path[:] = {path!r}; from autodropout.search.runners.worker import main; main({descriptor})"


class ProcessRunner(Runner):
    """Trains in long-lived worker processes, each of which loads the recipe itself. POSIX systems only.

    A worker that died, hung or ran out of memory is replaced by a new one. Each is the leader of a session of its own,
    so that Ctrl-C in a terminal reaches only the driver, and is ended with the processes that it has begun: at `close`,
    or when the driver dies, however that happens (see `guard`). Each has `max(1, cores // workers)` threads for torch
    and OpenMP.

    Args:
        workers: how many, at least 1.
        timeout: seconds that an attempt may take, start-up of the worker excepted; then it is killed.
        memory_limit: bytes of data that each process of a worker may hold (RLIMIT_DATA, Linux only): what it has
            allocated, whether used yet or not. Python with torch takes about 800 MiB of it.
        logs: folder for what the workers write to stdout and stderr, `worker-0.log` and so on, appended to. None: it
            is kept only until the runner is closed, for the messages of failures.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        workers: int,
        timeout: float | None = None,
        memory_limit: int | None = None,
        logs: str | os.PathLike[str] | None = None,
    ) -> None:
        self.slots = integer("workers", workers, 1, 2**20)
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be above 0 and finite, or None, got {timeout}")
        if memory_limit is not None:
            memory_limit = integer("memory_limit", memory_limit, 1, LARGEST_LIMIT)
        if memory_limit is not None and sys.platform != "linux":
            raise ValueError(f"memory_limit must be None except on Linux, got {memory_limit}")
        self._timeout = timeout
        self._memory_limit = memory_limit
        self._logs = None if logs is None else Path(logs)
        self._settings: dict[str, Any] = {}
        self._on_report: OnReport | None = None
        self._guard: Guard | None = None
        self._workers: dict[int, _Worker] = {}

    def start(self, recipe: str, on_report: OnReport) -> None:
        self._settings = {
            "recipe": os.path.abspath(recipe),
            "memory_limit": self._memory_limit,
            "threads": max(1, _cores() // self.slots),
        }
        self._on_report = on_report
        if self._logs is not None:
            self._logs.mkdir(parents=True, exist_ok=True)
        self._guard = Guard()
        for slot in range(self.slots):
            self._begin(slot)

    def submit(self, task: Task) -> None:
        for slot, worker in list(self._workers.items()):
            if worker.task is None and worker.process.poll() is not None:  # died while it had nothing to do
                self._end(slot)
        idle = [worker for worker in self._workers.values() if worker.task is None]
        missing = [slot for slot in range(self.slots) if slot not in self._workers]
        if not idle and not missing:
            raise RuntimeError(f"submit must be called while a slot is free, but all {self.slots} are busy")
        worker = min(idle, key=lambda worker: not worker.ready) if idle else self._begin(missing[0])
        worker.give(task)

    def wait(self, timeout: float | None) -> list[Outcome]:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            looks = [self._look(slot) for slot in list(self._workers)]
            outcomes = [outcome for outcome in looks if outcome is not None]
            busy = [worker for worker in self._workers.values() if worker.task is not None]
            left = deadline - time.monotonic()
            if outcomes or not busy or left <= 0:
                return outcomes
            wait_for_any([worker.connection for worker in busy], min(left, TICK_SECONDS))

    def close(self) -> None:
        workers = list(self._workers.values())
        for worker in workers:
            worker.signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.wait(deadline - time.monotonic())
        for slot in list(self._workers):
            self._end(slot)
        if self._guard is not None:
            self._guard.close()
            self._guard = None

    def _begin(self, slot: int) -> _Worker:
        worker = self._workers[slot] = _Worker(self._settings, self._open_log(slot))
        if self._guard is not None:
            self._guard.add(worker.process.pid)
        return worker

    def _open_log(self, slot: int) -> IO[bytes]:
        if self._logs is None:
            return tempfile.TemporaryFile()
        return open(self._logs / f"worker-{slot}.log", "a+b")

    def _end(self, slot: int) -> None:
        worker = self._workers.pop(slot)
        worker.end()
        if self._guard is not None:
            self._guard.remove(worker.process.pid)

    def _look(self, slot: int) -> Outcome | None:
        """What came of the task of a worker, if anything did; ends a worker that cannot go on."""
        worker = self._workers[slot]
        dead = worker.process.poll() is not None  # asked before its messages are read, so that none is missed
        outcome = self._read(worker)
        if worker.task is None:
            return None
        if outcome is None:
            seconds = time.monotonic() - worker.since
            limit = self._timeout if worker.ready else START_SECONDS
            if dead or worker.closed:
                failure = Failed(worker.task, "died", worker.death(), seconds)
            elif limit is not None and seconds > limit:
                doing = "ran" if worker.ready else "was starting"
                failure = Failed(worker.task, "timeout", f"killed: {doing} past its limit of {limit:g} s", seconds)
            else:
                return None
            worker.stop()
            outcome = self._read(worker) or failure  # what it said at the last moment counts
        worker.task = None
        # After a lack of memory, what a failed training still holds goes with its process.
        if worker.process.poll() is not None or (isinstance(outcome, Failed) and outcome.kind != "raised"):
            self._end(slot)
        return outcome

    def _read(self, worker: _Worker) -> Outcome | None:
        """Answers the reports of a worker; returns the outcome of its task, if that has come."""
        for message in worker.receive():
            task = worker.task
            if "ready" in message:
                worker.ready = True
                worker.since = time.monotonic()
            elif task is None or self._on_report is None:
                raise RuntimeError(f"a worker without a task must not send anything, got {message}")
            elif "report" in message:
                step, value = message["report"]
                worker.send({"go_on": self._on_report(task.number, step, value)})
            elif "finished" in message:
                return Finished(task, **message["finished"])
            else:
                return Failed(task, **message["failed"])
        return None


class _Worker:
    """The driver's side of a worker process.

    Attributes:
        task: what it is at, if anything.
        ready: whether it has loaded the recipe.
        since: when its task began, or its start-up while it is not ready.
        closed: whether it has closed the connection, as it does when it ends.
    """

    def __init__(self, settings: dict[str, Any], log: IO[bytes]) -> None:
        self.connection, theirs = socket.socketpair()
        program = PROGRAM.format(path=[str(path) for path in sys.path], descriptor=theirs.fileno())
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-c", program],
                env={**os.environ, "OMP_NUM_THREADS": str(settings["threads"]), "PYTHONUNBUFFERED": "1"},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.task: Task | None = None
        self.ready = False
        self.since = time.monotonic()
        self.closed = False
        self._memory_limit = settings["memory_limit"]
        self._received = b""
        self._log = log
        self._log_begin = os.fstat(log.fileno()).st_size
        self.send(settings)

    def give(self, task: Task) -> None:
        self.task = task
        if self.ready:
            self.since = time.monotonic()
            self._log_begin = os.fstat(self._log.fileno()).st_size
        self.send(asdict(task))

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionError):  # it has died, which `death` tells
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Iterator[dict[str, Any]]:
        """The messages that are there, without waiting for any."""
        while not self.closed:
            try:
                data = self.connection.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            self.closed = not data
            self._received += data
        while b"\n" in self._received:
            line, _, self._received = self._received.partition(b"\n")
            yield json.loads(line)

    def death(self) -> str:
        """How the process ended, and what it last wrote."""
        self.wait(GRACE_SECONDS)
        code = self.process.poll()
        if code is None:
            how = "the worker closed its connection in the middle of a training"
        elif code >= 0:
            how = f"the worker exited with code {code}"
        else:
            how = f"the worker was killed by {_signal_name(-code)}"
            if -code == signal.SIGKILL:
                how += ", as the system does when memory runs out"
        if self._memory_limit is not None:
            how += f"; its memory limit was {self._memory_limit} bytes"
        size = os.fstat(self._log.fileno()).st_size
        begin = max(self._log_begin, size - TAIL_BYTES)
        tail = os.pread(self._log.fileno(), size - begin, begin).decode(errors="replace").strip()
        return f"{how}\n{tail}" if tail else how

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the worker and to what it has begun."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone; or, on macOS, about to be
            os.killpg(self.process.pid, number)

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, seconds))

    def stop(self) -> None:
        """Ends the process and what it has begun."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            self.wait(GRACE_SECONDS)
        self.signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """`stop`, and frees what the driver holds of it."""
        self.stop()
        self.connection.close()
        self._log.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
