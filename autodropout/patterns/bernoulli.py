"""Independent decisions: Dropout, SpatialDropout, DropPath, word and variational dropout are one pattern."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from typing import ClassVar

import torch

from .base import Pattern
from .checks import integer
from .checks import real
from .checks import sides

SHARED = ("none", "map", "sample")
LAST_DIM = 62  # bits of an integer carry them to the op


@dataclass(frozen=True)
class BernoulliPattern(Pattern):
    """Each decision drops with probability `rate`, independently of all others.

    Args:
        rate: in [0, 1].
        shared: what one decision covers: "none" one cell (Dropout, Srivastava et al. 2014), "map" a channel of a sample
            (SpatialDropout, Tompson et al. 2015), "sample" a whole sample (stochastic depth, Huang et al. 2016). Or the
            dimensions along which a decision does not change, a tuple of integers in [0, 62]: (1,) in x (N, T, C) drops
            a channel at every token of a sequence. On maps (N, C, H, W) "map" is (2, 3), and "sample" (1, 2, 3).

    Raises:
        TypeError, ValueError: naming the field.
    """

    op: ClassVar[str] = "bernoulli"
    default_normalize: ClassVar[str] = "expected"

    rate: float
    shared: str | tuple[int, ...] = "none"

    def __post_init__(self) -> None:
        rate = real("rate", self.rate, 0, 1)
        self._freeze((rate,), rate=rate, shared=_checked(self.shared))

    def expected_rate(self, height: int, width: int) -> float:
        """The rate, on every map."""
        sides(height, width)
        return self.rate

    def scaled(self, factor: float) -> BernoulliPattern:
        """The pattern with rate * factor, at most 1."""
        return replace(self, rate=min(self.rate * real("factor", factor, 0), 1.0))

    def _drop(self, x: torch.Tensor, seed: int | torch.Tensor, rank: int) -> torch.Tensor:
        from ..kernels import bernoulli_dropout

        y: torch.Tensor = bernoulli_dropout(x, self.fields(), seed, shared=self.shared, normalize="none", rank=rank)
        return y


def _checked(shared: object) -> str | tuple[int, ...]:
    if isinstance(shared, str) and shared in SHARED:
        return shared
    if not isinstance(shared, (tuple, list)):
        names = ", ".join(repr(name) for name in SHARED)
        message = f"shared must be one of {names}, or a tuple of dimensions, got {shared!r}"
        if isinstance(shared, str):
            raise ValueError(message)
        raise TypeError(f"{message} of type {type(shared).__name__}")
    dims = tuple(sorted(integer("shared", dim, 0, LAST_DIM) for dim in shared))
    if len(set(dims)) < len(dims):
        raise ValueError(f"shared must hold different dimensions, got {shared!r}")
    return dims or "none"
