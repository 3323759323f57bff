"""Triton kernels of attention with a token pattern: one forward, two backward, none of which stores a weight.

Programs of `forward_kernel` and `dq_kernel` own a tile of query rows and go over the keys; those of `dkv_kernel` own a
tile of keys and go over the rows, with all tiles transposed, so that sums over rows need no other layout. No atomics:
the same input gives the same bits.

Counter layout: call (c div 4, 1 + cell_t, sample, rank) with c = head * queries + query decides for the same key of 4
channels that follow each other. Tiles of rows therefore begin at a multiple of 4 channels, which may lie up to 3 rows
before the head: those are neither read nor written. So one call serves 4 elements in every tile. cell_t comes from
`cells_kernel` of token_draw_triton.py, 4 bytes a key and sample.

Bytes: forward reads q, and k and v once a tile of rows, and writes out and lse; `dq_kernel` reads out besides and the
gradient, and writes delta, 4 bytes a row; `dkv_kernel` reads k and v once, and the rest once a tile of keys.

Scores, sums and results are fp32; weights and their gradients are rounded to the dtype of the tensors before they are
multiplied. Products of fp32 are exact to fp32 (no TF32).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch_triton import as_int32
from .philox_triton import philox
from .token_draw_triton import cells_of

# Rows, keys, warps and stages of a program, for 16 bits and for fp32, whose products take registers instead of NVIDIA's
# tensor cores: the largest of those tried that spill nothing on any target for heads of 32, 64, 96 and 128. (AMD's take
# one stage.) By compiled code only; no GPU has timed them yet.
FORWARD = {2: (64, 32, 4, 2), 4: (16, 32, 8, 1)}
DQ = {2: (64, 32, 4, 2), 4: (16, 32, 4, 2)}
DKV = {2: (16, 64, 4, 2), 4: (16, 32, 8, 1)}

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# ---- device helpers ------------------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    """a b in fp32. Triton's interpreter would multiply the bits of bfloat16 as integers, and so gets fp32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tile(ptr, stride, row, inside, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of one head, [rows, WIDTH], 0 where they are not inside."""
    d = tl.arange(0, WIDTH)
    if HEAD == WIDTH:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (d < HEAD)[None, :]
    return tl.load(ptr + (row[:, None] * stride + d[None, :]), mask=mask, other=0.0)


