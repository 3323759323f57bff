"""Attention whose weights carry a token pattern (layout "NHQK"), as one op that never holds the weights.

    out = (softmax(scale * q k^T) * mask * r) v

The masks are those of `token_dropout(..., layout="NHQK")` on the weights (N, heads, queries, keys) under the same seed,
and so are their counters: call (c div 4, 1 + cell_t, n, rank) with c = head * queries + query and t the key. The
softmax runs over all keys that a query sees, dropped ones included.

Saved for backward: q, k, v, out, one number a row (lse = log of the sum of exp(score) over its keys), fields, seed and
scale. With w = p * mask * r, p = exp(score - lse), and u the gradient of out,

    dv = w^T u,    dw = u v^T,    delta = sum(u * out, -1) = sum(w * dw, -1),
    dscores = p * (dw * mask * r - delta),    dq = scale * dscores k,    dk = scale * dscores^T q.

Bytes moved on the GPU, for tiles of M queries and N keys (attention_triton.py): forward reads q once and k and v Q / M
times, which caches serve, and writes out and 4 bytes a row. Here, on the CPU, runs of rows with about 2^18 weights are
computed at a time, forward and backward; so they are on the GPU for float64 and heads of more than 128.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch

from .checks import NORMALIZE
from .checks import check_activation
from .checks import check_choice
from .checks import check_fields
from .checks import check_flag
from .devices import HAS_TRITON
from .masking import SLICE_CELLS
from .masking import boxes
from .masking import compute_type
from .philox import philox
from .seeds import Seed
from .seeds import as_rank
from .seeds import as_seed
from .token import FIELDS
from .token import _spans
from .token import check_values
from .token import read_fields
from .token import scale_of
from .with_backward import Op
from .with_backward import register_with_backward

LAYOUT = "NHQK"
IMPLEMENTATIONS = ("auto", "chunked", "triton")
LARGEST = sys.float_info.max  # a constant: Dynamo of torch 2.6 does not look into sys.float_info
WIDEST = 128  # head that the Triton kernels keep in registers


def token_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    fields: tuple[int, int, float] | torch.Tensor,
    seed: Seed = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    share_t: bool = False,
    share_c: bool = False,
    normalize: str = "expected",
    rank: int | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """`token_dropout(softmax(scale * q @ k.mT, -1), fields, seed, layout="NHQK") @ v`, weights never in memory.

    Args:
        q: queries (N, H, Q, D): samples, heads, queries, head size; float64, float32, float16 or bfloat16.
        k, v: keys and values (N, H, K, D), of q's dtype and device. With a memory K > Q, key 0 being the oldest.
        fields, seed, share_t, share_c, normalize, rank: as of `token_dropout` on the weights (N, H, Q, K); under one
            seed the masks are equal. Keys that a causal query does not see count for `normalize="mask"`.
        causal: query i sees keys 0 .. i + K - Q alone.
        scale: of the scores; None: 1 / sqrt(D).
        implementation: "triton" runs the kernels, "chunked" PyTorch on runs of rows, "auto" the kernels on a GPU for
            all but float64 and D > 128.

    Returns:
        Tensor with q's shape, dtype and memory format; 0 where there are no keys. Differentiable in q, k and v, from
        the second time on by the separate operations, which hold (N, H, Q, K) tensors; forward mode and vmap are
        refused. NaN and Inf spread as in the separate operations from what a query sees, also from dropped keys; to
        queries that do not see them they may spread or not.

    Raises:
        TypeError, ValueError: an argument is not what is stated above; the message names it.
    """
    _check_activations(q, k, v)
    check_choice("normalize", normalize, NORMALIZE)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    check_flag("causal", causal)
    check_flag("share_t", share_t)
    check_flag("share_c", share_c)
    queries, keys = q.shape[2], k.shape[2]
    if causal and keys < queries:
        raise ValueError(f"k must have at least as many keys as q queries where causal, got {keys} and {queries}")
    if isinstance(fields, torch.Tensor):
        check_fields(fields, FIELDS)
    elif not isinstance(fields, Sequence) or len(fields) != len(FIELDS):
        raise TypeError(f"fields must be (size, stride, rate) or a float64 CPU tensor of shape (3,), got {fields!r}")
    else:
        fields = torch.tensor(check_values(*fields), dtype=torch.float64, device="cpu")
    factor = _factor(scale, q.shape[3])
    use_triton = _use_triton(q, implementation)
    seed, rank = as_seed(seed, q.device), as_rank(rank)
    of_mask = scale_of(fields, seed, q.shape[0], keys, q.shape[1] * queries, share_t, share_c, normalize, rank)
    out: torch.Tensor = _op(q, k, v, fields, seed, of_mask, factor, causal, share_t, share_c, rank, use_triton)[0]
    return out


def _check_activations(q: object, k: object, v: object) -> None:
    for name, x in zip("qkv", (q, k, v), strict=True):
        check_activation(x, name)
        assert isinstance(x, torch.Tensor)
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (N, H, T, D), got shape {tuple(x.shape)}")
        assert isinstance(q, torch.Tensor)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
        if x.shape[:2] != q.shape[:2] or x.shape[3] != q.shape[3]:
            raise ValueError(
                f"{name} must have samples, heads and head size of q, shape {tuple(q.shape)}, got {tuple(x.shape)}"
            )
    assert isinstance(k, torch.Tensor)
    assert isinstance(v, torch.Tensor)
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")


def _factor(scale: object, head: int) -> float:
    if scale is None:
        return float(max(head, 1) ** -0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be None or a finite number, got {scale!r} of type {type(scale).__name__}")
    # Not by `isfinite`, which Dynamo cannot trace for a number that differs between calls.
    if not -LARGEST <= scale <= LARGEST:
        raise ValueError(f"scale must be None or a finite number, got {scale}")
    return float(scale)


def _use_triton(q: torch.Tensor, implementation: str) -> bool:
    able = HAS_TRITON and q.dtype != torch.float64 and q.shape[3] <= WIDEST
    if implementation == "triton" and not able:
        raise ValueError(
            f"implementation must be 'auto' or 'chunked' for float64, heads of more than {WIDEST} or without Triton, "
            f"got 'triton' for {q.dtype} and heads of {q.shape[3]}"
        )
    return implementation == "triton" or (implementation == "auto" and able and q.device.type == "cuda")


# ---- runs of rows --------------------------------------------------------------------------------------------------


def _dropped(
    sample: int,
    channels: slice,
    seen: int,
    keys: int,
    fields: torch.Tensor,
    seed: torch.Tensor,
    share_t: bool,
    share_c: bool,
    rank: int,
    listed: bool | None = None,
) -> torch.Tensor:
    """The decisions of some channels of a sample for its first `seen` keys: bool (channels or 1, seen), True = dropped.

    On the CPU words are drawn for covered keys only, and with `share_t` once a span. Elsewhere to list them would wait
    for the device. (`listed` says which, for tests.)
    """
    size, period, threshold = read_fields(fields)
    covered, span = (
        one[0] for one in _spans(slice(sample, sample + 1), slice(0, seen), keys, size, period, seed, rank)
    )
    cell = span if share_t else torch.arange(seen, device=seed.device)
    if listed is None:
        listed = seed.is_cpu
    if listed:
        place = covered.nonzero().squeeze(1)
        cell = cell[place]
        if share_t:
            cell, which = torch.unique_consecutive(cell, return_inverse=True)
    # Word cell_c mod 4 of call cell_c div 4.
    calls = slice(0, 1) if share_c else slice(channels.start // 4, (channels.stop + 3) // 4)
    call = torch.arange(calls.start, calls.stop, device=seed.device)[:, None]
    drawn = torch.empty((len(call), 4, len(cell)), dtype=torch.bool, device=seed.device)
    for j, word in enumerate(philox(call, 1 + cell[None], sample, rank, seed)):
        torch.lt(word, threshold, out=drawn[:, j])
    first = 0 if share_c else channels.start - 4 * calls.start
    drawn = drawn.flatten(0, 1)[first : first + (1 if share_c else channels.stop - channels.start)]
    if not listed:
        return drawn & covered
    if share_t:
        drawn = drawn.index_select(1, which)
    if len(place) == seen:
        return drawn
    return torch.zeros((len(drawn), seen), dtype=torch.bool).index_copy_(1, place, drawn)


def _runs(
    q: torch.Tensor,
    k: torch.Tensor,
    fields: torch.Tensor,
    seed: torch.Tensor,
    factor: float,
    causal: bool,
    share_t: bool,
    share_c: bool,
    rank: int,
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], torch.Tensor, torch.Tensor]]:
    """Runs of rows: where they are in q, where in k what they see, their scores, and what is dropped (broadcasts)."""
    N, H, Q, _ = q.shape
    K = k.shape[2]
    for box in boxes((N, H, Q), max(1, SLICE_CELLS // K)):
        # A box leaves out what it has in full.
        whole = [slice(0, side) for side in (N, H, Q)]
        samples, heads, rows = list(box) + whole[len(box) :]
        seen = rows.stop + K - Q if causal else K
        here, there = (samples, heads, rows), (samples, heads, slice(0, seen))
        scores = q[here].to(compute_type(q)) @ k[there].to(compute_type(q)).transpose(-1, -2)
        scores.mul_(factor)
        if causal:
            query = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            scores.masked_fill_(torch.arange(seen, device=q.device) > query + (K - Q), -torch.inf)
        channels = slice(heads.start * Q + rows.start, (heads.stop - 1) * Q + rows.stop)
        masks = [
            _dropped(n, channels, seen, K, fields, seed, share_t, share_c, rank)
            for n in range(samples.start, samples.stop)
        ]
        sides = (1, 1) if share_c else scores.shape[1:3]
        yield here, there, scores, torch.stack(masks).view(len(masks), *sides, seen)


# ---- implementations -----------------------------------------------------------------------------------------------


def _as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs it without autocast, which stays on inside an op and would make its products 16-bit ones."""

    @wraps(function)
    def run(x: torch.Tensor, *others: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *others)

    return run


