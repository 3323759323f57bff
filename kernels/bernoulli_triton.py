"""Triton kernels of Bernoulli dropout: one over the activation, forward and backward, and one that counts for "mask".

Each apply kernel reads an element once and writes it once, and draws its decisions itself: four words of a Philox call,
counter `((i div 4) mod 2^32, (i div 4) div 2^32, sample, rank)`, are four decisions in a row. Which kernel runs depends
on where in memory decision i lies (`Form`), so that accesses are as wide as memory allows in every case:

- `cells_kernel`: (sample, outer, decisions). A thread holds 16 bytes that follow each other, the cells of one or two
  calls. Dropout; and, with the calls of a tile shared by its rows, channels_last SpatialDropout, variational dropout.
- `rows_kernel`: (sample, outer, decision, inner). One decision a row of `inner` cells: SpatialDropout, DropPath, word
  dropout. Rows that are dropped are not read.
- `odd_rows_kernel`: the same where rows begin amid accesses, 7x7 maps: a tile is a run of memory in fragments of 16
  bytes, each with the decisions of the two rows that it may touch as bits of a word. What is dropped as a whole is not
  read.
- `strided_kernel`: (sample, places, channels) with decision channel * places + place: Dropout in channels_last. A
  thread holds 16 bytes of channels at four places; where channels begin amid a call at eight, for one call more.

Nothing of the rate, the seed or the rank is compiled in. `count_kernel` draws the decisions once more and reads no
activation; the program that arrives last divides. The scale is a float64 in memory, rounded to the compute type in the
kernel; as a Python number it would be compiled in or passed as float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .bernoulli_form import Form
from .bernoulli_form import form_of
from .bernoulli_form import is_laid_out_as
from .launch_triton import as_int32
from .launch_triton import grain_of
from .launch_triton import tile_length
from .philox_triton import philox
from .warps import warp_size
from .words_triton import divisor
from .words_triton import product
from .words_triton import quotient
from .words_triton import wide_quotient

# Elements of a tile and warps that share it: 32 elements a thread. By compiled code only; no GPU has timed them yet.
TILE = 4096
WARPS = 4

# Calls whose places are a run of strided_kernel where a channel begins amid a call: it draws one more.
LONG_RUN = 2

# Philox calls of a program of count_kernel.
COUNT_BLOCK = 1024


# Arguments of which nothing is compiled in.
SIZES = (
    "elements",
    *(name + part for name in ("rows_of_sample", "decisions", "inner") for part in ("", "_reciprocal", "_shift")),
)


# ---- device helpers ------------------------------------------------------------------------------------------------


@triton.jit
def _product(x, scale):
    """`x * scale` in the compute type, cast to x's type."""
    if x.dtype == tl.float64:
        return x * scale
    else:
        return (x.to(tl.float32) * scale.to(tl.float32)).to(x.dtype)


@triton.jit
def _fourth(which, w0, w1, w2, w3):
    """Word number `which` of four."""
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


# ---- kernels -------------------------------------------------------------------------------------------------------


