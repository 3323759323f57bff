"""A small process that ends process groups when its parent is gone, whatever they and the parent were doing then.

A worker cannot do that itself: it may hang in code that lets no other thread run, or be killed before what it has
begun. The parent writes a line for each group that begins ("+123") or has ended ("-123") to the guard's standard input.
When that closes, or when the parent dies, the groups that are left are killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

TICK_SECONDS = 0.5  # children that the parent forked may hold the pipe open: so its life is looked at, too


class Guard:
    """The parent's side: starts the guard. `close` ends it, and the groups that were not taken off."""

    def __init__(self) -> None:
        # As a file and isolated: it starts in milliseconds, and needs none of this package's imports.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def add(self, group: int) -> None:
        self._tell(f"+{group}\n")

    def remove(self, group: int) -> None:
        self._tell(f"-{group}\n")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody has killed the guard: no reason to end the parent's work
            os.write(self._process.stdin.fileno(), line.encode())


def main(parent: int) -> None:
    """The guard's side."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    groups: set[int] = set()
    text = ""
    while os.getppid() == parent:
        if select.select([sys.stdin], [], [], TICK_SECONDS)[0]:
            data = os.read(sys.stdin.fileno(), 65536)
            if not data:
                break
            *lines, text = (text + data.decode()).split("\n")
            for line in lines:
                if line[0] == "+":
                    groups.add(int(line[1:]))
                else:
                    groups.discard(int(line[1:]))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