@_as_written
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    fields: torch.Tensor,
    seed: torch.Tensor,
    scale: torch.Tensor,
    factor: float,
    causal: bool,
    share_t: bool,
    share_c: bool,
    rank: int,
    use_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out, and lse of every row (N, H, Q) in the compute type."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=compute_type(q))
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.zero_()
    pattern = (fields, seed, factor, causal, share_t, share_c, rank)
    if use_triton:
        from . import attention_triton

        with torch.cuda.device_of(q):  # Triton launches on the current device
            attention_triton.forward(q, k, v, out, lse, scale, *pattern)
        return out, lse
    for here, there, scores, dropped in _runs(q, k, *pattern):
        largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        lse[here] = (largest + total.log()).squeeze(-1)
        weights.div_(total).mul_(scale.to(weights.dtype)).masked_fill_(dropped, 0.0)
        out[here] = weights @ v[there].to(weights.dtype)
    return out, lse


@_as_written
def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    fields: torch.Tensor,
    seed: torch.Tensor,
    scale: torch.Tensor,
    factor: float,
    causal: bool,
    share_t: bool,
    share_c: bool,
    rank: int,
    use_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq = torch.empty_like(q)
    pattern = (fields, seed, factor, causal, share_t, share_c, rank)
    if use_triton and q.numel() and k.numel():
        from . import attention_triton

        dk, dv = torch.empty_like(k), torch.empty_like(v)
        with torch.cuda.device_of(q):
            attention_triton.backward(grad, q, k, v, out, lse, dq, dk, dv, scale, *pattern)
        return dq, dk, dv
    compute = compute_type(q)
    dk, dv = torch.zeros_like(k, dtype=compute), torch.zeros_like(v, dtype=compute)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.to(k.dtype), dv.to(v.dtype)
    for here, there, scores, dropped in _runs(q, k, *pattern):
        weights = scores.sub_(lse[here][..., None]).exp_()
        upstream = grad[here].to(compute)
        delta = (upstream * out[here]).sum(-1, keepdim=True)
        of_mask = scale.to(compute)
        masked = torch.mul(weights, of_mask).masked_fill_(dropped, 0.0)
        dv[there] += masked.transpose(-1, -2) @ upstream
        del masked
        inner = upstream @ v[there].to(compute).transpose(-1, -2)
        inner.mul_(of_mask).masked_fill_(dropped, 0.0).sub_(delta).mul_(weights).mul_(factor)
        dq[here] = inner @ k[there].to(compute)
        dk[there] += inner.transpose(-1, -2) @ q[here].to(compute)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _second_backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The gradient of the gradients, by the separate operations, which are differentiable further."""
    further = torch.is_grad_enabled()
    grad, q, k, v, fields, seed, scale = ctx.saved_tensors
    factor, causal, share_t, share_c, rank, _ = ctx.rest
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        # Views, because one tensor may be here twice.
        leaves = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (grad, q, k, v)]
        scores = leaves[1] @ leaves[2].transpose(-1, -2) * factor
        if causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
            scores = scores.masked_fill(later, -torch.inf)
        weights = torch.softmax(scores, -1)
        y = torch.ops.autodropout.token_apply(weights, fields, seed, scale, LAYOUT, share_t, share_c, rank)
        first = torch.autograd.grad(y @ leaves[3], leaves[1:], leaves[0], create_graph=True)
        used = [(one, given) for one, given in zip(first, upstream, strict=True) if given is not None]
        second = torch.autograd.grad(
            [one for one, _ in used], leaves, [given for _, given in used], create_graph=further, allow_unused=True
        )
    # out and lse are functions of q, k and v, whose part in the gradient is in theirs.
    return (*second, *([None] * 11))


# ---- registration --------------------------------------------------------------------------------------------------


def _forward_fake(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=compute_type(q))


def _backward_fake(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, fields, seed, scale, *ctx.rest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, fields, seed, scale)


def _differentiated(ctx: Any, backward: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    return *backward(grad, *ctx.saved_tensors, *ctx.rest), *([None] * 9)


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    grad, q, k, v, _, _, fields, seed, scale, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, q, k, v, fields, seed, scale)


_PATTERN = (
    "Tensor fields, Tensor seed, Tensor scale, float factor, bool causal, bool share_t, bool share_c, SymInt rank, "
    "bool use_triton"
)
_op = register_with_backward(
    Op(
        f"token_attention(Tensor q, Tensor k, Tensor v, {_PATTERN}) -> (Tensor, Tensor)",
        _forward,
        _forward_fake,
        _save,
    ),
    Op(
        f"token_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PATTERN}) "
        "-> (Tensor, Tensor, Tensor)",
        _backward,
        _backward_fake,
        _save_for_second,
    ),
    _differentiated,
    _second_backward,
)
