"""Softmax over the keys and a token pattern on attention weights, as one op (layout "NHQK").

    y = softmax(scores) * mask * scale

The masks are those of `token_dropout(..., layout="NHQK")` under the same seed, and so are their counters. All is
computed in the compute type (float32, float64 for float64) and rounded once, to the type of the scores.

Saved for backward are the scores, two numbers a row (its largest score m, and the sum l of exp(score - m) as 1 / l) and
the seed; the weights p = exp(score - m) / l and the mask are computed again. With g = grad * mask * scale,

    dscores = p * (g - sum over keys of g * p).

Activations moved on the GPU: forward reads and writes one, backward reads two and writes one (the chain of the two ops:
4, and 5). On the CPU these are PyTorch's softmax and `token_apply`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .checks import NORMALIZE
from .checks import check_activation
from .checks import check_choice
from .checks import check_fields
from .checks import check_flag
from .devices import triton_runs_on
from .masking import compute_type
from .seeds import Seed
from .seeds import as_rank
from .seeds import as_seed
from .token import FIELDS
from .token import check_values
from .token import scale_of
from .token import sides_of
from .with_backward import Op
from .with_backward import register_with_backward

LAYOUT = "NHQK"
# Keys of which a row fits into the registers of one program; longer ones take the two ops.
LONGEST = 4096


def softmax_token_dropout(
    x: torch.Tensor,
    fields: tuple[int, int, float] | torch.Tensor,
    seed: Seed = None,
    share_t: bool = False,
    share_c: bool = False,
    normalize: str = "expected",
    rank: int | None = None,
) -> torch.Tensor:
    """`token_dropout(softmax(x, -1), fields, seed, layout="NHQK")`: attention weights with spans of keys dropped.

    Args:
        x: scores (N, H, Q, K): samples, heads, queries, keys; float64, float32, float16 or bfloat16, -inf where a key
            must not be seen.
        fields, seed, share_t, share_c, normalize, rank: as of `token_dropout`; under one seed the masks are equal.

    Returns:
        Tensor with x's shape, dtype and memory format. Dropped weights are 0, whatever x holds. Differentiable in x,
        from the second time on by the separate operations; forward mode and vmap are refused.

    Raises:
        TypeError, ValueError: an argument is not what is stated above; the message names it.
    """
    check_activation(x)
    check_choice("normalize", normalize, NORMALIZE)
    check_flag("share_t", share_t)
    check_flag("share_c", share_c)
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (N, H, Q, K), got shape {tuple(x.shape)}")
    if isinstance(fields, torch.Tensor):
        check_fields(fields, FIELDS)
    elif not isinstance(fields, Sequence) or len(fields) != len(FIELDS):
        raise TypeError(f"fields must be (size, stride, rate) or a float64 CPU tensor of shape (3,), got {fields!r}")
    else:
        fields = torch.tensor(check_values(*fields), dtype=torch.float64, device="cpu")
    seed, rank = as_seed(seed, x.device), as_rank(rank)
    sides = sides_of(x.shape, LAYOUT)
    scale = scale_of(fields, seed, *sides, share_t, share_c, normalize, rank)
    y: torch.Tensor = _op(x, fields, seed, scale, share_t, share_c, rank)[0]
    return y


# ---- implementations -----------------------------------------------------------------------------------------------


def _fits(scores: torch.Tensor) -> bool:
    return triton_runs_on(scores) and scores.shape[3] <= LONGEST


def _forward(
    scores: torch.Tensor,
    fields: torch.Tensor,
    seed: torch.Tensor,
    scale: torch.Tensor,
    share_t: bool,
    share_c: bool,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and of every row its largest score and 1 / sum of exp(score - largest), (N, H, Q) in the compute type."""
    y = torch.empty_like(scores)
    if scores.numel() == 0:
        rows = scores.new_zeros(scores.shape[:3], dtype=compute_type(scores))
        return y, rows, rows.clone()
    if _fits(scores):
        from . import softmax_triton

        with torch.cuda.device(scores.device):
            return softmax_triton.forward(scores, fields, seed, scale, share_t, share_c, rank)
    weights = torch.softmax(scores, -1, dtype=compute_type(scores))
    masked = torch.ops.autodropout.token_apply(weights, fields, seed, scale, LAYOUT, share_t, share_c, rank)
    largest = scores.amax(-1).to(weights.dtype)
    # The largest weight of a row is exp(0) / l.
    return _like(scores, masked), largest, weights.amax(-1)


def _backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    largest: torch.Tensor,
    inverse: torch.Tensor,
    fields: torch.Tensor,
    seed: torch.Tensor,
    scale: torch.Tensor,
    share_t: bool,
    share_c: bool,
    rank: int,
) -> torch.Tensor:
    if scores.numel() == 0:
        return torch.empty_like(scores)
    if _fits(scores):
        from . import softmax_triton

        with torch.cuda.device(scores.device):
            return softmax_triton.backward(grad, scores, largest, inverse, fields, seed, scale, share_t, share_c, rank)
    weights = torch.sub(scores, largest[..., None]).exp_().mul_(inverse[..., None])
    g = torch.ops.autodropout.token_apply(grad.to(weights.dtype), fields, seed, scale, LAYOUT, share_t, share_c, rank)
    return _like(scores, torch.ops.aten._softmax_backward_data(g, weights, -1, weights.dtype))


def _like(scores: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The result in the type and memory format of the scores."""
    strides = torch.empty_like(scores, device="meta").stride()
    if result.dtype == scores.dtype and result.stride() == strides:
        return result
    return torch.empty_like(scores).copy_(result)


def _second_backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradient of the gradient, by the separate operations, which are differentiable further."""
    further = torch.is_grad_enabled()
    grad, scores, _, _, fields, seed, scale = ctx.saved_tensors
    with torch.enable_grad():
        # Views, because one tensor may be here twice.
        leaves = [one.view_as(one) if one.requires_grad else one.detach().requires_grad_() for one in (grad, scores)]
        weights = torch.softmax(leaves[1], -1)
        y = torch.ops.autodropout.token_apply(weights, fields, seed, scale, LAYOUT, *ctx.rest)
        (first,) = torch.autograd.grad(y, leaves[1], leaves[0], create_graph=True)
        second = torch.autograd.grad(first, leaves, upstream, create_graph=further)
    return (*second, *([None] * 8))


# ---- registration --------------------------------------------------------------------------------------------------


def _forward_fake(scores: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = [scores.new_empty(scores.shape[:3], dtype=compute_type(scores)) for _ in range(2)]
    return torch.empty_like(scores), rows[0], rows[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    scores, fields, seed, scale, *ctx.rest = inputs
    _, largest, inverse = output
    ctx.mark_non_differentiable(largest, inverse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, largest, inverse, fields, seed, scale)


def _differentiated(ctx: Any, backward: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    return backward(grad, *ctx.saved_tensors, *ctx.rest), *([None] * 6)


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:]


_op = register_with_backward(
    Op(
        "softmax_token_dropout(Tensor scores, Tensor fields, Tensor seed, Tensor scale, bool share_t, bool share_c, "
        "SymInt rank) -> (Tensor, Tensor, Tensor)",
        _forward,
        _forward_fake,
        _save,
    ),
    Op(
        "softmax_token_dropout_backward(Tensor grad, Tensor scores, Tensor largest, Tensor inverse, Tensor fields, "
        "Tensor seed, Tensor scale, bool share_t, bool share_c, SymInt rank) -> Tensor",
        _backward,
        lambda grad, scores, *others: torch.empty_like(scores),
        _save_for_second,
    ),
    _differentiated,
    _second_backward,
)
