"""Triton kernels of token pattern dropout over the activation, forward and backward.

What depends on tokens alone is drawn before (token_draw_triton.py): cells, and with `share_t` alone decisions of spans,
packed. What depends on c and t is drawn where it is used. `apply_kernel` (channels next to each other in memory) and
`apply_keys_kernel` (tokens next to each other: attention weights) read each element once and write it once.

One Philox call gives the words of 4 channels that follow each other. In `apply_kernel` they are neighbours in memory;
in `apply_keys_kernel` they are rows, so that a tile is [4, calls, keys] and a thread holds all 4 rows of its keys.

Bytes per element beside the activation, for C channels of b bytes: 4 / C for cells, written once and read once by each
block of channels, and 1 / (8 * period) for packed decisions. Nothing of the pattern is compiled in: sizes, rates and
seeds are arguments that do not specialise. Any strides will do; vectors are full where memory allows.

Scale: a float64 in memory, rounded to the compute type in the kernel; as a Python number it would be compiled in or
passed as float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch_triton import as_int32
from .launch_triton import grain_of
from .launch_triton import tile_length
from .philox_triton import philox
from .token_draw_triton import cells_of

# Elements of a tile (half of it in float64) and warps that share it: 32 elements a thread, 8 16-byte loads of fp32. By
# compiled code only; no GPU has timed them yet.
TILE = 4096
WARPS = 4

# Fragments of a tile along what follows each other in memory, at most.
FRAGMENTS = 128


# ---- device helpers ------------------------------------------------------------------------------------------------


@triton.jit
def _word(w0, w1, w2, w3, j):
    """Word number j. Where a thread holds all of j, the comparisons are settled at compile time."""
    return tl.where(j == 0, w0, tl.where(j == 1, w1, tl.where(j == 2, w2, w3)))


@triton.jit
def _masked_product(x, dropped, scale):
    """`x * scale` in the compute type, cast to x's type; 0 where dropped, whatever x holds there."""
    # The zero is chosen before the product. LLVM would move a choice behind it past the cast, and then 16-bit results
    # are cast one by one instead of in pairs.
    if x.dtype == tl.float64:
        product = tl.where(dropped, 0.0, x) * scale
    else:
        product = (tl.where(dropped, 0.0, x.to(tl.float32)) * scale.to(tl.float32)).to(x.dtype)
    return product


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed_ptr", "spans", "last", "rank"])
def apply_kernel(
    x_ptr,
    y_ptr,  # written
    cells_ptr,  # int32 (N, T)
    bits_ptr,  # uint8 (N, spans, groups), read if SHARE_T and not SHARE_C
    seed_ptr,  # int64
    scale_ptr,  # float64
    tokens,
    parts,  # A: a channel is part * row + place in the row
    row_units,  # B: the row has row_units * GRAIN channels
    x_n,  # strides, in units of GRAIN elements
    x_t,
    x_a,
    x_b,  # in elements
    y_n,
    y_t,
    y_a,
    y_b,
    token_blocks,
    row_blocks,
    spans,
    groups,
    last,
    rank,
    GRAIN: tl.constexpr,  # what all these numbers are divisible by, which tells the compiler
    ALIGNED: tl.constexpr,  # whether the VEC channels of a fragment begin at a multiple of VEC
    SHARE_T: tl.constexpr,
    SHARE_C: tl.constexpr,
    TOKENS: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    VEC: tl.constexpr,  # 4 or 8
    WIDTH: tl.constexpr,  # elements of an access, a divisor of VEC
):
    row = row_units * GRAIN
    block = tl.program_id(0)
    row_block = block % row_blocks
    block = block // row_blocks
    token_block = block % token_blocks
    block = block // token_blocks
    part = block % parts
    sample = block // parts

    token = token_block * TOKENS + tl.arange(0, TOKENS)
    cell = tl.load(cells_ptr + sample.to(tl.int64) * tokens + token, mask=token < tokens, other=-1)
    fragment = row_block * FRAGMENTS + tl.arange(0, FRAGMENTS)
    # [accesses, 1, WIDTH] of a fragment. Accesses come first in the tile, where threads are not spread: a thread holds
    # whole fragments, hence what its Philox calls yield, even where it cannot load 16 bytes at once.
    lane = (tl.arange(0, VEC // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])[:, None, :]
    place = fragment[None, :, None] * VEC + lane
    inside = (token < tokens)[None, :, None, None] & (place < row)[:, None, :, :]
    read = inside

    covered = (cell >= 0)[None, :, None, None]
    if SHARE_C:
        # Whole tokens: what is dropped is not even read, and 0 instead.
        dropped = False
        read = inside & (cell < 0)[None, :, None, None]
    else:
        first = part * row + fragment * VEC
        channel = (part * row + place)[:, None, :, :]
        lane = lane[:, None, :, :]
        if SHARE_T:
            bits_row = (sample.to(tl.int64) * spans + tl.maximum(cell, 0)) * groups
            if ALIGNED:
                bits = tl.load(
                    bits_ptr + bits_row[:, None] + (first // 8)[None, :],
                    mask=(cell >= 0)[:, None] & (fragment * VEC < row)[None, :],
                    other=0,
                ).to(tl.int32)
                if VEC == 4:
                    bits = bits >> (first % 8)[None, :]
                dropped = ((bits[None, :, :, None] >> lane) & 1) != 0
            else:
                bits = tl.load(
                    bits_ptr + bits_row[None, :, None, None] + channel // 8,
                    mask=covered & (place < row)[:, None, :, :],
                    other=0,
                )
                dropped = ((bits.to(tl.int32) >> channel % 8) & 1) != 0
        else:
            seed = tl.load(seed_ptr)
            largest = (block * 0 + last).to(tl.uint32, bitcast=True)
            if ALIGNED:
                call = (first // 4)[None, None, :, None]
                token_word = (1 + cell)[None, :, None, None]
                w0, w1, w2, w3 = philox(seed, call, token_word, sample, sample * 0 + rank)
                word = _word(w0, w1, w2, w3, lane % 4)
                if VEC == 8:
                    w0, w1, w2, w3 = philox(seed, call + 1, token_word, sample, sample * 0 + rank)
                    word = tl.where(lane < 4, word, _word(w0, w1, w2, w3, lane % 4))
            else:
                token_word = (1 + cell)[None, :, None, None]
                w0, w1, w2, w3 = philox(seed, channel // 4, token_word, sample, sample * 0 + rank)
                word = _word(w0, w1, w2, w3, channel % 4)
            dropped = covered & (word <= largest)

    wide_sample, wide_part, wide_token = sample.to(tl.int64), part.to(tl.int64), token.to(tl.int64)[None, :, None, None]
    wide_place = place.to(tl.int64)[:, None, :, :]
    x_offset = wide_sample * x_n * GRAIN + wide_part * x_a * GRAIN + (wide_token * x_t * GRAIN + wide_place * x_b)
    y_offset = wide_sample * y_n * GRAIN + wide_part * y_a * GRAIN + (wide_token * y_t * GRAIN + wide_place * y_b)
    x = tl.load(x_ptr + x_offset, mask=read, other=0.0)
    tl.store(y_ptr + y_offset, _masked_product(x, dropped, tl.load(scale_ptr)), mask=inside)


@triton.jit(do_not_specialize=["seed_ptr", "spans", "last", "rank"])
def apply_keys_kernel(
    x_ptr,
    y_ptr,  # written
    cells_ptr,  # int32 (N, T)
    bits_ptr,  # uint8 (N, spans, groups), read if SHARE_T and not SHARE_C
    seed_ptr,  # int64
    scale_ptr,  # float64
    key_units,  # T: there are key_units * GRAIN keys
    channels,  # C
    width,  # B: a channel is a * width + b
    x_n,  # strides, in units of GRAIN elements
    x_a,
    x_b,
    x_t,  # in elements
    y_n,
    y_a,
    y_b,
    y_t,
    key_blocks,
    call_blocks,
    spans,
    groups,
    last,
    rank,
    GRAIN: tl.constexpr,
    FLAT: tl.constexpr,  # width is channels
    SHARE_T: tl.constexpr,
    SHARE_C: tl.constexpr,
    CALLS: tl.constexpr,
    KEYS: tl.constexpr,
):
    keys = key_units * GRAIN
    block = tl.program_id(0)
    key_block = block % key_blocks
    block = block // key_blocks
    call_block = block % call_blocks
    sample = block // call_blocks

    key = key_block * KEYS + tl.arange(0, KEYS)
    cell = tl.load(cells_ptr + sample.to(tl.int64) * keys + key, mask=key < keys, other=-1)
    call = call_block * CALLS + tl.arange(0, CALLS)
    j = tl.arange(0, 4)
    channel = call[None, :] * 4 + j[:, None]
    inside = (channel < channels)[:, :, None] & (key < keys)[None, None, :]

    covered = (cell >= 0)[None, None, :]
    if SHARE_C:
        dropped = covered
    elif SHARE_T:
        bits_row = (sample.to(tl.int64) * spans + tl.maximum(cell, 0)) * groups
        bits = tl.load(
            bits_ptr + bits_row[None, :] + (call // 2)[:, None],
            mask=(cell >= 0)[None, :] & (call * 4 < channels)[:, None],
            other=0,
        )
        bits = bits.to(tl.int32) >> (call % 2 * 4)[:, None]
        dropped = ((bits[None, :, :] >> j[:, None, None]) & 1) != 0
    else:
        seed = tl.load(seed_ptr)
        largest = (block * 0 + last).to(tl.uint32, bitcast=True)
        w0, w1, w2, w3 = philox(seed, call[:, None], (1 + cell)[None, :], sample, sample * 0 + rank)
        word = _word(w0[None, :, :], w1[None, :, :], w2[None, :, :], w3[None, :, :], j[:, None, None])
        dropped = covered & (word <= largest)

    if FLAT:
        x_row = channel.to(tl.int64) * x_b * GRAIN
        y_row = channel.to(tl.int64) * y_b * GRAIN
    else:
        a = channel // width
        b = (channel - a * width).to(tl.int64)
        x_row = a.to(tl.int64) * x_a * GRAIN + b * x_b * GRAIN
        y_row = a.to(tl.int64) * y_a * GRAIN + b * y_b * GRAIN
    wide_key = key.to(tl.int64)[None, None, :]
    x_offset = sample.to(tl.int64) * x_n * GRAIN + (x_row[:, :, None] + wide_key * x_t)
    y_offset = sample.to(tl.int64) * y_n * GRAIN + (y_row[:, :, None] + wide_key * y_t)
    x = tl.load(x_ptr + x_offset, mask=inside, other=0.0)
    tl.store(y_ptr + y_offset, _masked_product(x, dropped, tl.load(scale_ptr)), mask=inside)


# ---- launchers -----------------------------------------------------------------------------------------------------


def apply(
    x: torch.Tensor,
    y: torch.Tensor,
    fields: torch.Tensor,
    seed: torch.Tensor,
    scale: torch.Tensor,
    share_t: bool,
    share_c: bool,
    rank: int,
) -> None:
    """Writes the masked product of x into y, both views (N, T, A, B) of any strides, not empty."""
    n, t, a, b = x.shape
    x_strides, y_strides = _strides(x), _strides(y)
    if b == 1:  # one channel of each part: the parts are the channels
        a, b = 1, a
        x_strides, y_strides = ((*s[:2], 0, s[2]) for s in (x_strides, y_strides))
    if all(s[2] == b * s[3] for s in (x_strides, y_strides)):
        a, b = 1, a * b
    cells, bits, spans, last = cells_of(fields, seed, n, t, a * b, share_t, share_c, rank)
    both = x_strides, y_strides
    arguments = x, y, cells, bits, seed, scale
    if t > 1 and y_strides[1] == 1 and (b == 1 or y_strides[3] != 1):
        _apply_keys(arguments, both, (n, t, a, b), spans, last, share_t, share_c, rank)
    else:
        _apply_channels(arguments, both, (n, t, a, b), spans, last, share_t, share_c, rank)


def _apply_channels(
    arguments: tuple[torch.Tensor, ...],
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    sides: tuple[int, int, int, int],
    spans: int,
    last: int,
    share_t: bool,
    share_c: bool,
    rank: int,
) -> None:
    n, t, a, b = sides
    (x_n, x_t, x_a, x_b), (y_n, y_t, y_a, y_b) = strides
    vec = 8 if arguments[0].element_size() == 2 and (a == 1 or b % 8 == 0) else 4
    fragments, fragment_blocks = tile_length(triton.cdiv(b, vec), FRAGMENTS)
    tokens = min(_tile_of(arguments[0]) // vec // fragments, triton.next_power_of_2(t))
    warps = WARPS
    if tokens > 1 and triton.cdiv(2 * t, tokens) % 2:  # half of the last tile would be behind the last token
        tokens, warps = tokens // 2, WARPS // 2
    token_blocks = triton.cdiv(t, tokens)
    grain = grain_of(b, x_n, x_t, x_a, y_n, y_t, y_a)
    apply_kernel[(n * a * token_blocks * fragment_blocks,)](
        *arguments, t, a, b // grain,
        x_n // grain, x_t // grain, x_a // grain, x_b, y_n // grain, y_t // grain, y_a // grain, y_b,
        token_blocks, fragment_blocks, spans, triton.cdiv(a * b, 8), last, as_int32(rank),
        GRAIN=grain, ALIGNED=a == 1 or b % vec == 0, SHARE_T=share_t, SHARE_C=share_c,
        TOKENS=tokens, FRAGMENTS=fragments, VEC=vec, WIDTH=min(vec, grain, 16 // arguments[0].element_size()),
        num_warps=warps,
    )  # fmt: skip


def _apply_keys(
    arguments: tuple[torch.Tensor, ...],
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    sides: tuple[int, int, int, int],
    spans: int,
    last: int,
    share_t: bool,
    share_c: bool,
    rank: int,
) -> None:
    n, t, a, b = sides
    (x_n, x_t, x_a, x_b), (y_n, y_t, y_a, y_b) = strides
    vec = max(1, 16 // arguments[0].element_size())
    fragments, _ = tile_length(triton.cdiv(t, vec), FRAGMENTS)
    keys = fragments * vec
    calls = min(_tile_of(arguments[0]) // 4 // keys, triton.next_power_of_2(triton.cdiv(a * b, 4)))
    key_blocks, call_blocks = triton.cdiv(t, keys), triton.cdiv(triton.cdiv(a * b, 4), calls)
    grain = grain_of(t, x_n, x_a, x_b, y_n, y_a, y_b)
    apply_keys_kernel[(n * call_blocks * key_blocks,)](
        *arguments, t // grain, a * b, b,
        x_n // grain, x_a // grain, x_b // grain, x_t, y_n // grain, y_a // grain, y_b // grain, y_t,
        key_blocks, call_blocks, spans, triton.cdiv(a * b, 8), last, as_int32(rank),
        GRAIN=grain, FLAT=a == 1, SHARE_T=share_t, SHARE_C=share_c, CALLS=calls, KEYS=keys, num_warps=WARPS,
    )  # fmt: skip


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    """The strides, 0 where there is only one index: what PyTorch keeps there means nothing."""
    return tuple(stride if side > 1 else 0 for stride, side in zip(x.stride(), x.shape, strict=True))


def _tile_of(x: torch.Tensor) -> int:
    return TILE // 2 if x.dtype == torch.float64 else TILE
