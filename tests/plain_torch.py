"""The ops on the CPU as they are without Numba."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from unittest import mock


@contextmanager
def without_numba() -> Iterator[None]:
    """PyTorch's implementations run, whatever is installed, under either name of kernels/."""
    with ExitStack() as patches:
        for name in ("kernels.compiled", "autodropout.kernels.compiled"):
            if name in sys.modules:
                patches.enter_context(mock.patch.object(sys.modules[name], "_imports_numba", return_value=False))
        yield
