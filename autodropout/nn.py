"""Modules: one for all patterns, and the names under which people know the classical ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.fx
from torch import nn

from .functional import LAYOUTS
from .functional import NORMALIZE
from .functional import dispatch
from .functional import layout_of
from .functional import sharing
from .patterns import BernoulliPattern
from .patterns import BlockPattern
from .patterns import Pattern
from .patterns.block import MAX_RATE
from .patterns.checks import choice
from .patterns.checks import flag
from .patterns.checks import real
from .policy import LAYER_PLACES


class PatternDropout(nn.Module):
    """Dropout with any pattern: `pattern_dropout` as a module. In evaluation it returns its input itself.

    `module.pattern = p` may be set at any time, for example by a schedule; under `torch.compile` it never recompiles as
    long as the kind of pattern, its `share_c` (`shared`) and `normalize` stay the same. For `torch.fx` the module is
    one step, as `nn.Dropout` is.

    Shape: (N, C, H, W), any shape with the batch first for a `BernoulliPattern`, or one of `layout` for a
    `TokenPattern`; the output has the input's shape, dtype and memory format.

    Args:
        pattern: what is dropped together.
        normalize: `"mask"`, `"expected"` or `"none"`; None is the pattern's default.
        layout: where a `TokenPattern` finds samples, tokens and channels: `"NTC"` (also None), `"TNC"`, `"NHTD"` or
            `"NHQK"`; None for patterns of maps, as in `pattern_dropout`.

    Raises:
        TypeError: `pattern` is not a pattern, or `normalize` or `layout` not a string.
        ValueError: `normalize` or `layout` is none of the above, or `pattern` not for `layout`.

        All three may be set later, and are checked then.
    """

    _asked_layout: str | None = None  # where it is None, `layout` is "NTC", but patterns of maps are allowed
    _normalize: str | None
    # Plain attributes, no buffer: a buffer would follow the module to the GPU, and reading it costs a host sync. What
    # Dynamo sees of a pattern is a graph input (the numbers) and constants (the op, what a decision is shared by).
    _pattern: Pattern
    _fields: torch.Tensor
    _op: str
    _shared: str | bool | tuple[int, ...]
    _default_normalize: str

    def __init__(self, pattern: Pattern, normalize: str | None = None, layout: str | None = None) -> None:
        super().__init__()
        self.normalize = normalize
        self._asked_layout = layout  # checked with the pattern
        self.pattern = pattern

    @property
    def normalize(self) -> str | None:
        return self._normalize

    @normalize.setter
    def normalize(self, normalize: str | None) -> None:
        self._normalize = None if normalize is None else choice("normalize", normalize, NORMALIZE)

    @property
    def layout(self) -> str:
        return "NTC" if self._asked_layout is None else self._asked_layout

    @layout.setter
    def layout(self, layout: str | None) -> None:
        layout_of(self._pattern, layout)  # refuses what is none, and what the pattern is not for
        self._asked_layout = layout

    @property
    def pattern(self) -> Pattern:
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: Pattern) -> None:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"pattern must be a Pattern, got {pattern!r} of type {type(pattern).__name__}")
        layout_of(pattern, self._asked_layout)  # refuses what it is not for
        self._shared = sharing(pattern)
        self._op = pattern.op
        self._default_normalize = pattern.default_normalize
        with torch.inference_mode(False):  # kept, and saved for backward in later training
            self._fields = pattern.fields()
        self._pattern = pattern

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _called(self, x)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        normalize = self._default_normalize if self.normalize is None else self.normalize
        return dispatch(x, self._op, self._fields, self._shared, normalize, layout=self.layout)

    def extra_repr(self) -> str:
        values = [
            f"{field.name}={getattr(self.pattern, field.name)!r}"
            for field in dataclasses.fields(self.pattern)
            if getattr(self.pattern, field.name) != field.default
        ]
        normalize = "" if self.normalize is None else f", normalize={self.normalize!r}"
        layout = "" if self._asked_layout is None else f", layout={self._asked_layout!r}"
        return f"{type(self.pattern).__name__}({', '.join(values)}){normalize}{layout}"

    def _is_still(self, op: str, shared: str | bool | tuple[int, ...], *normalize: str | None) -> bool:
        """Whether the class and its own arguments say all, with one of these `normalize`: everything may be set."""
        return (self._op, self._shared, self._asked_layout) == (op, shared, None) and self._normalize in normalize

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # torch.load moves every tensor to `map_location`: the fields are made again, on the CPU.
        self.pattern = self._pattern


@torch.fx.wrap
def _called(module: PatternDropout, x: torch.Tensor) -> torch.Tensor:
    """`torch.fx` does not look inside: it keeps this call, and the module with its training flag."""
    return module._drop(x) if module.training else x


class PatternSite(nn.Module):
    """A place of a Transformer's layer, for `apply_policy` to put a pattern at; the identity without one.

    Put one wherever a policy should be able to act, for example `self.query = PatternSite("query", "NHTD")`, and send
    the tensor through it. It has neither parameters nor buffers, and leaves nothing in an exported graph.

    Shape: as `layout` says; the output has the input's shape and dtype.

    Args:
        place: "query", "key", "value", "softmax", "output" (projection), "residual", or "feed_forward", the hidden
            layer, which the paper leaves alone.
        layout: `"NTC"`, `"TNC"`, `"NHTD"` (by head) or `"NHQK"` (attention weights, a token being a key), as in
            `pattern_dropout`.

    Raises:
        TypeError, ValueError: an argument is none of those strings.
    """

    def __init__(self, place: str, layout: str = "NTC") -> None:
        super().__init__()
        self.place = choice("place", place, LAYER_PLACES)
        self.layout = choice("layout", layout, LAYOUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def extra_repr(self) -> str:
        return f"{self.place!r}, layout={self.layout!r}"


class SoftmaxSite(PatternSite):
    """The place "softmax": from scores (N, H, Q, K), -inf where a key must not be seen, to attention weights.

    With a `TokenPattern` both are one op, `softmax_token_dropout`; the last key is the youngest, with memory the oldest
    of it is key 0.
    """

    def __init__(self) -> None:
        super().__init__("softmax", "NHQK")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1)

    def extra_repr(self) -> str:
        return ""


class _Dropout(PatternDropout):
    """What the classical kinds have in common: a probability `p`, the scale 1 / (1 - p), and the dimensions of x."""

    _dims: tuple[str, ...] | None = None  # None allows any shape
    _shares: str | tuple[int, ...] = "none"

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(BernoulliPattern(rate=real("p", p, 0.0, 1.0), shared=self._shares))

    @property
    def p(self) -> float:
        return _rate(self, "p")

    @p.setter
    def p(self, p: float) -> None:
        _set_rate(self, "p", p)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        if self._dims is not None and x.dim() != len(self._dims):
            raise ValueError(f"x must be ({', '.join(self._dims)}), got shape {tuple(x.shape)}")
        return super()._drop(x)

    def extra_repr(self) -> str:
        return f"p={self.p}" if self._is_still(BernoulliPattern.op, self._shares, None) else super().extra_repr()


class Dropout(_Dropout):
    """Drops single cells of x (batch first, any shape) with probability `p`, scaled by 1 / (1 - p); as
    `torch.nn.Dropout`, but with bits that are the same on every device, no mask kept for backward, and no `inplace`.
    `module.p` may be set at any time, here and in the other classes.

    Raises:
        TypeError, ValueError: `p` is not a number in [0, 1].
    """


class SpatialDropout1d(_Dropout):
    """Drops whole channels of x (N, C, L) with probability `p`, scaled by 1 / (1 - p); as `torch.nn.Dropout1d`.

    Keras' `SpatialDropout1D` takes (N, L, C): that is `VariationalDropout` here.

    Raises:
        TypeError, ValueError: `p` is not a number in [0, 1]; x is not (N, C, L).
    """

    _dims = ("N", "C", "L")
    _shares = "map"


class SpatialDropout2d(_Dropout):
    """Drops whole channels of x (N, C, H, W) with probability `p`, scaled by 1 / (1 - p); as `torch.nn.Dropout2d`.

    Raises:
        TypeError, ValueError: `p` is not a number in [0, 1]; x is not (N, C, H, W).
    """

    _dims = ("N", "C", "H", "W")
    _shares = "map"


class SpatialDropout3d(_Dropout):
    """Drops whole channels of x (N, C, D, H, W) with probability `p`, scaled by 1 / (1 - p); as `torch.nn.Dropout3d`.

    Raises:
        TypeError, ValueError: `p` is not a number in [0, 1]; x is not (N, C, D, H, W).
    """

    _dims = ("N", "C", "D", "H", "W")
    _shares = "map"


class WordDropout(_Dropout):
    """Drops whole tokens of x (N, T, C) with probability `p`, scaled by 1 / (1 - p): the embedding of a place in the
    sequence is there or not (Iyyer et al. 2015). PyTorch has none; it is `torch.nn.Dropout1d`, which drops rows.

    Raises:
        TypeError, ValueError: `p` is not a number in [0, 1]; x is not (N, T, C).
    """

    _dims = ("N", "T", "C")
    _shares = (2,)


class VariationalDropout(_Dropout):
    """Drops channels of x (N, T, C) with probability `p`, the same at every token of a sequence, scaled by 1 / (1 - p):
    locked dropout (Gal & Ghahramani 2016). PyTorch has none; it is `torch.nn.Dropout1d` on x transposed to (N, C, T).

    For x (T, N, C), as recurrent layers have it, use `PatternDropout(BernoulliPattern(p, shared=(0,)))`.

    Raises:
        TypeError, ValueError: `p` is not a number in [0, 1]; x is not (N, T, C).
    """

    _dims = ("N", "T", "C")
    _shares = (1,)


class DropPath(PatternDropout):
    """Drops whole samples of x (batch first) with probability `drop_prob`: stochastic depth, for the end of a residual
    branch; as `timm.layers.DropPath`. `module.drop_prob` may be set at any time.

    Args:
        drop_prob: in [0, 1].
        scale_by_keep: scale what is kept by 1 / (1 - drop_prob).

    Raises:
        TypeError, ValueError: an argument is not what is stated above.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        scale = flag("scale_by_keep", scale_by_keep)
        pattern = BernoulliPattern(rate=real("drop_prob", drop_prob, 0.0, 1.0), shared="sample")
        super().__init__(pattern, normalize="expected" if scale else "none")

    @property
    def drop_prob(self) -> float:
        return _rate(self, "drop_prob")

    @drop_prob.setter
    def drop_prob(self, drop_prob: float) -> None:
        _set_rate(self, "drop_prob", drop_prob)

    def extra_repr(self) -> str:
        if not self._is_still(BernoulliPattern.op, "sample", "expected", "none"):
            return super().extra_repr()
        return f"drop_prob={self.drop_prob}" + ("" if self.normalize == "expected" else ", scale_by_keep=False")