@triton.jit
def _store(ptr, stride, row, inside, x, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    mask = inside[:, None] & (d < HEAD)[None, :]
    tl.store(ptr + (row[:, None] * stride + d[None, :]), x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dropped(call, cell, sample, seed, last, rank, SHARE_C: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """The decisions of a tile, [4 calls, keys] or the other way round, of size 1 where channels share them.

    Cells are loaded with 0 behind the last key, where weights are 0: Triton 3.2 cannot pipeline another number.
    """
    if SHARE_C:
        if KEYS_FIRST:
            return (cell >= 0)[:, None]
        else:
            return (cell >= 0)[None, :]
    else:
        if KEYS_FIRST:
            c, t = call[None, :], cell[:, None]
        else:
            c, t = call[:, None], cell[None, :]
        w0, w1, w2, w3 = philox(seed, c, 1 + t, sample, sample * 0 + rank)
        largest = (sample * 0 + last).to(tl.uint32, bitcast=True)
        bits = (w0 <= largest).to(tl.int32) | ((w1 <= largest).to(tl.int32) << 1)
        bits = bits | ((w2 <= largest).to(tl.int32) << 2) | ((w3 <= largest).to(tl.int32) << 3)
        bits = tl.where(t >= 0, bits, 0)
        j = tl.arange(0, 4)
        # Four bits a number move between threads as one.
        if KEYS_FIRST:
            spread = tl.reshape((bits[:, :, None] >> j[None, None, :]) & 1, (cell.shape[0], 4 * call.shape[0]))
        else:
            spread = tl.reshape((bits[:, None, :] >> j[None, :, None]) & 1, (4 * call.shape[0], cell.shape[0]))
        return spread != 0


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed_ptr", "last", "rank"])
def forward_kernel(
    q_ptr,  # (N, H, Q, HEAD), of any strides but for HEAD
    k_ptr,  # (N, H, K, HEAD)
    v_ptr,
    out_ptr,  # like q, written
    lse_ptr,  # fp32 (N, H, Q), written
    cells_ptr,  # int32 (N, K)
    seed_ptr,  # int64
    scale_ptr,  # float64
    q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, out_n, out_h, out_t,
    heads,
    queries,
    keys,
    row_blocks,
    factor,
    last,
    rank,
    CAUSAL: tl.constexpr,
    SHARE_C: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % row_blocks
    head = tl.program_id(0) // row_blocks
    sample = head // heads
    n, h = sample.to(tl.int64), (head - sample * heads).to(tl.int64)
    first = ((head - sample * heads) * queries) // 4
    before = ((head - sample * heads) * queries) % 4
    row = block * ROWS + tl.arange(0, ROWS) - before
    inside = (row >= 0) & (row < queries)
    call = first + block * (ROWS // 4) + tl.arange(0, ROWS // 4)
    sees = tl.maximum(row, 0) + (keys - queries)
    seed = tl.load(seed_ptr)
    k_ptr += n * k_n + h * k_h
    v_ptr += n * v_n + h * v_h

    q = _tile(q_ptr + n * q_n + h * q_h, q_t, row, inside, HEAD, WIDTH)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, (block + 1) * ROWS - before + keys - queries)
    for start in range(0, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        k = _tile(k_ptr, k_t, key, key < keys, HEAD, WIDTH)
        cell = tl.load(cells_ptr + n * keys + key, mask=key < keys, other=0)
        dropped = _dropped(call, cell, sample, seed, last, rank, SHARE_C, False)
        scores = _dot(q, tl.trans(k), UPCAST) * (factor * LOG2_E)
        seen = (key < keys)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= sees[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        # Dropped weights are part of the softmax: they leave after the sum.
        total = total * shrink + tl.sum(weights, 1)
        weights = tl.where(dropped, 0.0, weights)
        v = _tile(v_ptr, v_t, key, key < keys, HEAD, WIDTH)
        acc = acc * shrink[:, None] + _dot(weights.to(v.dtype), v, UPCAST)
        largest = larger
    acc = acc * (tl.load(scale_ptr).to(tl.float32) / total)[:, None]
    _store(out_ptr + n * out_n + h * out_h, out_t, row, inside, acc, HEAD, WIDTH)
    tl.store(lse_ptr + head.to(tl.int64) * queries + row, (largest + tl.log2(total)) * LN_2, mask=inside)


@triton.jit(do_not_specialize=["seed_ptr", "last", "rank"])
def dq_kernel(
    grad_ptr,  # (N, H, Q, HEAD)
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dq_ptr,  # written
    lse_ptr,  # fp32 (N, H, Q)
    delta_ptr,  # likewise, written: sum of grad * out
    cells_ptr,
    seed_ptr,
    scale_ptr,
    grad_n, grad_h, grad_t, q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, out_n, out_h, out_t, dq_n, dq_h, dq_t,
    heads,
    queries,
    keys,
    row_blocks,
    factor,
    last,
    rank,
    CAUSAL: tl.constexpr,
    SHARE_C: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % row_blocks
    head = tl.program_id(0) // row_blocks
    sample = head // heads
    n, h = sample.to(tl.int64), (head - sample * heads).to(tl.int64)
    first = ((head - sample * heads) * queries) // 4
    before = ((head - sample * heads) * queries) % 4
    row = block * ROWS + tl.arange(0, ROWS) - before
    inside = (row >= 0) & (row < queries)
    call = first + block * (ROWS // 4) + tl.arange(0, ROWS // 4)
    sees = tl.maximum(row, 0) + (keys - queries)
    seed = tl.load(seed_ptr)
    k_ptr += n * k_n + h * k_h
    v_ptr += n * v_n + h * v_h
    of_row = head.to(tl.int64) * queries + row

    grad = _tile(grad_ptr + n * grad_n + h * grad_h, grad_t, row, inside, HEAD, WIDTH)
    out = _tile(out_ptr + n * out_n + h * out_h, out_t, row, inside, HEAD, WIDTH)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + of_row, delta, mask=inside)
    q = _tile(q_ptr + n * q_n + h * q_h, q_t, row, inside, HEAD, WIDTH)
    lse = tl.load(lse_ptr + of_row, mask=inside, other=0.0) * LOG2_E
    scale = tl.load(scale_ptr).to(tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, (block + 1) * ROWS - before + keys - queries)
    for start in range(0, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        k = _tile(k_ptr, k_t, key, key < keys, HEAD, WIDTH)
        v = _tile(v_ptr, v_t, key, key < keys, HEAD, WIDTH)
        cell = tl.load(cells_ptr + n * keys + key, mask=key < keys, other=0)
        dropped = _dropped(call, cell, sample, seed, last, rank, SHARE_C, False)
        weights = tl.exp2(_dot(q, tl.trans(k), UPCAST) * (factor * LOG2_E) - lse[:, None])
        seen = (key < keys)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= sees[:, None])
        weights = tl.where(seen, weights, 0.0)
        of_weights = tl.where(dropped, 0.0, _dot(grad, tl.trans(v), UPCAST)) * scale
        of_scores = weights * (of_weights - delta[:, None])
        acc += _dot(of_scores.to(k.dtype), k, UPCAST)
    _store(dq_ptr + n * dq_n + h * dq_h, dq_t, row, inside, acc * factor, HEAD, WIDTH)


@triton.jit(do_not_specialize=["seed_ptr", "last", "rank"])
def dkv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dk_ptr,  # (N, H, K, HEAD), written
    dv_ptr,  # likewise
    lse_ptr,
    delta_ptr,
    cells_ptr,
    seed_ptr,
    scale_ptr,
    grad_n, grad_h, grad_t, q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, dk_n, dk_h, dk_t, dv_n, dv_h, dv_t,
    heads,
    queries,
    keys,
    key_blocks,
    factor,
    last,
    rank,
    CAUSAL: tl.constexpr,
    SHARE_C: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % key_blocks
    head = tl.program_id(0) // key_blocks
    sample = head // heads
    n, h = sample.to(tl.int64), (head - sample * heads).to(tl.int64)
    first = ((head - sample * heads) * queries) // 4
    before = ((head - sample * heads) * queries) % 4
    key = block * KEYS + tl.arange(0, KEYS)
    seed = tl.load(seed_ptr)
    cell = tl.load(cells_ptr + n * keys + key, mask=key < keys, other=0)
    grad_ptr += n * grad_n + h * grad_h
    q_ptr += n * q_n + h * q_h
    lse_ptr += head.to(tl.int64) * queries
    delta_ptr += head.to(tl.int64) * queries

    k = _tile(k_ptr + n * k_n + h * k_h, k_t, key, key < keys, HEAD, WIDTH)
    v = _tile(v_ptr + n * v_n + h * v_h, v_t, key, key < keys, HEAD, WIDTH)
    scale = tl.load(scale_ptr).to(tl.float32)
    dk = tl.zeros((KEYS, WIDTH), tl.float32)
    dv = tl.zeros((KEYS, WIDTH), tl.float32)
    begin = 0
    if CAUSAL:
        # The first row that sees the first key, at the tile of rows that it lies in.
        begin = tl.maximum(0, block * KEYS - (keys - queries) + before) // ROWS * ROWS
    for start in range(begin, queries + before, ROWS):
        row = start + tl.arange(0, ROWS) - before
        inside = (row >= 0) & (row < queries)
        call = first + start // 4 + tl.arange(0, ROWS // 4)
        q = _tile(q_ptr, q_t, row, inside, HEAD, WIDTH)
        grad = _tile(grad_ptr, grad_t, row, inside, HEAD, WIDTH)
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        dropped = _dropped(call, cell, sample, seed, last, rank, SHARE_C, True)
        weights = tl.exp2(_dot(k, tl.trans(q), UPCAST) * (factor * LOG2_E) - lse[None, :])
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (key[:, None] <= row[None, :] + (keys - queries))
        weights = tl.where(seen, weights, 0.0)
        dv += _dot(tl.where(dropped, 0.0, weights).to(grad.dtype), grad, UPCAST)
        of_weights = tl.where(dropped, 0.0, _dot(v, tl.trans(grad), UPCAST)) * scale
        of_scores = weights * (of_weights - delta[None, :])
        dk += _dot(of_scores.to(q.dtype), q, UPCAST)
    _store(dk_ptr + n * dk_n + h * dk_h, dk_t, key, key < keys, dk * factor, HEAD, WIDTH)
    _store(dv_ptr + n * dv_n + h * dv_h, dv_t, key, key < keys, dv * scale, HEAD, WIDTH)


# ---- launchers -----------------------------------------------------------------------------------------------------


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: torch.Tensor,
    fields: torch.Tensor,
    seed: torch.Tensor,
    factor: float,
    causal: bool,
    share_t: bool,
    share_c: bool,
    rank: int,
) -> None:
    """Writes out, and lse of every row."""
    n, heads, queries, _ = q.shape
    keys = k.shape[2]
    cells, _, _, last = cells_of(fields, seed, n, keys, heads * queries, share_t, share_c, rank, with_bits=False)
    tensors = [_addressed(x) for x in (q, k, v, out)]
    tile = _tile_of(q, FORWARD)
    blocks = triton.cdiv(queries + 3, tile["ROWS"])
    forward_kernel[(n * heads * blocks,)](
        *tensors, lse, cells, seed, scale, *_strides(*tensors), heads, queries, keys, blocks, factor, last,
        as_int32(rank), CAUSAL=causal, SHARE_C=share_c, **tile,
    )  # fmt: skip
    if tensors[3] is not out:
        out.copy_(tensors[3])


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scale: torch.Tensor,
    fields: torch.Tensor,
    seed: torch.Tensor,
    factor: float,
    causal: bool,
    share_t: bool,
    share_c: bool,
    rank: int,
) -> None:
    """Writes dq, dk and dv."""
    n, heads, queries, _ = q.shape
    keys = k.shape[2]
    cells, _, _, last = cells_of(fields, seed, n, keys, heads * queries, share_t, share_c, rank, with_bits=False)
    grad, q, k, v, out = (_addressed(x) for x in (grad, q, k, v, out))
    written = [_addressed(x) for x in (dq, dk, dv)]
    lse, delta = lse.contiguous(), torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    rest = {"CAUSAL": causal, "SHARE_C": share_c}
    tile = _tile_of(q, DQ)
    blocks = triton.cdiv(queries + 3, tile["ROWS"])
    tensors = [grad, q, k, v, out, written[0]]
    dq_kernel[(n * heads * blocks,)](
        *tensors, lse, delta, cells, seed, scale, *_strides(*tensors), heads, queries, keys, blocks, factor, last,
        as_int32(rank), **rest, **tile,
    )  # fmt: skip
    tile = _tile_of(q, DKV)
    blocks = triton.cdiv(keys, tile["KEYS"])
    tensors = [grad, q, k, v, *written[1:]]
    dkv_kernel[(n * heads * blocks,)](
        *tensors, lse, delta, cells, seed, scale, *_strides(*tensors), heads, queries, keys, blocks, factor, last,
        as_int32(rank), **rest, **tile,
    )  # fmt: skip
    for given, one in zip((dq, dk, dv), written, strict=True):
        if one is not given:
            given.copy_(one)


def _addressed(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it where heads have gaps or their rows are not reached by 32 bits."""
    fits = x.stride(3) == 1 and (x.shape[2] + 256) * x.stride(2) < 2**31
    return x if fits else x.contiguous()


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _tile_of(q: torch.Tensor, table: dict[int, tuple[int, int, int, int]]) -> dict[str, Any]:
    rows, keys, warps, stages = table[q.element_size()]
    return {
        "HEAD": q.shape[3],
        "WIDTH": max(16, triton.next_power_of_2(q.shape[3])),
        "ROWS": rows,
        "KEYS": keys,
        "UPCAST": q.device.type == "cpu",
        "num_warps": warps,
        "num_stages": 1 if torch.version.hip else stages,
    }
