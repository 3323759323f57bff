"""The worker process of `ProcessRunner`: it loads the recipe once and trains the tasks that it is sent.

Both directions of the socket carry lines of JSON. Sent by the driver: `{"recipe", "memory_limit", "threads"}` once,
then for each task `{"number", "attempt", "policy", "seed"}`, and `{"go_on"}` as the answer to a report. Sent by the
worker: `{"ready"}` once, then for each task any number of `{"report": [step, value]}` and at last `{"finished"}` or
`{"failed"}` with the fields of those classes, the task excepted.
"""

from __future__ import annotations

import json
import os
import resource
import socket
from typing import Any

import torch

from .attempt import attempt
from .attempt import load
from .base import Finished
from .base import Outcome
from .base import Task


def main(descriptor: int) -> None:
    """Works until the driver closes the socket with this descriptor."""
    connection = _Connection(descriptor)
    settings = connection.receive()
    torch.set_num_threads(settings["threads"])
    limit = settings["memory_limit"]
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    recipe = load(settings["recipe"])
    connection.send({"ready": True})
    while True:
        task = Task(**connection.receive())
        connection.send(_outcome(attempt(recipe, task, connection.report)))


class _Connection:
    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # no business of what a training begins
        self._socket = socket.socket(fileno=descriptor)
        self._lines = self._socket.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            os._exit(1)  # the driver is gone: not to be caught by a recipe

    def receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            os._exit(0)  # likewise
        message: dict[str, Any] = json.loads(line)
        return message

    def report(self, step: int, value: float) -> bool:
        self.send({"report": [step, value]})
        return bool(self.receive()["go_on"])


def _outcome(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, Finished):
        finished = {"metric": outcome.metric, "seconds": outcome.seconds, "stopped": outcome.stopped}
        return {"finished": finished}
    return {"failed": {"kind": outcome.kind, "message": outcome.message, "seconds": outcome.seconds}}
