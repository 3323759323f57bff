"""Triton kernels of tiled pattern dropout: one small one over the placements, one over the activation.

`draw_kernel` runs Philox once per plane, counter (channel or 0, 0, sample, rank), writes 4 bytes a plane and, for
normalize="mask", adds up the dropped cells; the program that arrives last divides. `apply_kernel` (contiguous) and
`apply_channels_last_kernel` read each element once and write it once; forward and backward are the same kernel.
Nothing of the pattern is compiled in: a kernel sees the map, the table and the placements, so that a new pattern, seed
or scale reuses the compiled code.

The mask comes in bytes of 8 cells that follow each other in a window (`DeviceTables.fragments_of`). A thread gathers
the bits of its elements in one or two words, then tests and selects in registers (words_triton.py):

- contiguous: a tile is a run of memory, whatever planes it crosses, cut into fragments of 16 bytes, what one access
  moves: 8 cells of bfloat16, one byte of the table. So 7x7 maps are moved as 32x32 maps are. Where a fragment passes
  the end of its plane, the byte of the next plane is shifted in behind. 32 elements a thread.
- channels_last: a thread has 16 bytes of channels in 8 cells, and a byte of the table for each channel.

Both take 7.5 SASS instructions an element on sm_90 in bfloat16 where planes hold a multiple of 8 cells, up to 10.3
where they do not (8.5 and 14.3 in float32); tests/test_machine_code.py holds them to it. In tiles of several axes the
first is that of a thread's registers: Triton spreads the last ones over threads.

Scale: a float64 in memory, rounded to the compute type in the kernel; as a Python number it would be compiled in or
passed as float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .atlas import Atlas
from .atlas import DeviceTables
from .warps import warp_size
from .words_triton import byte_of_row
from .words_triton import divisor
from .words_triton import opaque
from .words_triton import product
from .words_triton import product_of_pairs
from .words_triton import quotient
from .words_triton import wide_quotient

# Bytes that one access moves.
ACCESS = 16

# 32 elements a thread: as many as a word has bits, and 4 loads of 16 bytes in flight for bfloat16 (8 for float32). By
# compiled code only; no GPU has timed them yet. With more threads two would share a word, and both gather it (20
# instructions an element instead of 15 on gfx942, for 4 warps of 64).
THREADS = 128
TILE = 32 * THREADS

# Shares of a thread, 16 bytes of channels in 8 cells, in a tile of the channels_last kernel.
VECTORS = 128

# Planes that a program of draw_kernel places.
DRAW_BLOCK = 1024

# Arguments of which nothing is compiled in, not even that they are divisible by 16: a divisor is three of them.
DIVISORS = ("cells", "channels", "height", "width", "period", "per_sample", "per_fragment", "per_row")
PARTS = ("", "_reciprocal", "_shift")
SIZES = ("elements", "vectors", "start_step", *(name + part for name in DIVISORS for part in PARTS))


# ---- device helpers ------------------------------------------------------------------------------------------------


@triton.jit
def _below(word, n):
    """A Philox word as an integer in [0, n)."""
    return ((word.to(tl.uint64) * n.to(tl.uint64)) >> 32).to(tl.int32)


# ---- kernels -------------------------------------------------------------------------------------------------------


# Not on the seed either: an element of a tensor of seeds is aligned to 8 bytes only, and would compile the kernel anew.
@triton.jit(do_not_specialize=("rank", "seed_ptr", "planes", *SIZES))
def draw_kernel(
    seed_ptr,  # int64
    counts_ptr,  # int32 (W * (2H-1)), dropped cells by start
    starts_ptr,  # int32 (planes), written
    totals_ptr,  # int64 (2), zeros: dropped cells so far, programs that have added theirs
    scale_ptr,  # float64, written if SCALE
    planes,
    channels,
    channels_reciprocal,
    channels_shift,
    height,
    width,
    rank,  # int32 with the bits of the uint32
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # There may be 2^31 planes and more. One division in 64 bits finds the sample of the first, 32 bits do for the rest.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    first_sample = wide_quotient(first, channels_reciprocal, channels_shift)
    inside = tl.arange(0, BLOCK) < tl.minimum(planes - first, BLOCK).to(tl.int32)
    channel = (first - first_sample * channels).to(tl.int32) + tl.arange(0, BLOCK)
    samples_on = quotient(channel, channels_reciprocal, channels_shift)
    channel = channel - samples_on * channels
    sample = first_sample.to(tl.int32) + samples_on
    zero = channel * 0
    w0, w1, _, _ = tl.philox(tl.load(seed_ptr), channel, zero, sample, zero + rank)
    start = _below(w1, zero + width) * (2 * height - 1) + height - 1 - _below(w0, zero + height)
    tl.store(starts_ptr + first + tl.arange(0, BLOCK), start, mask=inside)
    if SCALE:
        dropped = tl.sum(tl.load(counts_ptr + start, mask=inside, other=0).to(tl.int64))
        tl.atomic_add(totals_ptr, dropped)
        # Release and acquire: who sees all the others' arrivals sees their sums.
        arrived = tl.atomic_add(totals_ptr + 1, 1)
        if arrived == tl.num_programs(0) - 1:
            size = planes.to(tl.int64) * height * width
            kept = size - tl.atomic_add(totals_ptr, 0)
            scale = size.to(tl.float64) / tl.maximum(kept, 1).to(tl.float64)
            tl.store(scale_ptr, tl.where(kept > 0, scale, 0.0))


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    x_ptr,  # (N, C, H, W), contiguous
    y_ptr,  # the same, written
    starts_ptr,  # int32 (N, 1 or C)
    fragments_ptr,  # uint8, one for every GRAIN-th cell
    scale_ptr,  # float64
    elements,
    cells,  # of a plane
    cells_reciprocal,
    cells_shift,
    channels,  # that share a start
    channels_reciprocal,
    channels_shift,
    height,
    height_reciprocal,
    height_shift,
    width,
    width_reciprocal,
    width_shift,
    period,  # 2 * height - 1
    period_reciprocal,
    period_shift,
    start_step,  # bytes of the flat table from one start to the next
    LOG_GRAIN: tl.constexpr,
    ROWS: tl.constexpr,  # the table has rows, because the flat one would be too large
    SHARED: tl.constexpr,
    SPANS: tl.constexpr,  # planes (or rows) that a fragment touches at most
    TAIL: tl.constexpr,  # the last tile ends amid "nothing", its fragments, or the "elements" of a fragment
    PAIRS: tl.constexpr,  # numbers of 16 bits that may be read two by two
    THREADS: tl.constexpr,
    TILE: tl.constexpr,  # 32 elements for each thread
    LANES: tl.constexpr,  # elements of a fragment
):
    first = tl.program_id(0).to(tl.int64) * TILE
    first_plane = wide_quotient(first, cells_reciprocal, cells_shift)
    first_cell = (first - first_plane * cells).to(tl.int32)
    if SHARED:
        first_start = wide_quotient(first_plane, channels_reciprocal, channels_shift)
        first_channel = (first_plane - first_start * channels).to(tl.int32)
        starts_ptr += first_start
    else:
        starts_ptr += first_plane
    room = tl.minimum(elements - first, TILE).to(tl.int32)

    # The bits of the fragments of a thread side by side in a word.
    words = tl.zeros([THREADS], tl.int32)
    for i in tl.static_range(TILE // (THREADS * LANES)):
        element = (i * THREADS + tl.arange(0, THREADS)) * LANES
        inside = tl.full([THREADS], 1, tl.int1) if TAIL == "nothing" else element < room
        # A segment is what follows each other in the table as it does in memory: a plane, or a row of it. Counted from
        # the first one of the first plane.
        at = first_cell + element
        if ROWS:
            segment = quotient(at, width_reciprocal, width_shift)
            length = width
        else:
            segment = quotient(at, cells_reciprocal, cells_shift)
            length = cells
        for span in tl.static_range(SPANS):
            # Where, from the fragment's first element on, this segment begins: behind it, but for the first one.
            begin = (segment + span) * length - at
            here = inside
            if span > 0:
                here = begin < (LANES if TAIL == "nothing" else tl.minimum(room - element, LANES))
            plane = segment + span
            if ROWS:
                plane = quotient(segment + span, height_reciprocal, height_shift)
                row = segment + span - plane * height
            which = plane
            if SHARED:
                which = quotient(first_channel + plane, channels_reciprocal, channels_shift)
            start = tl.load(starts_ptr + which, mask=here)
            if ROWS:
                byte = byte_of_row(start, row, width, period, period_reciprocal, period_shift)
            else:
                byte = start * start_step
            if span == 0:
                bits = tl.load(fragments_ptr + (byte - (begin >> LOG_GRAIN)), mask=here).to(tl.int32)
            else:
                after = tl.load(fragments_ptr + byte, mask=here, other=0).to(tl.int32)
                begin = tl.minimum(begin, LANES)
                bits = (bits & ((1 << begin) - 1)) | (after << begin)
        if SPANS > 1:
            bits &= (1 << LANES) - 1
        words |= bits << LANES * i

    scale = tl.load(scale_ptr)
    if not PAIRS:
        words = opaque(words, scale)
    x_ptr += first
    y_ptr += first
    fragment = tl.arange(0, TILE // (THREADS * LANES))[:, None, None]
    element = fragment * (THREADS * LANES) + (tl.arange(0, THREADS) * LANES)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    if TAIL == "nothing":
        there = tl.full([1, THREADS, 1], 1, tl.int1)
    elif TAIL == "fragments":
        there = element < room
    else:
        there = element + lane < room
    if PAIRS:
        pair = tl.arange(0, LANES // 2)[None, None, :]
        pairs = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + (element // 2 + pair), mask=there)
        first_kept = (words[None, :, None] & (1 << LANES * fragment + 2 * pair)) != 0
        second_kept = (words[None, :, None] & (2 << LANES * fragment + 2 * pair)) != 0
        y = product_of_pairs(pairs, first_kept, second_kept, scale, y_ptr.dtype.element_ty)
        y = y.reshape(TILE // (THREADS * LANES), THREADS, LANES)
    else:
        kept = (words[None, :, None] & (1 << LANES * fragment + lane)) != 0
        y = product(tl.load(x_ptr + (element + lane), mask=there), kept, scale)
    tl.store(y_ptr + (element + lane), y, mask=there)


@triton.jit(do_not_specialize=SIZES)
def apply_channels_last_kernel(
    x_ptr,  # (N, C, H, W) in the order of memory N, H, W, C
    y_ptr,  # the same, written
    starts_ptr,  # int32 (N, 1 or C)
    fragments_ptr,  # uint8, one for every GRAIN-th cell
    scale_ptr,  # float64
    vectors,  # of LANES channels in 8 cells, in the whole tensor
    per_sample,  # vectors
    per_sample_reciprocal,
    per_sample_shift,
    per_fragment,  # vectors of all channels in the same 8 cells
    per_fragment_reciprocal,
    per_fragment_shift,
    per_row,  # fragments of 8 cells in a row of the map
    per_row_reciprocal,
    per_row_shift,
    height,
    width,
    period,  # 2 * height - 1
    period_reciprocal,
    period_shift,
    start_step,  # bytes of the flat table from one start to the next
    LOG_GRAIN: tl.constexpr,
    ROWS: tl.constexpr,  # the table has rows, because the flat one would be too large
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,  # fragments are of 8 cells without exception
    FULL: tl.constexpr,  # and tiles are full
    PAIRS: tl.constexpr,  # numbers of 16 bits that may be read two by two
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,  # channels of a vector
):
    channels = per_fragment * LANES
    first = tl.program_id(0).to(tl.int64) * VECTORS
    first_sample = wide_quotient(first, per_sample_reciprocal, per_sample_shift)
    vector = (first - first_sample * per_sample).to(tl.int32) + tl.arange(0, VECTORS)
    if FULL:
        inside = tl.full([VECTORS], 1, tl.int1)
    else:
        inside = tl.arange(0, VECTORS) < tl.minimum(vectors - first, VECTORS).to(tl.int32)
    sample = quotient(vector, per_sample_reciprocal, per_sample_shift)
    vector -= sample * per_sample
    fragment = quotient(vector, per_fragment_reciprocal, per_fragment_shift)
    channel = (vector - fragment * per_fragment) * LANES
    if ROWS:
        row = quotient(fragment, per_row_reciprocal, per_row_shift)
        column = (fragment - row * per_row) * 8
        cell = row * width + column
        row_cells = width
    else:
        cell = fragment * 8
        column = cell
        row_cells = height * width

    # The bytes of a thread's channels side by side in a word; where pairs are read, of every other one in each of two.
    starts_ptr += first_sample * (1 if SHARED else channels)
    words = channel * 0
    second_words = channel * 0
    for i in tl.static_range(1 if SHARED else LANES):
        start = tl.load(starts_ptr + (sample if SHARED else sample * channels + channel + i), mask=inside)
        if ROWS:
            byte = byte_of_row(start, row, width, period, period_reciprocal, period_shift) + column
        else:
            byte = start * start_step + (column >> LOG_GRAIN)
        bits = tl.load(fragments_ptr + byte, mask=inside).to(tl.int32)
        if not PAIRS:
            words |= bits << 8 * i
        elif i % 2 == 0:
            words |= bits << 4 * i
        else:
            second_words |= bits << 4 * (i - 1)
    scale = tl.load(scale_ptr)
    words = opaque(words, scale)
    second_words = words if SHARED else opaque(second_words, scale)

    eight = tl.arange(0, 8)
    place = (first_sample + sample) * (height * width) + cell
    offset = (place * channels + channel)[None, :, None]
    there = inside[None, :]
    if not WHOLE:
        there = there & (column[None, :] + eight[:, None] < row_cells)
    there = there[:, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    further = (eight * channels)[:, None, None]
    y_ptrs = (y_ptr + offset) + (further + lane)
    if PAIRS:
        pair = tl.arange(0, LANES // 2)[None, None, :]
        selected = (1 << eight)[:, None, None] << (0 if SHARED else 8 * pair)
        x_ptrs = (x_ptr + offset).to(tl.pointer_type(tl.int32)) + ((further // 2) + pair)
        x = tl.load(x_ptrs, mask=there)
        first_kept = (words[None, :, None] & selected) != 0
        second_kept = (second_words[None, :, None] & selected) != 0
        y = product_of_pairs(x, first_kept, second_kept, scale, y_ptr.dtype.element_ty).reshape(8, VECTORS, LANES)
    else:
        selected = (1 << eight)[:, None, None] << (0 if SHARED else 8 * lane)
        x = tl.load((x_ptr + offset) + (further + lane), mask=there)
        y = product(x, (words[None, :, None] & selected) != 0, scale)
    tl.store(y_ptrs, y, mask=there)


# ---- launchers -----------------------------------------------------------------------------------------------------


def draw(
    seed: torch.Tensor, n: int, c: int, atlas: Atlas, share_c: bool, normalize: str, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Placements as int32 (n, 1 or c) and the scale as a 0-d float64 tensor, both on the device of seed."""
    from .placements import fixed_scale

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
        seed, atlas.on(device).counts, starts, totals, scale, planes, *divisor(channels),
        atlas.height, atlas.width, rank, SCALE=by_mask, BLOCK=DRAW_BLOCK,
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
    c, height, width = x.shape[1:]
    lanes = ACCESS // x.element_size()
    fragments, grain = tables.fragments_of(lanes)
    segment = height * width if tables.flat else width
    # From the last cell of a segment on, lanes - 1 cells are left for others.
    spans = 1 if segment % lanes == 0 else 1 + triton.cdiv(lanes - 1, segment)
    tails = ((TILE, "nothing"), (lanes, "fragments"), (1, "elements"))
    tail = next(tail for unit, tail in tails if x.numel() % unit == 0)
    apply_kernel[(triton.cdiv(x.numel(), TILE),)](
        x, y, starts, fragments, scale, x.numel(), *divisor(height * width), *divisor(c), *divisor(height),
        *divisor(width), *divisor(2 * height - 1), width // grain,
        LOG_GRAIN=grain.bit_length() - 1, ROWS=not tables.flat, SHARED=starts.shape[1] < c, SPANS=spans, TAIL=tail,
        PAIRS=x.element_size() == 2 and tail != "elements" and _aligned(x),
        THREADS=THREADS, TILE=TILE, LANES=lanes,
        num_warps=THREADS // warp_size(),
    )  # fmt: skip


