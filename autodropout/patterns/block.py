"""DropBlock (Ghiasi et al. 2018), calibrated: it drops the share that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from typing import ClassVar

import torch

from .base import Pattern
from .checks import flag
from .checks import integer
from .checks import real
from .checks import sides

MAX_RATE = 0.95
MAX_BLOCK = 2**31 - 1


@dataclass(frozen=True)
class BlockPattern(Pattern):
    """Square blocks around random cells; overlaps and borders are accounted for, so that the expected share is `rate`.

    Args:
        rate: the expected dropped share, in [0, 0.95].
        block_size: side of a block in cells, >= 1. On a smaller map the block is the map.
        share_c: the same blocks for all channels of a sample, instead of their own for each.

    Raises:
        TypeError, ValueError: naming the field.
    """

    op: ClassVar[str] = "block"
    default_normalize: ClassVar[str] = "expected"

    rate: float
    block_size: int
    share_c: bool = False

    def __post_init__(self) -> None:
        rate = real("rate", self.rate, 0, MAX_RATE)
        block_size = integer("block_size", self.block_size, 1, MAX_BLOCK)
        self._freeze((rate, float(block_size)), rate=rate, block_size=block_size, share_c=flag("share_c", self.share_c))

    def expected_rate(self, height: int, width: int) -> float:
        """The rate, on every map: the op solves for the block probability that delivers it."""
        sides(height, width)
        return self.rate

    def scaled(self, factor: float) -> BlockPattern:
        """The pattern with rate * factor, at most 0.95."""
        return replace(self, rate=min(self.rate * real("factor", factor, 0), MAX_RATE))

    def _drop(self, x: torch.Tensor, seed: int | torch.Tensor, rank: int) -> torch.Tensor:
        from ..kernels import block_dropout

        y: torch.Tensor = block_dropout(x, self.fields(), seed, share_c=self.share_c, normalize="none", rank=rank)
        return y