# Not on the seed either: an element of a tensor of seeds is aligned to 8 bytes only, and would compile the kernel anew.
@triton.jit(do_not_specialize=["threshold", "rank", "seed_ptr"])
def cells_kernel(
    x_ptr,  # (samples, outer, decisions)
    y_ptr,  # the same, written
    seed_ptr,  # int64
    scale_ptr,  # float64
    threshold,  # int32 with the bits of the uint32; so is rank
    rank,
    rows,  # samples, or outer where OUTER
    decision_units,  # the decisions are decision_units * GRAIN, which tells the compiler what they are divisible by
    row_blocks,
    fragment_blocks,
    GRAIN: tl.constexpr,
    OUTER: tl.constexpr,  # a tile lies in one sample and its rows share their calls; else outer is 1
    ROWS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    CALLS: tl.constexpr,  # of a fragment: 1 or 2
):
    decisions = tl.cast(decision_units, tl.int64) * GRAIN
    block = tl.program_id(0)
    first = (block % fragment_blocks).to(tl.int64) * FRAGMENTS
    block = block // fragment_blocks
    first_row = (block % row_blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    rows_left = tl.minimum(rows - first_row, ROWS).to(tl.int32)
    if OUTER:
        sample = tl.full((1, 1), 0, tl.int32) + block // row_blocks
        first_row += (block // row_blocks).to(tl.int64) * rows
    else:
        sample = (first_row.to(tl.int32) + row)[:, None]

    # A tile begins at a multiple of its length, so that the upper word is the same in all of it.
    call = first * CALLS
    low = call.to(tl.int32) + tl.arange(0, FRAGMENTS)[None, :] * CALLS
    high = (call >> 32).to(tl.int32)
    seed = tl.load(seed_ptr)
    bound = threshold.to(tl.uint32)
    lane = tl.arange(0, 4 * CALLS)[None, None, :]
    w0, w1, w2, w3 = philox(seed, low, high, sample, rank)
    word = _fourth(lane, w0[:, :, None], w1[:, :, None], w2[:, :, None], w3[:, :, None])
    if CALLS == 2:
        w4, w5, w6, w7 = philox(seed, low + 1, high, sample, rank)
        second = _fourth(lane - 4, w4[:, :, None], w5[:, :, None], w6[:, :, None], w7[:, :, None])
        word = tl.where(lane < 4, word, second)

    # From here in 32 bits: rows are longer than 16 tiles only where a tile has but one (`_tile`).
    cell = tl.arange(0, FRAGMENTS)[None, :, None] * (4 * CALLS) + lane
    offset = (row * (decision_units * GRAIN))[:, None, None] + cell
    cells_left = tl.minimum(decisions - first * (4 * CALLS), FRAGMENTS * 4 * CALLS).to(tl.int32)
    inside = (row < rows_left)[:, None, None] & (cell < cells_left)
    begin = first_row * decisions + first * (4 * CALLS)
    x = tl.load((x_ptr + begin) + offset, mask=inside, other=0.0)
    tl.store((y_ptr + begin) + offset, tl.where(word >= bound, _product(x, tl.load(scale_ptr)), 0.0), mask=inside)


@triton.jit(do_not_specialize=["threshold", "rank", "seed_ptr"])
def rows_kernel(
    x_ptr,  # (samples, outer, decisions, inner)
    y_ptr,  # the same, written
    seed_ptr,  # int64
    scale_ptr,  # float64
    threshold,  # int32 with the bits of the uint32; so is rank
    rank,
    rows,  # samples * outer * decisions
    rows_of_sample,  # outer * decisions
    decisions,
    inner_units,  # inner is inner_units * GRAIN
    inner_blocks,
    GRAIN: tl.constexpr,
    WIDE: tl.constexpr,  # 2^31 rows and more
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    inner = tl.cast(inner_units, tl.int64) * GRAIN
    block = tl.program_id(0)
    if WIDE:
        row = (block // inner_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    else:
        row = (block // inner_blocks) * ROWS + tl.arange(0, ROWS)
    sample = row // rows_of_sample
    decision = (row - sample * rows_of_sample) % decisions
    call = decision // 4
    if WIDE:
        high = (call >> 32).to(tl.int32)
    else:
        high = tl.full((1,), 0, tl.int32)
    w0, w1, w2, w3 = philox(tl.load(seed_ptr), call, high, sample, rank)
    kept = _fourth(decision % 4, w0, w1, w2, w3) >= threshold.to(tl.uint32)

    cell = (block % inner_blocks).to(tl.int64) * INNER + tl.arange(0, INNER)
    offset = (row.to(tl.int64) * inner)[:, None] + cell[None, :]
    inside = (row < rows)[:, None] & (cell < inner)[None, :]
    x = tl.load(x_ptr + offset, mask=inside & kept[:, None], other=0.0)
    tl.store(y_ptr + offset, _product(x, tl.load(scale_ptr)), mask=inside)


@triton.jit(do_not_specialize=["threshold", "rank", "seed_ptr", *SIZES])
def odd_rows_kernel(
    x_ptr,  # (samples, outer, decisions, inner)
    y_ptr,  # the same, written
    seed_ptr,  # int64
    scale_ptr,  # float64
    threshold,  # int32 with the bits of the uint32; so is rank
    rank,
    elements,
    rows_of_sample,  # outer * decisions
    rows_of_sample_reciprocal,
    rows_of_sample_shift,
    decisions,
    decisions_reciprocal,
    decisions_shift,
    inner,
    inner_reciprocal,
    inner_shift,
    OUTER: tl.constexpr,  # outer is not 1
    TAIL: tl.constexpr,  # the last tile ends amid "nothing", its fragments, or the "elements" of a fragment
    FRAGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * (FRAGMENTS * LANES)
    first_row = wide_quotient(first, inner_reciprocal, inner_shift)
    first_sample = wide_quotient(first_row, rows_of_sample_reciprocal, rows_of_sample_shift)
    element = tl.arange(0, FRAGMENTS) * LANES
    at = (first - first_row * inner).to(tl.int32) + element
    rows_on = quotient(at, inner_reciprocal, inner_shift)
    # The lane where the next row begins.
    begin = (rows_on + 1) * inner - at
    first_row = (first_row - first_sample * rows_of_sample).to(tl.int32)
    seed = tl.load(seed_ptr)
    bits = element * 0
    for k in tl.static_range(2):
        row = first_row + rows_on + k
        samples_on = quotient(row, rows_of_sample_reciprocal, rows_of_sample_shift)
        decision = row - samples_on * rows_of_sample
        if OUTER:
            decision -= quotient(decision, decisions_reciprocal, decisions_shift) * decisions
        sample = first_sample.to(tl.int32) + samples_on
        w0, w1, w2, w3 = philox(seed, decision >> 2, tl.full((1,), 0, tl.int32), sample, rank)
        kept = _fourth(decision & 3, w0, w1, w2, w3) >= threshold.to(tl.uint32)
        before = (1 << tl.minimum(begin, LANES)) - 1
        bits |= tl.where(kept, before if k == 0 else (1 << LANES) - 1 - before, 0)

    place = element[:, None] + tl.arange(0, LANES)[None, :]
    room = tl.minimum(elements - first, FRAGMENTS * LANES).to(tl.int32)
    if TAIL == "nothing":
        inside = tl.full([FRAGMENTS, 1], 1, tl.int1)
    elif TAIL == "fragments":
        inside = (element < room)[:, None]
    else:
        inside = place < room
    x = tl.load((x_ptr + first) + place, mask=inside & (bits != 0)[:, None], other=0.0)
    kept = (bits[:, None] & (1 << tl.arange(0, LANES))[None, :]) != 0
    tl.store((y_ptr + first) + place, product(x, kept, tl.load(scale_ptr)), mask=inside)


@triton.jit(do_not_specialize=["threshold", "rank", "seed_ptr"])
def strided_kernel(
    x_ptr,  # (samples, places, channels), decision channel * places + place
    y_ptr,  # the same, written
    seed_ptr,  # int64
    scale_ptr,  # float64
    threshold,  # int32 with the bits of the uint32; so is rank
    rank,
    places,
    channel_units,  # the channels are channel_units * GRAIN
    run_blocks,
    channel_blocks,
    GRAIN: tl.constexpr,
    ALIGNED: tl.constexpr,  # the places are divisible by 4, so that a run has the calls of its length and not one more
    WIDE: tl.constexpr,  # 2^31 decisions a sample and more
    RUNS: tl.constexpr,
    LENGTH: tl.constexpr,  # of a run: so many times four places, a power of two
    CHANNELS: tl.constexpr,
):
    channels = channel_units * GRAIN
    block = tl.program_id(0)
    channel = (block % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    block = block // channel_blocks
    place = ((block % run_blocks) * RUNS + tl.arange(0, RUNS)) * (4 * LENGTH)
    sample = block // run_blocks
    if WIDE:
        decision = channel.to(tl.int64)[None, :] * places + place[:, None]
    else:
        decision = channel[None, :] * places + place[:, None]
        high = tl.full((1, 1), 0, tl.int32)
    if ALIGNED:
        calls: tl.constexpr = LENGTH
    else:
        calls: tl.constexpr = LENGTH + 1
    seed = tl.load(seed_ptr)
    bound = threshold.to(tl.uint32)
    of_sample = tl.full((1, 1), 0, tl.int32) + sample
    kept = tl.full((RUNS, CHANNELS), 0, tl.int32)
    for k in tl.static_range(calls):
        call = (decision >> 2) + k
        if WIDE:
            high = (call >> 32).to(tl.int32)
        w0, w1, w2, w3 = philox(seed, call, high, of_sample, rank)
        kept |= (w0 >= bound).to(tl.int32) << (4 * k)
        kept |= (w1 >= bound).to(tl.int32) << (4 * k + 1)
        kept |= (w2 >= bound).to(tl.int32) << (4 * k + 2)
        kept |= (w3 >= bound).to(tl.int32) << (4 * k + 3)
    if not ALIGNED:
        kept = kept >> (decision & 3).to(tl.int32)

    j = tl.arange(0, 4 * LENGTH)[:, None, None]
    offset = ((sample.to(tl.int64) * places + place) * channels)[:, None] + channel[None, :]
    offset = offset[None, :, :] + j * channels
    inside = (place[None, :, None] + j < places) & (channel < channels)[None, None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    # All decisions of a thread are one word up to here: else each of them would go to the thread that has its cell.
    tl.store(y_ptr + offset, product(x, (kept[None, :, :] & (1 << j)) != 0, tl.load(scale_ptr)), mask=inside)


@triton.jit(do_not_specialize=["threshold", "rank", "seed_ptr"])
def count_kernel(
    seed_ptr,  # int64
    totals_ptr,  # int64 (2), zeros: decisions kept so far, programs that have added theirs
    scale_ptr,  # float64, written
    threshold,  # int32 with the bits of the uint32; so is rank
    rank,
    samples,
    decisions,  # of a sample
    cells,  # of a decision
    WIDE: tl.constexpr,  # 2^31 decisions a sample and more
    BLOCK: tl.constexpr,
):
    # One division in 64 bits finds the sample of the first call, 32 bits do for the rest.
    calls = (tl.cast(decisions, tl.int64) + 3) // 4
    first = tl.program_id(0).to(tl.int64) * BLOCK
    first_sample = first // calls
    if WIDE:
        call = first - first_sample * calls + tl.arange(0, BLOCK)
        samples_on = (call // calls).to(tl.int32)
        call = call - samples_on * calls
        high = (call >> 32).to(tl.int32)
    else:
        call = (first - first_sample * calls).to(tl.int32) + tl.arange(0, BLOCK)
        samples_on = call // calls.to(tl.int32)
        call = call - samples_on * calls.to(tl.int32)
        high = tl.full((1,), 0, tl.int32)
    sample = first_sample.to(tl.int32) + samples_on
    w0, w1, w2, w3 = philox(tl.load(seed_ptr), call, high, sample, rank)
    bound = threshold.to(tl.uint32)
    left = tl.where(first_sample + samples_on < samples, decisions - 4 * call.to(tl.int64), 0)
    kept = ((left > 0) & (w0 >= bound)).to(tl.int32) + ((left > 1) & (w1 >= bound)).to(tl.int32)
    kept += ((left > 2) & (w2 >= bound)).to(tl.int32) + ((left > 3) & (w3 >= bound)).to(tl.int32)
    tl.atomic_add(totals_ptr, tl.sum(kept).to(tl.int64))
    # Release and acquire: who sees all the others' arrivals sees their sums.
    arrived = tl.atomic_add(totals_ptr + 1, 1)
    if arrived == tl.num_programs(0) - 1:
        total = tl.atomic_add(totals_ptr, 0) * cells
        size = tl.cast(samples, tl.int64) * decisions * cells
        quotient = size.to(tl.float64) / tl.maximum(total, 1).to(tl.float64)
        tl.store(scale_ptr, tl.where(total > 0, quotient, 0.0))


# ---- launchers -----------------------------------------------------------------------------------------------------


def scale_of_mask(
    seed: torch.Tensor, samples: int, decisions: int, size: int, threshold: int, rank: int
) -> torch.Tensor:
    """Size / Sum of the mask as a 0-d float64 tensor, 0 if nothing is kept. `decisions` are those of a sample."""
    scale = torch.zeros((), dtype=torch.float64, device=seed.device)
    if threshold == 2**32:
        return scale
    totals = torch.zeros(2, dtype=torch.int64, device=seed.device)
    count_kernel[(triton.cdiv(samples * triton.cdiv(decisions, 4), COUNT_BLOCK),)](
        seed, totals, scale, as_int32(threshold), as_int32(rank), samples, decisions, size // (samples * decisions),
        WIDE=decisions >= 2**31, BLOCK=COUNT_BLOCK,
    )  # fmt: skip
    return scale


def apply(
    x: torch.Tensor, shared: Sequence[int], threshold: int, seed: torch.Tensor, scale: torch.Tensor, rank: int
) -> torch.Tensor:
    """The masked product, in x's memory format; x is not empty, threshold in [0, 2^32).

    Formats with gaps are copied first; so are those of which `form_of` knows nothing, with the shared dimensions last.
    """
    y = torch.empty_like(x)
    source = x
    if not is_laid_out_as(x, y):
        source = y.copy_(x)
    form = form_of(y.shape, y.stride(), shared)
    if form is not None:
        _launch(source, y, form, threshold, seed, scale, rank)
        return y
    own = [dim for dim in range(x.dim()) if dim not in shared]
    dense = source.permute(*own, *shared).contiguous()
    samples = 1 if 0 in shared else x.shape[0]
    inner = 1
    for dim in shared:
        inner *= x.shape[dim]
    _launch(dense, dense, Form(samples, 1, dense.numel() // inner // samples, inner), threshold, seed, scale, rank)
    y.permute(*own, *shared).copy_(dense)
    return y


def _launch(
    x: torch.Tensor, y: torch.Tensor, form: Form, threshold: int, seed: torch.Tensor, scale: torch.Tensor, rank: int
) -> None:
    common = (x, y, seed, scale, as_int32(threshold), as_int32(rank))
    lanes = 8 if x.element_size() == 2 else 4
    if form.places:
        _launch_strided(common, form, lanes)
    elif form.inner >= 8 and form.inner % lanes and max(form.inner, form.outer * form.decisions) < 2**31 - TILE:
        _launch_odd_rows(common, form)
    elif form.inner > 1:
        rows = form.samples * form.outer * form.decisions
        length, blocks = tile_length(form.inner, TILE)
        height = TILE // length
        grain = grain_of(form.inner)
        rows_kernel[(triton.cdiv(rows, height) * blocks,)](
            *common, rows, form.outer * form.decisions, form.decisions, form.inner // grain, blocks,
            GRAIN=grain, WIDE=rows >= 2**31 - height, ROWS=height, INNER=length, num_warps=WARPS,
        )  # fmt: skip
    else:
        fragments, blocks = tile_length(triton.cdiv(form.decisions, lanes), TILE // lanes)
        rows = form.outer if form.outer > 1 else form.samples
        height = TILE // lanes // fragments
        row_blocks = triton.cdiv(rows, height)
        grain = grain_of(form.decisions)
        cells_kernel[(row_blocks * blocks * (form.samples if form.outer > 1 else 1),)](
            *common, rows, form.decisions // grain, row_blocks, blocks,
            GRAIN=grain, OUTER=form.outer > 1, ROWS=height, FRAGMENTS=fragments, CALLS=lanes // 4, num_warps=WARPS,
        )  # fmt: skip


def _launch_odd_rows(common: tuple[torch.Tensor | int, ...], form: Form) -> None:
    x = common[0]
    assert isinstance(x, torch.Tensor)
    lanes = 16 // x.element_size()
    tails = ((TILE, "nothing"), (lanes, "fragments"), (1, "elements"))
    odd_rows_kernel[(triton.cdiv(x.numel(), TILE),)](
        *common, x.numel(), *divisor(form.outer * form.decisions), *divisor(form.decisions), *divisor(form.inner),
        OUTER=form.outer > 1, TAIL=next(tail for unit, tail in tails if x.numel() % unit == 0),
        FRAGMENTS=TILE // lanes, LANES=lanes, num_warps=WARPS,
    )  # fmt: skip


def _launch_strided(common: tuple[torch.Tensor | int, ...], form: Form, lanes: int) -> None:
    channels = form.decisions // form.places
    vectors = WARPS * warp_size() * lanes  # elements of 16 bytes for each thread, place by place
    aligned = form.places % 4 == 0
    length = 1 if aligned else LONG_RUN
    runs, longest = triton.cdiv(form.places, 4 * length), triton.next_power_of_2(channels)
    # Of all tiles that give each thread 16 bytes, and a run of channels at least 8 times that: the least padded.
    heights = [1 << k for k in range(13) if vectors >> k >= min(8 * lanes, longest)]
    padded = {k: triton.cdiv(runs, k) * k * triton.cdiv(channels, vectors // k) * (vectors // k) for k in heights}
    height = min(heights, key=lambda k: (padded[k], k))
    width = vectors // height
    run_blocks, channel_blocks = triton.cdiv(runs, height), triton.cdiv(channels, width)
    grain = grain_of(channels)
    strided_kernel[(form.samples * run_blocks * channel_blocks,)](
        *common, form.places, channels // grain, run_blocks, channel_blocks,
        GRAIN=grain, ALIGNED=aligned, WIDE=form.decisions >= 2**31, RUNS=height, LENGTH=length, CHANNELS=width,
        num_warps=WARPS,
    )  # fmt: skip
