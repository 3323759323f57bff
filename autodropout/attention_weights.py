"""Finds the softmax and the projections inside an attention whose code is not ours, and puts patterns on them.

While a mode of this file is entered, `scaled_dot_product_attention`, every `softmax` over the last dimension of scores
(..., H, Q, K), `linear` and `multi_head_attention_forward` call its methods. Attention by other means (FlashAttention's
package, FlexAttention) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .multihead import Inside
from .multihead import multi_head_attention

SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)


class AttentionWeights(TorchFunctionMode):
    """Calls its methods in place of PyTorch's functions; as they are here, they do the same."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func in SOFTMAXES:
            scores = _scores(*args, **kwargs)
            return func(*args, **kwargs) if scores is None else self.softmax(scores)
        if func is F.linear:
            return self.linear(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return multi_head_attention(Inside(self.projected, self.softmax, self.attention), *args, **kwargs)
        return func(*args, **kwargs)

    def softmax(self, scores: Tensor) -> Tensor:
        """The weights of scores (..., H, Q, K)."""
        return scores.softmax(-1)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `scaled_dot_product_attention`."""
        y: Tensor = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        return y

    def projected(self, place: str, x: Tensor) -> Tensor:
        """A projection (T, N, C) of `multi_head_attention_forward`, "query", "key" or "value"."""
        return x

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `linear`."""
        return F.linear(input, weight, bias)


def _scores(
    input: Any = None,
    dim: Any = None,
    *others: Any,
    dtype: torch.dtype | None = None,
    _stacklevel: int = 3,
    **unknown: Any,
) -> Tensor | None:
    """What a softmax that is called so is taken of, if that is scores (..., H, Q, K); `out` is left to PyTorch."""
    if unknown or input.dim() < 4 or dim not in (-1, input.dim() - 1):
        return None
    # Among the positional ones: second of `torch.softmax`, behind `_stacklevel` of `torch.nn.functional.softmax`.
    dtype = next((other for other in others if isinstance(other, torch.dtype)), dtype)
    scores: Tensor = input if dtype is None else input.to(dtype)
    return scores


def as_autocast_would(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What `scaled_dot_product_attention` gets under autocast, which does not know our op. Rotary embeddings hand over
    queries and keys in float32 beside values that are not.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_mask(mask: Tensor, query: Tensor, is_causal: bool) -> None:
    """Refuses what `scaled_dot_product_attention` refuses, and what would be taken for something else here."""
    if is_causal:
        raise ValueError(f"attn_mask must be None where is_causal is True, got shape {tuple(mask.shape)}")
    if mask.dim() < 2:
        raise ValueError(f"attn_mask must have at least 2 dimensions (queries, keys), got shape {tuple(mask.shape)}")
    allowed = {torch.bool, torch.float32, query.dtype}
    if torch.is_autocast_enabled(query.device.type):
        allowed |= {torch.float16, torch.bfloat16}
    if mask.dtype not in allowed:
        raise TypeError(f"attn_mask must be bool, float32 or of the query's {query.dtype}, got {mask.dtype}")


class Listener(AttentionWeights):
    """Reports what an attention does inside.

    Args:
        seen: gets "query", "key" or "value" and how many tokens `multi_head_attention_forward` projected; "softmax" and
            how many keys there are.
        applied: gets every weight that is given to `linear`, and how many tokens came out.
    """

    def __init__(self, seen: Callable[[str, int], None], applied: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.seen, self.applied = seen, applied

    def softmax(self, scores: Tensor) -> Tensor:
        self.seen("softmax", scores.shape[-1])
        return super().softmax(scores)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen("softmax", key.shape[-2])
        return super().attention(query, key, value, *args, **kwargs)

    def projected(self, place: str, x: Tensor) -> Tensor:
        self.seen(place, x.shape[0])
        return x

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = super().linear(input, weight, bias)
        self.applied(weight, y)
        return y


class Dropped(AttentionWeights):
    """Puts patterns on what an attention makes inside.

    Of scores with more than four dimensions, -3 is taken for the heads and all before it for samples. Where windows
    come after the heads, as in Hiera, that makes the heads samples, and `share_c` shares a mask among windows.

    Args:
        weights: from scores (N, H, Q, K) to dropped weights; None leaves them alone.
        fused: from query, key, value (N, H, T, D), and `causal` and `scale` by name, to the attention with dropped
            weights, or None.
        projections: by place, from a projection (N, T, C) of `multi_head_attention_forward` to the dropped one.
        applied: weights that are given to `linear`, and what becomes of its output.
    """

    def __init__(
        self,
        weights: Callable[[Tensor], Tensor] | None,
        fused: Callable[..., Tensor] | None,
        projections: dict[str, Callable[[Tensor], Tensor]],
        applied: list[tuple[str, object, Callable[[Tensor], Tensor]]],
    ) -> None:
        super().__init__()
        self.on_scores, self.fused, self.projections, self.applied = weights, fused, projections, applied
        self.missing = {*projections, *(name for name, _, _ in applied), *(() if weights is None else ("softmax",))}
        self.differentiated = torch.is_grad_enabled()

    def _found(self, name: str) -> None:
        """A checkpoint inside the attention computes it again in backward, when this mode is left: without patterns."""
        if self.differentiated and not torch.is_grad_enabled():
            raise RuntimeError(
                f"an attention with a pattern on {name!r} must not checkpoint a part of itself, or leave out its "
                "gradients: checkpoint the whole layer"
            )
        self.missing.discard(name)

    def projected(self, place: str, x: Tensor) -> Tensor:
        if place not in self.projections:
            return x
        self._found(place)
        return self.projections[place](x.transpose(0, 1)).transpose(0, 1)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = super().linear(input, weight, bias)
        for name, other, drop in self.applied:
            if other is weight:
                self._found(name)
                return drop(y)
        return y

    def softmax(self, scores: Tensor) -> Tensor:
        if self.on_scores is None:
            return super().softmax(scores)
        self._found("softmax")
        # More dimensions in front are all samples, see above; without heads there is one, likewise without samples.
        if scores.dim() > 3:
            by_head = scores.reshape(-1, *scores.shape[-3:])
        else:
            by_head = scores[:, None] if scores.dim() == 3 else scores[None, None]
        return self.on_scores(by_head).view_as(scores)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if self.on_scores is None:
            return super().attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self._found("softmax")
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        plain = attn_mask is None and dropout_p == 0 and query.dim() == 4 and query.shape == value.shape == key.shape
        if self.fused is not None and plain:
            return self.fused(*as_autocast_would(query, key, value), causal=is_causal, scale=scale)
        if attn_mask is not None:
            _check_mask(attn_mask, query, is_causal)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query * factor) @ key.transpose(-1, -2)
        if is_causal:
            # PyTorch counts from the first query and the first key, whatever their numbers.
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is None:
            weights = self.softmax(scores)
        else:
            unseen = attn_mask.logical_not() if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
            added = 0.0 if attn_mask.dtype == torch.bool else attn_mask
            # A query that sees nothing, padding for example, gets zeros, as from PyTorch's function.
            blind = unseen.all(-1, keepdim=True)
            scores = (scores + added).masked_fill(unseen & ~blind, -torch.inf).masked_fill(blind, 0.0)
            # A mask in float32 made the scores float32, too: its numbers may be too large for float16.
            weights = self.softmax(scores).masked_fill(blind, 0.0).to(query.dtype)
        return F.dropout(weights, dropout_p) @ value
