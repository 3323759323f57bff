"""Triton kernels of `residual + dropout(x)`: x and residual are read once, y is written once, nothing else.

`add_scaled_samples_kernel` (DropPath) takes a run of one sample, whose factor is one number; of a dropped sample it
does not read x. `add_tiled_kernel` takes tiles as of tiles_triton.py. The sum is one fused multiply-add where the
compiler makes one.

Bytes per element of size s: 3 s, and 2 s where a sample is dropped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .atlas import Atlas
from .launch_triton import grain_of
from .tiles_triton import Tiling
from .tiles_triton import _mask_of_tile
from .tiles_triton import _offsets
from .tiles_triton import dense

# Elements of a program and its warps: 16 elements a thread of two activations.
TILE = 2048
WARPS = 4


@triton.jit
def add_scaled_samples_kernel(
    x_ptr,  # samples one after the other, each dense
    residual_ptr,  # in the memory format of x
    y_ptr,  # likewise, written
    factor_ptr,  # (N) in the compute type, 0 where dropped
    sample_units,  # the elements of a sample are sample_units * GRAIN
    blocks,  # programs of a sample
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    elements = tl.cast(sample_units, tl.int64) * GRAIN
    sample = tl.program_id(0) // blocks
    within = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offset = sample.to(tl.int64) * elements + within
    inside = within < elements
    factor = tl.load(factor_ptr + sample)
    kept = factor != 0.0
    x = tl.load(x_ptr + offset, mask=within < tl.where(kept, elements, 0), other=0.0).to(factor.dtype)
    residual = tl.load(residual_ptr + offset, mask=inside).to(factor.dtype)
    y = tl.where(kept, residual + x * factor, residual)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


# Of a number that is loaded alone the alignment does not matter.
@triton.jit(do_not_specialize=["scale_ptr"])
def add_tiled_kernel(
    x_ptr,  # (N, C, H, W), in the order of memory N, C, H, W or N, H, W, C
    residual_ptr,  # in the memory format of x
    y_ptr,  # likewise, written
    starts_ptr,  # int32 (N, 1 or C)
    fragments_ptr,  # uint8
    scale_ptr,  # float64
    starts_per_sample,  # 1 where channels share, or C
    channel_units,  # the channels are channel_units * CHANNELS_GRAIN
    height,
    width_units,  # the width is width_units * GRAIN, which tells the compiler what it is divisible by
    channel_blocks,
    fragment_blocks,
    pitch,
    step,
    start_step,
    GRAIN: tl.constexpr,
    CELLS_GRAIN: tl.constexpr,  # likewise for the cells of a map
    CHANNELS_GRAIN: tl.constexpr,
    ROWS: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    channels = channel_units * CHANNELS_GRAIN
    width = width_units * GRAIN
    cells = height * width // CELLS_GRAIN * CELLS_GRAIN
    block = tl.program_id(0)
    fragment = (block % fragment_blocks) * FRAGMENTS + tl.arange(0, FRAGMENTS)
    block = block // fragment_blocks
    channel = (block % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    sample = block // channel_blocks
    cell, inside, kept = _mask_of_tile(
        sample, channel, fragment, starts_ptr, starts_per_sample, fragments_ptr, channels, height, width, cells,
        pitch, step, start_step, ROWS,
    )  # fmt: skip
    offset = _offsets(sample, channel, cell, channels, cells, LAST)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + offset, mask=inside, other=0.0)
    scale = tl.load(scale_ptr)
    if x.dtype == tl.float64:
        y = tl.where(kept, residual + x * scale, residual)
    else:
        residual = residual.to(tl.float32)
        y = tl.where(kept, residual + x.to(tl.float32) * scale.to(tl.float32), residual)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


# ---- launchers -----------------------------------------------------------------------------------------------------


def add_scaled_samples(x: torch.Tensor, residual: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`residual + x * factor` by samples, in x's memory format."""
    if not (x.is_contiguous() or (x.dim() == 4 and dense(x))):
        return torch.empty_like(x).copy_(add_scaled_samples(x.contiguous(), residual, factor))
    residual = residual.contiguous(memory_format=_format(x))
    y = torch.empty_like(x)
    n = x.shape[0]
    elements = x.numel() // n
    grain = grain_of(elements)
    blocks = triton.cdiv(elements, TILE)
    add_scaled_samples_kernel[(n * blocks,)](
        x, residual, y, factor, elements // grain, blocks, GRAIN=grain, BLOCK=TILE, num_warps=WARPS
    )
    return y


def add_tiled(
    x: torch.Tensor, residual: torch.Tensor, atlas: Atlas, starts: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """`residual + x * mask * scale`, in x's memory format."""
    if not dense(x):
        return torch.empty_like(x).copy_(add_tiled(x.contiguous(), residual, atlas, starts, scale))
    tiling = Tiling(x, atlas, TILE)
    residual = residual.contiguous(memory_format=tiling.memory_format)
    y = torch.empty_like(x)
    add_tiled_kernel[(x.shape[0] * tiling.channel_blocks * tiling.fragment_blocks,)](
        x, residual, y, starts, tiling.tables.fragments, scale, starts.shape[1], *tiling.units, tiling.channel_blocks,
        tiling.fragment_blocks, *tiling.steps,
        ROWS=tiling.tables.rows > 1, **tiling.grains, **tiling.tile, num_warps=WARPS,
    )  # fmt: skip
    return y


def _format(x: torch.Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last
