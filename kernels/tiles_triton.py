"""Tiles of maps for kernels that mask as a part of something else, in both memory formats.

A tile is [channels, fragments, 8] of one sample: the mask comes as in tiled_triton.py, one byte for a fragment of 8
cells. LAST says that channels are what follow each other in memory (channels_last), else cells are; the compiler finds
the order of the threads from that.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .atlas import Atlas
from .launch_triton import grain_of
from .launch_triton import tile_length


@triton.jit
def _offsets(sample, channel, cell, channels, cells, LAST: tl.constexpr):
    """Where cells [..., FRAGMENTS, 8] of channels [CHANNELS] of a sample lie in memory: int64 [CHANNELS, ...]."""
    if LAST:
        return (sample.to(tl.int64) * cells + cell) * channels + channel[:, None, None]
    else:
        return (sample.to(tl.int64) * channels + channel[:, None, None]) * cells + cell


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
def _mask_of_tile(
    sample, channel, fragment, starts_ptr, starts_per_sample, fragments_ptr, channels, height, width, cells,
    pitch, step, start_step, ROWS: tl.constexpr,
):  # fmt: skip
    """Of a tile: the cells [CHANNELS or 1, FRAGMENTS, 8], whether they are in the map and a channel, and kept."""
    which = tl.where(starts_per_sample == 1, 0, channel)
    start = tl.load(starts_ptr + sample.to(tl.int64) * starts_per_sample + which, mask=channel < channels, other=0)
    byte, cell, column, in_map, row_cells = _fragment_place(
        start[:, None], fragment[None, :], height, width, cells, pitch, step, start_step, ROWS
    )
    inside = (channel < channels)[:, None] & in_map & (column < row_cells)
    bits = tl.load(fragments_ptr + byte, mask=inside, other=0)
    lane = tl.arange(0, 8)
    kept = ((bits[:, :, None] >> lane[None, None, :].to(tl.uint8)) & 1) != 0
    inside = (channel < channels)[:, None, None] & in_map[:, :, None]
    inside = inside & (column[:, :, None] + lane[None, None, :] < row_cells)
    return cell[:, :, None] + lane[None, None, :], inside, kept


class Tiling:
    """How an activation (N, C, H, W) is cut into tiles: by shape, memory format and table alone.

    Attributes:
        tables: of the atlas on x's device.
        channels, fragments: of a tile, powers of two.
        channel_blocks, fragment_blocks: tiles of a sample.
        units: channels, height and width as the kernels take them, in units of their grains.
        grains: those, and the memory format, as constants.
        tile: the sides of a tile as constants.
    """

    def __init__(self, x: torch.Tensor, atlas: Atlas, elements: int) -> None:
        """Of a dense x, into tiles of so many elements at most."""
        _, c, height, width = x.shape
        self.tables = tables = atlas.on(x.device)
        last = not x.is_contiguous()
        fragments = tables.rows * triton.cdiv(tables.row_cells, 8)
        self.channels, self.fragments = tile_shape(c, fragments, last, elements)
        self.channel_blocks = triton.cdiv(c, self.channels)
        self.fragment_blocks = triton.cdiv(fragments, self.fragments)
        grain, channels_grain = grain_of(width), grain_of(c)
        self.units = (c // channels_grain, height, width // grain)
        self.grains: dict[str, Any] = {
            "GRAIN": grain, "CELLS_GRAIN": grain_of(height * width), "CHANNELS_GRAIN": channels_grain, "LAST": last,
        }  # fmt: skip
        self.tile: dict[str, Any] = {"CHANNELS": self.channels, "FRAGMENTS": self.fragments}

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.grains["LAST"] else torch.contiguous_format

    @property
    def steps(self) -> tuple[int, int, int]:
        return self.tables.pitch, self.tables.step, self.tables.start_step


def dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def tile_shape(channels: int, fragments: int, last: bool, elements: int) -> tuple[int, int]:
    """Channels and fragments of a tile: along what follows each other in memory as long as wastes little."""
    if last:
        of_channels = min(64, triton.next_power_of_2(channels))
        return of_channels, max(1, min(elements // 8 // of_channels, triton.next_power_of_2(fragments)))
    length, _ = tile_length(fragments, 64)
    return max(1, min(elements // 8 // length, triton.next_power_of_2(channels))), length
