"""Triton kernels of DropBlock: a small one over the planes sets bits, one over the activation reads them.

`draw_blocks_kernel` gives every plane the number of its blocks and their corners (the Philox counters of block.py) and
ORs each block into a bitmap that was zeroed before: one bit a cell, in the order of memory of the activation, so that
`apply_bits_kernel` needs no coordinates at all. Each element is read once and written once; forward and backward are
the same kernels, and the bitmap is drawn again in backward, not saved.

Bytes per element beyond that read and write: a bit zeroed, a bit read, and the words under blocks changed: 1/4 of a
byte, 3% of what an fp32 activation moves and 6% in 16 bits. With shared channels the bitmap has one plane a sample.

Order of the bits, where element i of memory is bit `i mod 8` of byte `i div 8`:

- contiguous: as above, over the whole tensor; a fragment of 8 elements may lie in two planes.
- contiguous, shared channels: the cells of a sample follow each other, at `pitch` bits a sample. Where H*W is no
  multiple of 8 the plane is repeated behind itself, so that a fragment that runs into the next channel is one run.
- channels_last: byte `(cell div 8) * C + c` holds 8 successive cells of a channel, `cell` counted over all samples:
  neighbours in memory then read neighbouring bytes. With shared channels there is one byte for all of them.

A block is one run of bits, `(b_h - 1) * W + b_w` long with gaps between its rows, because no block leaves its map: the
host lays it out once per geometry (`Run`), and a block is that run, shifted. Nothing of the rate or of the block size
is compiled in. ORs commute, so that the bits do not depend on the order of programs.

normalize="mask": the OR returns what was set before, so each dropped cell is counted once, by who set it; the program
that arrives last divides. x is not read.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from .block import Geometry
from .launch_triton import grain_of
from .warps import warp_size

# Elements of a tile and warps that share it: 32 elements a thread.
TILE = 4096
WARPS = 4

# Calls of Philox that a program makes at most, two blocks each. Where planes are large and few, more programs share
# the blocks of a plane; all of them draw its number of blocks.
CALLS = 8

# Programs along the second axis of a grid at most, in CUDA.
GRID = 65_535


# ---- device helpers ------------------------------------------------------------------------------------------------


@triton.jit
def _below(word, n):
    """A Philox word as an integer in [0, n)."""
    return ((word.to(tl.uint64) * n.to(tl.uint64)) >> 32).to(tl.int32)


@triton.jit
def _count_bits(word):
    """The number of ones of a uint32, as int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _masked_product(x, bits, scale):
    """`x * scale` in the compute type, cast to x's type; 0 where the bit is set, whatever x holds there."""
    kept = bits == 0
    if x.dtype == tl.float64:
        return tl.where(kept, x * scale, 0.0)
    return tl.where(kept, x.to(tl.float32) * scale.to(tl.float32), 0.0).to(x.dtype)


# ---- kernels -------------------------------------------------------------------------------------------------------


