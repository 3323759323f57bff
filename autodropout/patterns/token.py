"""The pattern of the paper for Transformers: spans of tokens, some tokens apart."""

from __future__ import annotations

from dataclasses import KW_ONLY
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from functools import partial
from typing import Any
from typing import ClassVar

import torch

from .base import Pattern
from .checks import MAX_SIDE
from .checks import flag
from .checks import integer
from .checks import real
from .checks import shape_of

MAX_SPAN = 2**30 - 1


@dataclass(frozen=True)
class TokenPattern(Pattern):
    """Spans of `size` consecutive tokens, `stride` tokens apart, at a random phase; inside them elements are dropped.

    Size, stride and the two flags are the hyper-parameters of the paper (Pham & Le 2021); the rate, which it leaves
    open, units and ranges are our choice. Size 1 without stride is Dropout, with `share_c` word dropout; a size of the
    whole sequence with `share_t` is variational dropout.

    Args:
        size: tokens that a span covers, in [1, 2^30).
        stride: tokens between two spans, in [0, 2^30).
        rate: probability that an element of a covered token is dropped, in [0, 1]; by keyword, as what follows.
        share_t: one decision for all tokens of a span, instead of one for each.
        share_c: one decision for all channels of a token, instead of one for each.

    Raises:
        TypeError, ValueError: naming the field.
    """

    op: ClassVar[str] = "token"
    default_normalize: ClassVar[str] = "expected"

    size: int
    stride: int = 0
    _: KW_ONLY
    rate: float
    share_t: bool = False
    share_c: bool = False

    def __post_init__(self) -> None:
        size = integer("size", self.size, 1, MAX_SPAN)
        stride = integer("stride", self.stride, 0, MAX_SPAN)
        rate = real("rate", self.rate, 0, 1)
        self._freeze(
            (float(size), float(stride), rate),
            size=size,
            stride=stride,
            rate=rate,
            share_t=flag("share_t", self.share_t),
            share_c=flag("share_c", self.share_c),
        )

    def expected_rate(self, tokens: int, width: int | None = None) -> float:
        """The expected share of dropped elements in sequences of so many tokens (>= 1): rate times covered share.

        Raises:
            ValueError: called with the height and width of a map, on which there are no tokens.
        """
        if width is not None:
            raise ValueError(f"pattern must be one of maps to be used on one of {tokens}x{width} cells, got {self!r}")
        tokens = integer("tokens", tokens, 1, MAX_SIDE)
        return self.rate * (1.0 if self.size >= tokens else self.size / (self.size + self.stride))

    def scaled(self, factor: float) -> TokenPattern:
        """The pattern with rate * factor, at most 1."""
        return replace(self, rate=min(self.rate * real("factor", factor, 0), 1.0))

    def mask(  # type: ignore[override]  # of sequences, not of maps
        self, N: int, T: int, C: int, seed: int | torch.Tensor, rank: int = 0
    ) -> torch.Tensor:
        """The mask that the op draws in a call with x of shape (N, T, C), or of another layout with as many of each.

        Args:
            N, T, C: samples, tokens, channels.
            seed: integer in [-2^63, 2^64), or a 0-d int64 tensor.
            rank: the global rank to draw for.

        Returns:
            Bool tensor (N, T, C), True = kept, on the device of the seed; on the CPU if that is an integer.

        Raises:
            TypeError, ValueError: an argument is not what is stated above; the message names it.
        """
        shape = shape_of(N=N, T=T, C=C)
        device = seed.device if isinstance(seed, torch.Tensor) else "cpu"
        return self._drop(torch.ones(shape, dtype=torch.float32, device=device), seed, rank) != 0

    def _drop(self, x: torch.Tensor, seed: int | torch.Tensor, rank: int) -> torch.Tensor:
        from ..kernels import token_dropout

        y: torch.Tensor = token_dropout(
            x, self.fields(), seed, share_t=self.share_t, share_c=self.share_c, normalize="none", rank=rank
        )
        return y

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **{f.name: getattr(self, f.name) for f in fields(self)}), ()
