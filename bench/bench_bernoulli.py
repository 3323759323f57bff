"""Bernoulli dropout against a plain multiply and the peers: `pytest bench/bench_bernoulli.py`.

The unit is the time of `x * 2`, one read and one write of the activation, measured in the same round. Peers, at the
same rate: `torch.nn.functional.dropout`, `torch.nn.Dropout2d` and `Dropout1d`, timm's
`DropPath`, torchvision's `stochastic_depth`.
Ours are named by what is shared: `none`, `map`, `sample`; on tokens `word` and `variational`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clock import DEVICE
from clock import DTYPES
from clock import ON_GPU
from conftest import Report
from interleaved import interleaved
from interleaved import rounds_for
from timm.layers import DropPath as TimmDropPath
from torch import nn
from torchvision.ops import stochastic_depth

from autodropout.kernels import bernoulli_dropout

TESTS = ("test_bernoulli.py",)
MAPS = [(128, 160, 32, 32), (128, 640, 8, 8)]
TOKENS = [(64, 512, 512)]
RATE = 0.1
Forward = Callable[[torch.Tensor], torch.Tensor]


def ours(shared: str | tuple[int, ...]) -> Forward:
    return lambda x: bernoulli_dropout(x, RATE, shared=shared)


ON_MAPS: dict[str, Forward] = {
    "F.dropout": lambda x: F.dropout(x, RATE),
    "Dropout2d": nn.Dropout2d(RATE),
    "timm": TimmDropPath(RATE),
    "torchvision": lambda x: stochastic_depth(x, RATE, "row"),
    "sample": ours("sample"),
    "map": ours("map"),
}
ON_TOKENS: dict[str, Forward] = {
    "F.dropout": lambda x: F.dropout(x, RATE),
    "Dropout1d": nn.Dropout1d(RATE),
    "variational": ours((1,)),
    "word": ours((2,)),
}


def peers_of(shape: tuple[int, ...]) -> tuple[str, dict[str, Forward]]:
    return ("on maps", ON_MAPS) if len(shape) == 4 else ("on tokens", ON_TOKENS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS + TOKENS, ids=lambda shape: "x".join(map(str, shape)))
def bench_forward(benchmark: Any, report: Report, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype, device=DEVICE)
    where, peers = peers_of(shape)
    contenders: dict[str, Callable[[], object]] = {"x * 2": lambda: x * 2}
    contenders |= {name: lambda forward=forward: forward(x) for name, forward in peers.items()}  # type: ignore[misc]
    cells = ours("none")
    timings = interleaved(benchmark, lambda: cells(x), contenders, rounds_for(x))
    report.add(f"Bernoulli {where}, forward (ours: not shared)", shape, "", timings, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS + TOKENS if ON_GPU else TOKENS, ids=lambda shape: "x".join(map(str, shape)))
def bench_forward_backward(benchmark: Any, report: Report, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()
    upstream = torch.randn(shape, dtype=dtype, device=DEVICE)
    where, peers = peers_of(shape)

    def both(forward: Forward) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(x), x, upstream)

    contenders: dict[str, Callable[[], object]] = {"x * 2": lambda: x.detach() * 2}
    contenders |= {name: both(forward) for name, forward in peers.items()}
    timings = interleaved(benchmark, both(ours("none")), contenders, rounds_for(x))
    report.add(f"Bernoulli {where}, forward + backward (ours: not shared)", shape, "", timings, dtype)
