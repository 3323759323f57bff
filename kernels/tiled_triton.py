"""Triton kernels of tiled pattern dropout: one small one over the placements, one over the activation.

`draw_kernel` runs Philox once per plane, counter (channel or 0, 0, sample, rank), writes 4 bytes a plane and, for
normalize="mask", adds up the dropped cells; the program that arrives last divides. `apply_kernel` (contiguous) and
`apply_channels_last_kernel` read each element once and write it once; forward and backward are the same kernel.
Nothing of the pattern is compiled in: a kernel sees the map, the table and the placements, so that a new pattern, seed
or scale reuses the compiled code.

The mask comes in fragments of 8 cells that follow each other in memory order: one byte of the table
(`DeviceTables.fragments`), at `start * start_step + fragment * step` while the flat table fits. A tile is [planes,
fragments, 8], one byte load per 8 elements and no arithmetic on coordinates.

Scale: a float64 in memory, rounded to the compute type in the kernel; as a Python number it would be compiled in or
passed as float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .atlas import Atlas
from .atlas import DeviceTables

# Elements of a tile and warps that share it: 32 elements a thread keep 8 16-byte loads of fp32 in flight at about 60
# registers. By compiled code only; no GPU has timed them yet.
TILE = 4096
WARPS = 4

# Planes that a program of draw_kernel places.
DRAW_BLOCK = 1024


# ---- device helpers ------------------------------------------------------------------------------------------------


@triton.jit
def _below(word, n):
    """A Philox word as an integer in [0, n)."""
    return ((word.to(tl.uint64) * n.to(tl.uint64)) >> 32).to(tl.int32)


@triton.jit
def _fragment_place(start, fragment, height, width, cells, pitch, step, start_step, ROWS: tl.constexpr):
    """Of a fragment: its byte in the table, its first cell in the plane, and the same in the row of cells it lies in.

    Last, whether that row is in the map, and the cells of a row: what is behind them must be neither read nor written.
    """
    if ROWS:
        per_row = (width + 7) // 8
        row = fragment // per_row
        column = (fragment - row * per_row) * 8
        period = 2 * height - 1
        byte = (start % period + row) * pitch + width - 1 - start // period + column
        return byte, row * width + column, column, row < height, width
    else:
        return start * start_step + fragment * step, fragment * 8, fragment * 8, fragment >= 0, cells


@triton.jit
def _masked_product(x, kept, scale):
    """`x * scale` in the compute type, cast to x's type; 0 at dropped cells, whatever x holds there."""
    if x.dtype == tl.float64:
        product = x * scale
    else:
        product = (x.to(tl.float32) * scale.to(tl.float32)).to(x.dtype)
    return tl.where(kept, product, 0.0)


# ---- kernels -------------------------------------------------------------------------------------------------------


