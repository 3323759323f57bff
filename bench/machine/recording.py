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
from torch.utils._python_dispatch import TorchDispatchMode
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


@contextmanager
def launching_for(target: str) -> Iterator[None]:
    """Launchers inside the block find themselves on a machine with this target: warps of AMD's are of 64 threads."""
    with mock.patch.object(torch.version, "hip", "6" if target.startswith("gfx") else None):
        yield


class OtherPasses(TorchDispatchMode):
    """Bytes that PyTorch's own ops read and write inside the block: buffers that are zeroed, what is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded = 0
        self.stored = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        if isinstance(result, torch.Tensor) and not is_view and "empty" not in func._schema.name:
            self.stored += result.numel() * result.element_size()
            # What an op writes in place it does not read first, as far as the launchers go: copy_, fill_, zero_.
            first = 1 if returned[0].alias_info is not None else 0
            inputs = [one for one in args[first:] if isinstance(one, torch.Tensor)]
            self.loaded += sum(one.numel() * one.element_size() for one in inputs)
        return result


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
