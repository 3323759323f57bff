"""A small process that ends the workers of a driver that died, whatever they are doing. Run as a file; imports nothing.

The driver writes a line for each process group that begins ("+123") or has ended ("-123") to its standard input. When
that closes, because the driver has closed it or because it was killed, all groups that are left are killed. A worker
cannot do that itself: it may hang in code that lets no other thread run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    """Follows standard input to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        if line.endswith("\n"):  # a driver may die in the middle of a line
            sign, group = line[0], int(line[1:])
            groups.add(group) if sign == "+" else groups.discard(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