# Not on the seed either: an element of a tensor of seeds is aligned to 8 bytes only, and would compile the kernel anew.
@triton.jit(do_not_specialize=["rank", "seed_ptr"])
def draw_kernel(
    seed_ptr,  # int64
    counts_ptr,  # int32 (W * (2H-1)), dropped cells by start
    starts_ptr,  # int32 (planes), written
    totals_ptr,  # int64 (2), zeros: dropped cells so far, programs that have added theirs
    scale_ptr,  # float64, written if SCALE
    planes,
    channels,
    height,
    width,
    rank,  # int32 with the bits of the uint32
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # There may be 2^31 planes and more. One division in 64 bits finds the sample of the first, 32 bits do for the rest.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    plane = first + tl.arange(0, BLOCK)
    inside = plane < planes
    first_sample = first // channels
    channel = (first - first_sample * channels).to(tl.int32) + tl.arange(0, BLOCK)
    samples_on = channel // channels
    channel = channel - samples_on * channels
    sample = first_sample.to(tl.int32) + samples_on
    zero = channel * 0
    w0, w1, _, _ = tl.philox(tl.load(seed_ptr), channel, zero, sample, zero + rank)
    start = _below(w1, zero + width) * (2 * height - 1) + height - 1 - _below(w0, zero + height)
    tl.store(starts_ptr + plane, start, mask=inside)
    if SCALE:
        dropped = tl.sum(tl.load(counts_ptr + start, mask=inside, other=0).to(tl.int64))
        tl.atomic_add(totals_ptr, dropped)
        # Release and acquire: who sees all the others' arrivals sees their sums.
        arrived = tl.atomic_add(totals_ptr + 1, 1)
        if arrived == tl.num_programs(0) - 1:
            size = planes.to(tl.int64) * height * width
            kept = size - tl.atomic_add(totals_ptr, 0)
            quotient = size.to(tl.float64) / tl.maximum(kept, 1).to(tl.float64)
            tl.store(scale_ptr, tl.where(kept > 0, quotient, 0.0))


@triton.jit
def apply_kernel(
    x_ptr,  # (N, C, H, W), contiguous
    y_ptr,  # the same, written
    starts_ptr,  # int32 (N, 1 or C)
    fragments_ptr,  # uint8
    scale_ptr,  # float64
    planes,  # N * C
    channels_per_start,  # 1, or C where channels share
    height,
    width_units,  # the width is width_units * GRAIN, which tells the compiler what it is divisible by
    fragment_blocks,
    pitch,
    step,
    start_step,
    GRAIN: tl.constexpr,
    CELLS_GRAIN: tl.constexpr,  # likewise for the cells of a map, a divisor of H * W
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    width = width_units * GRAIN
    cells = height * width // CELLS_GRAIN * CELLS_GRAIN
    block = tl.program_id(0)
    plane = (block // fragment_blocks).to(tl.int64) * PLANES + tl.arange(0, PLANES)
    fragment = (block % fragment_blocks) * FRAGMENTS + tl.arange(0, FRAGMENTS)
    start = tl.load(starts_ptr + plane // channels_per_start, mask=plane < planes, other=0)
    byte, cell, column, in_map, row_cells = _fragment_place(
        start[:, None], fragment[None, :], height, width, cells, pitch, step, start_step, ROWS
    )
    inside = (plane < planes)[:, None] & in_map & (column < row_cells)
    bits = tl.load(fragments_ptr + byte, mask=inside, other=0)

    lane = tl.arange(0, 8)
    kept = ((bits[:, :, None] >> lane[None, None, :].to(tl.uint8)) & 1) != 0
    offset = (plane * cells)[:, None, None] + (cell[:, :, None] + lane[None, None, :])
    inside = (plane < planes)[:, None, None] & in_map[:, :, None]
    inside = inside & (column[:, :, None] + lane[None, None, :] < row_cells)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    tl.store(y_ptr + offset, _masked_product(x, kept, tl.load(scale_ptr)), mask=inside)


@triton.jit
def apply_channels_last_kernel(
    x_ptr,  # (N, C, H, W) in the order of memory N, H, W, C
    y_ptr,  # the same, written
    starts_ptr,  # int32 (N, 1 or C)
    fragments_ptr,  # uint8
    scale_ptr,  # float64
    channel_units,  # the channels are channel_units * CHANNELS_GRAIN
    starts_per_sample,  # 1 where channels share, or C
    height,
    width,
    fragment_blocks,
    channel_blocks,
    pitch,
    step,
    start_step,
    CHANNELS_GRAIN: tl.constexpr,
    ROWS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = channel_units * CHANNELS_GRAIN
    block = tl.program_id(0)
    channel = (block % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    block = block // channel_blocks
    fragment = (block % fragment_blocks) * FRAGMENTS + tl.arange(0, FRAGMENTS)
    sample = (block // fragment_blocks).to(tl.int64)
    which = tl.where(starts_per_sample == 1, 0, channel)
    start = tl.load(starts_ptr + sample * starts_per_sample + which, mask=channel < channels, other=0)
    byte, cell, column, in_map, row_cells = _fragment_place(
        start[None, :], fragment[:, None], height, width, height * width, pitch, step, start_step, ROWS
    )
    inside = (channel < channels)[None, :] & in_map & (column < row_cells)
    bits = tl.load(fragments_ptr + byte, mask=inside, other=0)

    lane = tl.arange(0, 8)
    kept = ((bits[:, None, :] >> lane[None, :, None].to(tl.uint8)) & 1) != 0
    place = sample * height * width + (cell[:, None, :] + lane[None, :, None])
    offset = place * channels + channel[None, None, :]
    inside = (channel < channels)[None, None, :] & in_map[:, None, :]
    inside = inside & (column[:, None, :] + lane[None, :, None] < row_cells)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    tl.store(y_ptr + offset, _masked_product(x, kept, tl.load(scale_ptr)), mask=inside)


# ---- launchers -----------------------------------------------------------------------------------------------------


def draw(
    seed: torch.Tensor, n: int, c: int, atlas: Atlas, share_c: bool, normalize: str, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Placements as int32 (n, 1 or c) and the scale as a 0-d float64 tensor, both on the device of seed."""
    from .tiled import fixed_scale

    device = seed.device
    channels = 1 if share_c else c
    starts = torch.empty((n, channels), dtype=torch.int32, device=device)
    by_mask = normalize == "mask"
    if by_mask:
        scale = torch.empty((), dtype=torch.float64, device=device)
    else:
        scale = torch.full((), fixed_scale(atlas, normalize), dtype=torch.float64, device=device)
    totals = torch.zeros(2, dtype=torch.int64, device=device)
    planes = n * channels
    rank = rank - 2**32 if rank >= 2**31 else rank  # as an int64 it would compile the kernel anew
    draw_kernel[(triton.cdiv(planes, DRAW_BLOCK),)](
        seed, atlas.on(device).counts, starts, totals, scale, planes, channels, atlas.height, atlas.width, rank,
        SCALE=by_mask, BLOCK=DRAW_BLOCK,
    )  # fmt: skip
    return starts, scale


def apply(x: torch.Tensor, atlas: Atlas, starts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The masked product, in x's memory format. Formats other than contiguous and channels_last are copied first."""
    y = torch.empty_like(x)
    tables = atlas.on(x.device)
    if x.is_contiguous():
        _apply_contiguous(x, y, tables, atlas, starts, scale)
    elif x.is_contiguous(memory_format=torch.channels_last):
        _apply_channels_last(x, y, tables, atlas, starts, scale)
    else:
        dense = x.contiguous()
        _apply_contiguous(dense, dense, tables, atlas, starts, scale)
        y.copy_(dense)
    return y


def _apply_contiguous(
    x: torch.Tensor, y: torch.Tensor, tables: DeviceTables, atlas: Atlas, starts: torch.Tensor, scale: torch.Tensor
) -> None:
    n, c, height, width = x.shape
    fragments = tables.rows * triton.cdiv(tables.row_cells, 8)
    planes_of_tile, fragments_of_tile, fragment_blocks = tile_shape(fragments)
    grain = _grain(width)
    apply_kernel[(triton.cdiv(n * c, planes_of_tile) * fragment_blocks,)](
        x, y, starts, tables.fragments, scale, n * c, c // starts.shape[1], height, width // grain, fragment_blocks,
        tables.pitch, tables.step, tables.start_step,
        GRAIN=grain, CELLS_GRAIN=_grain(height * width), ROWS=tables.start_step == 0,
        PLANES=planes_of_tile, FRAGMENTS=fragments_of_tile, num_warps=WARPS,
    )  # fmt: skip


def _apply_channels_last(
    x: torch.Tensor, y: torch.Tensor, tables: DeviceTables, atlas: Atlas, starts: torch.Tensor, scale: torch.Tensor
) -> None:
    n, c, height, width = x.shape
    fragments = tables.rows * triton.cdiv(tables.row_cells, 8)
    channels_of_tile = min(64, triton.next_power_of_2(c))
    fragments_of_tile = min(TILE // 8 // channels_of_tile, triton.next_power_of_2(fragments))
    fragment_blocks = triton.cdiv(fragments, fragments_of_tile)
    channel_blocks = triton.cdiv(c, channels_of_tile)
    grain = _grain(c)
    apply_channels_last_kernel[(n * fragment_blocks * channel_blocks,)](
        x, y, starts, tables.fragments, scale, c // grain, starts.shape[1], height, width, fragment_blocks,
        channel_blocks, tables.pitch, tables.step, tables.start_step,
        CHANNELS_GRAIN=grain, ROWS=tables.start_step == 0,
        FRAGMENTS=fragments_of_tile, CHANNELS=channels_of_tile, num_warps=WARPS,
    )  # fmt: skip


def tile_shape(fragments: int) -> tuple[int, int, int]:
    """Planes and fragments of a tile, and tiles per plane, for planes of so many fragments.

    The longest power of two whose last tile wastes at most a sixteenth; else the one that wastes least, at least 8.
    """
    longest = min(128, triton.next_power_of_2(fragments))
    lengths = [length for length in (128, 64, 32, 16, 8, 4, 2, 1) if min(8, longest) <= length <= longest]
    padded = {length: triton.cdiv(fragments, length) * length for length in lengths}
    fitting = [length for length in lengths if padded[length] * 16 <= fragments * 17]
    length = fitting[0] if fitting else min(lengths, key=lambda length: (padded[length], -length))
    return TILE // 8 // length, length, padded[length] // length


def _grain(number: int) -> int:
    """The largest power of two up to 16 that divides the number: what vector accesses can build on."""
    return min(16, number & -number)
