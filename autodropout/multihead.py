"""`multi_head_attention_forward` written out, so that its projections and weights can have patterns.

PyTorch's function is one call for everything that looks on from outside. This is the same arithmetic, in another order
of roundings: `torch.nn.MultiheadAttention` and what is built of it come here while they train with a pattern inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Inside:
    """What is done inside.

    Args:
        projected: from "query", "key" or "value" and that projection, (T, N, C), to what takes its place.
        softmax: from scores (N, H, Q, K) to weights.
        attention: as `scaled_dot_product_attention`.
    """

    projected: Callable[[str, Tensor], Tensor]
    softmax: Callable[[Tensor], Tensor]
    attention: Callable[..., Tensor]


def multi_head_attention(
    inside: Inside,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As PyTorch's function of that name; the weights that it returns are those that were used, dropped ones zero.

    Raises:
        TypeError: a mask that is neither boolean nor floating.
        ValueError: another width than promised, a mask of another shape, `is_causal` without a mask.
    """
    if query.shape[-1] != embed_dim_to_check:
        raise ValueError(f"query must have {embed_dim_to_check} channels, got {query.shape[-1]}")
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, samples, width = query.shape
    if is_causal and attn_mask is None:
        raise ValueError("attn_mask must be the causal mask where is_causal is True, got None")
    # PyTorch takes the hint that the mask is a causal one where it can, and the mask elsewhere.
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None
    if attn_mask is not None and not causal:
        shapes = (length, key.shape[0]), (samples * num_heads, length, key.shape[0])
        mask = _added("attn_mask", attn_mask, query, *shapes)
        mask = mask.view(samples, num_heads, length, -1) if mask.dim() == 3 else mask
    if key_padding_mask is not None:
        keys = key.shape[0] if static_k is None else static_k.shape[1]
        padding = _added("key_padding_mask", key_padding_mask, query, (samples, keys))[:, None, None]
        mask = padding if mask is None else mask + padding

    packed = None if use_separate_proj_weight else in_proj_weight
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    q, k, v = _projections((query, key, value), packed, separate, in_proj_bias)
    q = inside.projected("query", q)
    # Keys and values that were projected elsewhere are no places here.
    k = inside.projected("key", k) if static_k is None else k
    v = inside.projected("value", v) if static_v is None else v
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, bias.expand(-1, samples, -1)]) for x, bias in ((k, bias_k), (v, bias_v)))
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
    k = k if static_k is None else static_k.unflatten(0, (samples, num_heads))
    v = v if static_v is None else static_v.unflatten(0, (samples, num_heads))
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[-2] - mask.shape[-1]))

    rate = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = (q * (width // num_heads) ** -0.5) @ k.mT
        weights = F.dropout(inside.softmax(scores if mask is None else scores + mask), rate)
        y = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        y = inside.attention(q, k, v, mask, rate, causal)
    y = F.linear(y.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if batched:
        return y, weights
    return y.squeeze(1), None if weights is None else weights.squeeze(0)


def _projections(
    inputs: tuple[Tensor, Tensor, Tensor],
    packed: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
) -> list[Tensor]:
    query, key, value = inputs
    if packed is not None and query is key and key is value:
        return list(F.linear(query, packed, bias).chunk(3, -1))
    weights = separate if packed is None else packed.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True) if w is not None]


def _added(name: str, mask: Tensor, x: Tensor, *shapes: tuple[int, ...]) -> Tensor:
    """What is added to the scores: a boolean mask is True where nothing is seen."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        allowed = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name} must have shape {allowed}, got {tuple(mask.shape)}")
    return x.new_zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.to(x.dtype)