def _apply_channels_last(
    x: torch.Tensor, y: torch.Tensor, tables: DeviceTables, atlas: Atlas, starts: torch.Tensor, scale: torch.Tensor
) -> None:
    n, c, height, width = x.shape
    pairs = x.element_size() == 2 and c % 2 == 0 and _aligned(x)
    # Bytes of 4 channels fill a word, and there are two words where pairs are read.
    lanes = min(ACCESS // x.element_size(), 8 if pairs else 4, c & -c)
    fragments, grain = tables.fragments_of(8)
    rows, row_cells = (1, height * width) if tables.flat else (height, width)
    per_row = triton.cdiv(row_cells, 8)
    per_sample = rows * per_row * (c // lanes)
    apply_channels_last_kernel[(triton.cdiv(n * per_sample, VECTORS),)](
        x, y, starts, fragments, scale, n * per_sample, *divisor(per_sample), *divisor(c // lanes),
        *divisor(per_row), height, width, *divisor(2 * height - 1), width // grain,
        LOG_GRAIN=grain.bit_length() - 1, ROWS=not tables.flat, SHARED=starts.shape[1] < c, WHOLE=row_cells % 8 == 0,
        FULL=n * per_sample % VECTORS == 0, PAIRS=pairs, VECTORS=VECTORS, LANES=lanes,
        num_warps=THREADS // warp_size(),
    )  # fmt: skip


def _aligned(x: torch.Tensor) -> bool:
    return x.data_ptr() % ACCESS == 0
