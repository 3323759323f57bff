"""The modules at a model's sites while a policy is on it: what their classes become, and the child that drops.

Each gets a child `pattern_dropout` (or one for each of its places, named after it) and a subclass of its class whose
`forward` calls the child. The child has no parameters and no buffers, so the keys of the `state_dict` stay.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from .attention_weights import Dropped
from .kernels import softmax_token_dropout
from .kernels import token_attention
from .nn import PatternDropout
from .nn import SoftmaxSite
from .patterns import TokenPattern
from .policy import TOKEN_PLACES
from .qkv_layouts import QkvLayout

CHILD = "pattern_dropout"


class SiteDropout(PatternDropout):
    """The `PatternDropout` of a site, which remembers how to take it off again."""

    was_child: bool = False  # it stands for a None among the children of its block, rather than among the attributes
    place: str | None = None
    layout_of_parts: QkvLayout | None = None  # of the tensor of which the place is a part, see `Spot`
    matrix: str | None = None  # likewise: whose weight makes the tensor inside
    inside: bool = False

    def _get_name(self) -> str:
        return "PatternDropout"

    @property
    def of_tokens(self) -> bool:
        return self._op == TokenPattern.op

    def after_softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """What `forward` makes of the softmax of the scores, in one op, while training and with a `TokenPattern`."""
        y: torch.Tensor = softmax_token_dropout(scores, self._fields, **self._of_tokens())
        return y

    def on_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """The same with any pattern."""
        return self.after_softmax(scores) if self.of_tokens else self(scores.softmax(-1))

    def fused(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None
    ) -> torch.Tensor:
        """Attention whose weights have these tokens dropped, in one op, likewise."""
        y: torch.Tensor = token_attention(q, k, v, self._fields, causal=causal, scale=scale, **self._of_tokens())
        return y

    def _of_tokens(self) -> dict[str, Any]:
        return {
            "share_t": "t" in str(self._shared),
            "share_c": "c" in str(self._shared),
            "normalize": self._default_normalize if self.normalize is None else self.normalize,
        }


class MaskedModule(nn.Module):
    """What the classes of sites' modules have in common, see `masked_class`."""

    unmasked_class: type[nn.Module]
    masked_base: type[MaskedModule]
    pattern_dropout: SiteDropout

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        masked: torch.Tensor = self.pattern_dropout(super().forward(*args, **kwargs))
        return masked

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickles and copies name the class that can be imported, and make this one from it.
        reduced: Any = super().__reduce_ex__(protocol)
        return _new_masked, (self.unmasked_class, self.masked_base), *reduced[2:]


class MaskedLayer(MaskedModule):
    """A module of a Transformer that does not mark its places: it may have several, each a child named after it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self._at("feed_forward")
        if hidden is not None:
            args = (_dropped([hidden], args[0]), *args[1:])
        dropouts = [dropout for dropout in map(self._at, TOKEN_PLACES) if dropout is not None]
        inside = [dropout for dropout in dropouts if dropout.inside and dropout.training]
        if inside:
            mode = self._mode(inside)
            with mode:
                y = super(MaskedModule, self).forward(*args, **kwargs)
            if mode.missing:
                raise RuntimeError(_refusal(type(self).__name__, sorted(mode.missing)[0]))
        else:
            y = super(MaskedModule, self).forward(*args, **kwargs)
        return _dropped([dropout for dropout in dropouts if not dropout.inside], y)

    def _at(self, place: str) -> SiteDropout | None:
        return getattr(self, f"{CHILD}_{place}", None)

    def _mode(self, inside: list[SiteDropout]) -> Dropped:
        weights = next((dropout for dropout in inside if dropout.place == "softmax"), None)
        return Dropped(
            None if weights is None else weights.on_scores,
            weights.fused if weights is not None and weights.of_tokens else None,
            {str(d.place): d for d in inside if d.matrix is None and d is not weights},
            [
                (name, self.get_submodule(name).weight, partial(_dropped, [d for d in inside if d.matrix == name]))
                for name in dict.fromkeys(d.matrix for d in inside)
                if name is not None
            ],
        )


def _refusal(name: str, missing: str) -> str:
    if missing == "softmax":
        return (
            f"{name} must compute its attention by scaled_dot_product_attention or softmax for a pattern on its "
            "weights, but called neither"
        )
    return f"{name} must project by the function that the example saw for a pattern on {missing!r}, but did not call it"


def _dropped(dropouts: list[SiteDropout], x: Any) -> Any:
    """Each drops in its part of x: (N, T, C), or (N, H, W, C), whose cells are the tokens, or the first of a tuple."""
    active = [dropout for dropout in dropouts if dropout.training]
    if not active:
        return x
    if isinstance(x, tuple):
        return (_dropped(active, x[0]), *x[1:])
    tokens = x.flatten(1, 2) if x.dim() == 4 else x
    layout = active[0].layout_of_parts
    if layout is None:
        for dropout in active:
            tokens = dropout(tokens)
        return tokens.view_as(x)
    parts = layout.split(tokens)
    for dropout in active:
        part = layout.places.index(str(dropout.place))
        parts[part] = dropout(parts[part])
    return layout.join(parts).view_as(x)


class MaskedSoftmax(MaskedModule):
    """A `SoftmaxSite` with a pattern: with one of tokens, softmax and mask are one op."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout = self.pattern_dropout
        return dropout.after_softmax(x) if dropout.training and dropout.of_tokens else super().forward(x)


_MASKED_CLASSES: dict[tuple[type[nn.Module], type[MaskedModule]], type[MaskedModule]] = {}


def masked_class(kind: type[nn.Module], base: type[MaskedModule] = MaskedModule) -> type[MaskedModule]:
    """The class of a module of this kind that is masked: always the same one, a subclass of the same name."""
    if issubclass(kind, SoftmaxSite):
        base = MaskedSoftmax
    if (kind, base) not in _MASKED_CLASSES:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        content = {"unmasked_class": kind, "masked_base": base, **names}
        _MASKED_CLASSES[kind, base] = type(kind.__name__, (base, kind), content)
    return _MASKED_CLASSES[kind, base]


def _new_masked(kind: type[nn.Module], base: type[MaskedModule]) -> MaskedModule:
    masked = masked_class(kind, base)
    return masked.__new__(masked)