class DropBlock2d(PatternDropout):
    """Drops squares of side `block_size` of x (N, C, H, W), each channel its own; as `torchvision.ops.DropBlock2d`,
    without its `inplace` and `eps`.

    The expected dropped share is `p` itself, on every map, where the usual formula ignores overlaps and borders.

    Args:
        p: expected dropped share, in [0, 0.95].
        block_size: side of a square in cells, at least 1.

    Raises:
        TypeError, ValueError: an argument is not what is stated above.
    """

    def __init__(self, p: float, block_size: int) -> None:
        super().__init__(BlockPattern(rate=real("p", p, 0.0, MAX_RATE), block_size=block_size))

    @property
    def p(self) -> float:
        return _rate(self, "p")

    @p.setter
    def p(self, p: float) -> None:
        _set_rate(self, "p", p)

    def extra_repr(self) -> str:
        if not isinstance(self.pattern, BlockPattern) or not self._is_still(BlockPattern.op, False, None):
            return super().extra_repr()
        return f"p={self.p}, block_size={self.pattern.block_size}"


def _rate(module: PatternDropout, name: str) -> float:
    return _rated(module, name).rate


def _set_rate(module: PatternDropout, name: str, rate: float) -> None:
    pattern = _rated(module, name)
    high = MAX_RATE if isinstance(pattern, BlockPattern) else 1.0
    module.pattern = dataclasses.replace(pattern, rate=real(name, rate, 0.0, high))


def _rated(module: PatternDropout, name: str) -> BernoulliPattern | BlockPattern:
    # No AttributeError: nn.Module would replace it by one without this message.
    if not isinstance(module.pattern, (BernoulliPattern, BlockPattern)):
        raise TypeError(f"{name} needs a BernoulliPattern or a BlockPattern, got {module.pattern!r}")
    return module.pattern
