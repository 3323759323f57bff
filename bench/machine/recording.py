"""What the launchers would launch, without a GPU: arguments and grid of every kernel, for tensors without storage."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime import jit


@dataclass(frozen=True)
class Launch:
    """`kernel[grid](*args, **kwargs)` as a launcher called it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def programs(self) -> int:
        count = 1
        for side in self.grid:
            count *= side
        return count


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of all kernels inside the block, in order; none of them runs.

    Tensors are best on the device `meta`: their address is 0, aligned as fresh device memory is.
    """
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if callable(grid):
            grid = grid(inspect.signature(kernel.fn).bind(*args, **kwargs).arguments)
        sides = (grid,) if isinstance(grid, int) else tuple(grid)
        launches.append(Launch(kernel, sides, args, kwargs))

    with mock.patch.object(jit.JITFunction, "run", run):
        yield launches


def missing_internals() -> str | None:
    """Why this Triton cannot be asked what it would compile; None if it can."""
    binder = getattr(jit, "create_function_from_signature", None)
    if binder is None or list(inspect.signature(binder).parameters) != ["sig", "kparams", "backend"]:
        return f"Triton {triton.__version__} has no jit.create_function_from_signature(sig, kparams, backend)"
    if not hasattr(jit.JITFunction, "_pack_args"):
        return f"Triton {triton.__version__} has no JITFunction._pack_args"
    return None


def meta(*shape: int, dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    """A tensor of this shape without storage."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
