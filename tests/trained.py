"""The ops that the tests of real training run through: another op is one line of `CASES`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import nn

from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Pattern
from autodropout import TiledPattern
from autodropout import TokenPattern
from autodropout import pattern_dropout


class Case(NamedTuple):
    """A pattern, the shape of an activation of its op, and a field that a schedule may move over [0, 0.9]."""

    pattern: Pattern
    shape: tuple[int, ...]
    field: str


CASES = {
    "tiled": Case(TiledPattern(0.3, stride=0.25, repeat=2, rotate=30), (4, 6, 8, 7), "size"),
    "tiled, shared": Case(TiledPattern(0.5, share_c=True), (4, 6, 8, 7), "size"),
    "bernoulli": Case(BernoulliPattern(0.3), (4, 6, 8, 7), "rate"),
    "bernoulli, map": Case(BernoulliPattern(0.3, shared="map"), (4, 6, 8, 7), "rate"),
    "bernoulli, sample": Case(BernoulliPattern(0.5, shared="sample"), (16, 9, 8), "rate"),
    "block": Case(BlockPattern(0.3, block_size=3), (4, 6, 8, 7), "rate"),
    "token": Case(TokenPattern(3, 2, rate=0.5), (4, 12, 8), "rate"),
    "token, shared": Case(TokenPattern(4, 1, rate=0.5, share_t=True, share_c=True), (4, 12, 8), "rate"),
    "block, shared": Case(BlockPattern(0.3, block_size=2, share_c=True), (4, 6, 8, 7), "rate"),
}

every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def activation(shape: tuple[int, ...], seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Dropped(nn.Module):
    """Two layers with a pattern between them, for any shape; the seed as in `pattern_dropout`."""

    def __init__(self, case: Case, seed: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = case.shape[-1]
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.pattern, self.seed = case.pattern, seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(pattern_dropout(self.first(x).tanh(), self.pattern, seed=self.seed).sin())
        return y


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