# What a rate or a block size decides is not specialised on: it would compile the kernel anew. Nor is the seed: an
# element of a tensor of seeds is aligned to 8 bytes only.
@triton.jit(do_not_specialize=["seed_ptr", "rank", "tops", "lefts", "half", "steps", "words"])
def draw_blocks_kernel(
    seed_ptr,  # int64
    thresholds_ptr,  # int64, padded with 2^32 to 2 * half - 1 entries
    run_ptr,  # int32, the bits of a block from its corner: words of 32 bits, or of 8 if INTERLEAVED
    bits_ptr,  # int32, zeros: the bitmap
    totals_ptr,  # int64 (2), zeros: dropped cells so far, programs that have added theirs
    scale_ptr,  # float64, written if SCALE
    planes,
    channels,  # 1 where they share
    cells,  # H * W
    pitch,  # bits from one sample to the next, if not INTERLEAVED; of planes of one sample it is `cells`
    width,
    copies,  # of a plane, one behind the other
    rank,  # int32 with the bits of the uint32
    tops,  # positions of a block
    lefts,
    half,
    steps,  # halvings until `half` is gone
    words,  # of the run, shifted
    INTERLEAVED: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    CALLS: tl.constexpr,
):
    # There may be 2^31 planes and more: then `planes` comes in 64 bits, and the division that finds the sample of the
    # first is one in 64 bits (100 instructions more); 32 bits do for the rest.
    first = (tl.program_id(0) + (planes - planes)) * BLOCK
    inside = first + tl.arange(0, BLOCK) < planes
    first_sample = first // channels
    channel = (first - first_sample * channels).to(tl.int32) + tl.arange(0, BLOCK)
    samples_on = channel // channels
    channel = channel - samples_on * channels
    sample = first_sample.to(tl.int32) + samples_on
    zero = channel * 0
    seed = tl.load(seed_ptr)

    word, _, _, _ = tl.philox(seed, channel, zero, sample, zero + rank)
    number = zero
    for step in range(steps):
        jump = half >> step
        threshold = tl.load(thresholds_ptr + (number + jump - 1))
        number = tl.where(threshold <= word.to(tl.int64), number + jump, number)
    number = tl.where(inside, number, 0)

    copy = tl.program_id(1) % copies
    if INTERLEAVED:
        corner = sample.to(tl.int64) * cells
    else:
        corner = sample.to(tl.int64) * pitch + channel.to(tl.int64) * cells + copy * cells
    dropped = zero
    most = tl.max(number)
    first_call = tl.program_id(1) // copies * CALLS
    for call in range(first_call, tl.minimum(first_call + CALLS, (most + 1) // 2)):
        w0, w1, w2, w3 = tl.philox(seed, channel, zero + (1 + call), sample, zero + rank)
        for j in tl.static_range(2):
            there = 2 * call + j < number
            if j == 0:
                place = corner + (_below(w0, zero + tops) * width + _below(w1, zero + lefts))
            else:
                place = corner + (_below(w2, zero + tops) * width + _below(w3, zero + lefts))
            # A program without a second block is common on small maps.
            before = tl.load(run_ptr) * 0
            for k in range(tl.where(2 * call + j < most, words, 0)):
                now = tl.load(run_ptr + k)
                if INTERLEAVED:
                    value = (((now << 8) | before) >> (8 - (place & 7).to(tl.int32))) & 0xFF
                    byte = ((place >> 3) + k) * channels + channel
                    target = byte >> 2
                    value = value << ((byte & 3) * 8).to(tl.int32)
                else:
                    pair = (now.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | before.to(tl.uint32, bitcast=True)
                    value = (pair >> (32 - (place & 31)).to(tl.uint64)).to(tl.uint32).to(tl.int32, bitcast=True)
                    target = (place >> 5) + k
                sets = there & (value != 0)
                if SCALE:
                    # A lane that sets nothing may be handed anything.
                    old = tl.atomic_or(bits_ptr + target, value, mask=sets, sem="relaxed")
                    fresh = tl.where(sets, value & ~old, 0)
                    dropped += _count_bits(fresh.to(tl.uint32, bitcast=True))
                else:
                    tl.atomic_or(bits_ptr + target, value, mask=sets, sem="relaxed")
                before = now
    if SCALE:
        tl.atomic_add(totals_ptr, tl.sum(dropped.to(tl.int64)))
        # Release and acquire: who sees all the others' arrivals sees their sums.
        arrived = tl.atomic_add(totals_ptr + 1, 1)
        if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:
            size = tl.full((), 1, tl.int64) * planes * cells  # an argument of 1 is a constant and has no `to`
            kept = size - tl.atomic_add(totals_ptr, 0)
            quotient = size.to(tl.float64) / tl.maximum(kept, 1).to(tl.float64)
            tl.store(scale_ptr, tl.where(kept > 0, quotient, 0.0))


@triton.jit
def apply_bits_kernel(
    x_ptr,  # contiguous
    y_ptr,  # the same, written
    bits_ptr,  # uint8, readable up to the end of the last tile
    scale_ptr,  # float64
    run_units,  # elements of a sample if SHARED, else of x, are run_units * GRAIN
    tiles,  # of a run
    cells,  # H * W
    pitch,  # bytes from one sample to the next
    SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,  # H * W is a multiple of 8
    GRAIN: tl.constexpr,
    TILE: tl.constexpr,
):
    run = tl.full((), GRAIN, tl.int64) * run_units
    fragment = tl.arange(0, TILE // 8)
    if SHARED:
        sample = (tl.program_id(0) // tiles).to(tl.int64)
        first = (tl.program_id(0) % tiles).to(tl.int64) * TILE
        # Unsigned, as a remainder of signed numbers takes a third more.
        cell = ((first % cells).to(tl.int32) + fragment * 8).to(tl.uint32) % (fragment * 0 + cells).to(tl.uint32)
        cell = cell.to(tl.int32)
        byte = bits_ptr + sample * pitch + (cell >> 3)
        bits = tl.load(byte).to(tl.int32)
        if not ALIGNED:
            bits = (bits | (tl.load(byte + 1).to(tl.int32) << 8)) >> (cell & 7)
        start = sample * run
    else:
        first = tl.program_id(0).to(tl.int64) * TILE
        bits = tl.load(bits_ptr + first // 8 + fragment).to(tl.int32)
        start = first * 0
    lane = tl.arange(0, 8)
    place = fragment[:, None] * 8 + lane[None, :]
    inside = place < run - first
    x = tl.load(x_ptr + (start + first) + place, mask=inside, other=0.0)
    y = _masked_product(x, bits[:, None] & (1 << lane)[None, :], tl.load(scale_ptr))
    tl.store(y_ptr + (start + first) + place, y, mask=inside)


@triton.jit
def apply_bits_channels_last_kernel(
    x_ptr,  # (N, C, H, W) in the order of memory N, H, W, C
    y_ptr,  # the same, written
    bits_ptr,  # uint8
    scale_ptr,  # float64
    cells,  # N * H * W
    channel_units,  # the channels are channel_units * GRAIN
    channel_blocks,
    SHARED: tl.constexpr,
    GRAIN: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = channel_units * GRAIN
    channel = (tl.program_id(0) % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    first = (tl.program_id(0) // channel_blocks).to(tl.int64) * FRAGMENTS
    fragment = tl.arange(0, FRAGMENTS)
    in_map = first * 8 + fragment * 8 < cells
    if SHARED:
        bits = tl.load(bits_ptr + first + fragment, mask=in_map, other=0)[:, None]
    else:
        in_row = in_map[:, None] & (channel < channels)[None, :]
        byte = bits_ptr + (first + fragment).to(tl.int64)[:, None] * channels + channel[None, :]
        bits = tl.load(byte, mask=in_row, other=0)
    # The cells of a fragment come first, so that a thread holds all of them: it then reads each byte once.
    lane = tl.arange(0, 8)
    place = first * 8 + (fragment[None, :, None] * 8 + lane[:, None, None])
    offset = place * channels + channel[None, None, :]
    inside = (place < cells) & (channel < channels)[None, None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    y = _masked_product(x, bits.to(tl.int32)[None, :, :] & (1 << lane)[:, None, None], tl.load(scale_ptr))
    tl.store(y_ptr + offset, y, mask=inside)


# ---- launchers -----------------------------------------------------------------------------------------------------


class Run:
    """A block as one run of bits on maps of a width, and the thresholds, on a device.

    Attributes:
        words: int32 tensor, the bits of a block from its corner on, 32 a word, and a last word that is zero.
        bytes: the same, 8 a word.
        thresholds: int64 tensor, padded with 2^32 to 2 * half - 1 entries.
        half, steps: the first jump of a binary search in them, and how many jumps there are.
    """

    def __init__(self, blocks: Geometry, width: int, device: torch.device) -> None:
        rows, columns = blocks.block
        run = np.zeros((rows, width), dtype=np.uint8)
        run[:, :columns] = 1
        flat = run.reshape(-1)[: (rows - 1) * width + columns]

        def packed(bits: int) -> np.ndarray[Any, Any]:
            # Shifted by up to bits - 1; nothing is left to the word behind.
            padded = np.zeros(math.ceil((len(flat) + bits - 1) / bits) * bits, dtype=np.uint8)
            padded[: len(flat)] = flat
            return np.packbits(padded, bitorder="little").view(f"<u{bits // 8}")

        self.words = torch.from_numpy(packed(32).view(np.int32)).to(device)
        self.bytes = torch.from_numpy(packed(8).astype(np.int32)).to(device)
        count = len(blocks.thresholds)
        self.steps = count.bit_length()
        self.half = 1 << (self.steps - 1) if count else 0
        padded = torch.full((max(1, 2 * self.half - 1),), 2**32, dtype=torch.int64)
        padded[:count] = blocks.thresholds
        self.thresholds = padded.to(device)


@lru_cache(maxsize=256)
def run_of(blocks: Geometry, width: int, device: torch.device) -> Run:
    """The run of a geometry, copied to the device once."""
    return Run(blocks, width, device)


def draw(
    bits: torch.Tensor,
    shape: tuple[int, int, int, int],
    blocks: Geometry,
    seed: torch.Tensor,
    rank: int,
    *,
    pitch: int,
    copies: int = 1,
    interleaved: bool = False,
    scale: torch.Tensor | None = None,
) -> None:
    """ORs the blocks of the planes of `shape` (channels 1 where they share) into `bits`, int32 zeros.

    `scale`, a 0-d float64 tensor, receives Size / Sum of the mask. `pitch` and `copies` as the kernel describes them.
    """
    n, channels, height, width = shape
    device = bits.device
    run = run_of(blocks, width, device)
    words = run.bytes if interleaved else run.words
    calls, most = CALLS, (len(blocks.thresholds) + 1) // 2
    while triton.cdiv(most, calls) * copies > GRID:
        calls *= 2
    chunks = triton.cdiv(most, calls)
    if not chunks:
        if scale is not None:
            scale.fill_(1.0)
        return
    totals = torch.zeros(2, dtype=torch.int64, device=device) if scale is not None else bits
    rank = rank - 2**32 if rank >= 2**31 else rank  # as an int64 it would compile the kernel anew
    # A program is one warp, a plane a lane, and makes as many calls of Philox as the fullest of its planes needs.
    planes = warp_size()
    draw_blocks_kernel[(triton.cdiv(n * channels, planes), chunks * copies)](
        seed, run.thresholds, words, bits, totals, bits if scale is None else scale, n * channels, channels,
        height * width, pitch, width, copies, rank, *blocks.positions, run.half, run.steps, len(words),
        INTERLEAVED=interleaved, SCALE=scale is not None, BLOCK=planes, CALLS=calls, num_warps=1,
    )  # fmt: skip


def mask_scale(
    shape: tuple[int, int, int, int], blocks: Geometry, seed: torch.Tensor, share_c: bool, rank: int
) -> torch.Tensor:
    """Size / Sum of the mask of a call with x of this shape (not empty), a 0-d float64 tensor; 0 if nothing is kept."""
    n, c, height, width = shape
    channels = 1 if share_c else c
    cells = height * width
    bits = torch.zeros(triton.cdiv(n * channels * cells, 32), dtype=torch.int32, device=seed.device)
    scale = torch.empty((), dtype=torch.float64, device=seed.device)
    draw(bits, (n, channels, height, width), blocks, seed, rank, pitch=channels * cells, scale=scale)
    return scale


def apply(
    x: torch.Tensor, blocks: Geometry, seed: torch.Tensor, scale: torch.Tensor, share_c: bool, rank: int
) -> torch.Tensor:
    """The masked product, in x's memory format. Formats other than contiguous and channels_last are copied first."""
    y = torch.empty_like(x)
    if x.is_contiguous():
        _apply_contiguous(x, y, blocks, seed, scale, share_c, rank)
    elif x.is_contiguous(memory_format=torch.channels_last):
        _apply_channels_last(x, y, blocks, seed, scale, share_c, rank)
    else:
        dense = x.contiguous()
        _apply_contiguous(dense, dense, blocks, seed, scale, share_c, rank)
        y.copy_(dense)
    return y


def _apply_contiguous(
    x: torch.Tensor,
    y: torch.Tensor,
    blocks: Geometry,
    seed: torch.Tensor,
    scale: torch.Tensor,
    share_c: bool,
    rank: int,
) -> None:
    n, c, height, width = x.shape
    cells = height * width
    aligned = cells % 8 == 0
    # A fragment begins in the plane and takes the 7 cells that follow, of as many copies as that needs.
    copies = 1 if aligned or not share_c else 1 + triton.cdiv(7, cells)
    pitch = triton.cdiv(copies * cells, 8) * 8 if share_c else c * cells
    run = c * cells if share_c else x.numel()
    tile = min(TILE, max(8, triton.next_power_of_2(run)))
    tiles = triton.cdiv(run, tile)
    # A byte more than the planes have, for the second byte of an unaligned fragment.
    size = triton.cdiv(n * pitch + 8, 32) if share_c else triton.cdiv(tiles * tile, 32)
    bits = torch.zeros(size, dtype=torch.int32, device=x.device)
    shape = (n, 1 if share_c else c, height, width)
    draw(bits, shape, blocks, seed, rank, pitch=pitch, copies=copies)
    grain = grain_of(run)
    apply_bits_kernel[(tiles * (n if share_c else 1),)](
        x, y, bits.view(torch.uint8), scale, run // grain, tiles, cells, pitch // 8,
        SHARED=share_c, ALIGNED=aligned, GRAIN=grain, TILE=tile, num_warps=WARPS,
    )  # fmt: skip


def _apply_channels_last(
    x: torch.Tensor,
    y: torch.Tensor,
    blocks: Geometry,
    seed: torch.Tensor,
    scale: torch.Tensor,
    share_c: bool,
    rank: int,
) -> None:
    n, c, height, width = x.shape
    cells = n * height * width
    fragments = triton.cdiv(cells, 8)
    channels = 1 if share_c else c
    bits = torch.zeros(triton.cdiv(fragments * channels, 4), dtype=torch.int32, device=x.device)
    shape = (n, channels, height, width)
    draw(bits, shape, blocks, seed, rank, pitch=height * width, interleaved=not share_c)
    channels_of_tile = channel_tile(c)
    fragments_of_tile = TILE // 8 // channels_of_tile
    channel_blocks = triton.cdiv(c, channels_of_tile)
    grain = grain_of(c)
    apply_bits_channels_last_kernel[(triton.cdiv(fragments, fragments_of_tile) * channel_blocks,)](
        x, y, bits.view(torch.uint8), scale, cells, c // grain, channel_blocks,
        SHARED=share_c, GRAIN=grain, FRAGMENTS=fragments_of_tile, CHANNELS=channels_of_tile, num_warps=WARPS,
    )  # fmt: skip


def channel_tile(channels: int) -> int:
    """Channels of a tile: the most, up to 64, of which the last tile wastes at most a sixteenth; at least 8."""
    longest = min(64, triton.next_power_of_2(channels))
    while longest > 8 and triton.cdiv(channels, longest) * longest * 16 > channels * 17:
        longest //= 2
    return longest
