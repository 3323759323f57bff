"""The ops on the CPU as they are without Numba."""

from __future__ import annotations

import sys
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from typing import ParamSpec
from typing import TypeVar
from unittest import mock

import pytest

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def without_numba() -> Iterator[None]:
    """PyTorch's implementations run, whatever is installed, under either name of kernels/."""
    with ExitStack() as patches:
        for name in ("kernels.compiled", "autodropout.kernels.compiled"):
            if name in sys.modules:
                patches.enter_context(mock.patch.object(sys.modules[name], "_imports_numba", return_value=False))
        yield


def plain(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run without Numba."""

    def without(*args: P.args, **kwargs: P.kwargs) -> R:
        with without_numba():
            return function(*args, **kwargs)

    return without


@pytest.fixture(params=[False, True], ids=["pytorch", "numba"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that asks for it runs without Numba, and with it where it is installed."""
    if request.param:
        pytest.importorskip("numba", reason="needs Numba")
        yield
    else:
        with without_numba():
            yield
