"""Token pattern dropout against a plain multiply, dropout and the same in plain PyTorch: `pytest bench/bench_token.py`.

The unit is the time of `x * 2`, one read and one write of the activation, measured in the same round. `ours` decides
for each element, `share_t` for each span and channel, `share_c` for each token. `naive` is what one
would write: phase, comparison, random numbers, select. Spans of 4 tokens, 12 apart, cover a quarter of them.
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

from autodropout import TokenPattern
from autodropout.kernels import token_dropout

TESTS = ("test_token.py",)
# What a Transformer of width 1024 holds: residuals, queries as they come out of a projection, attention weights.
CASES = {
    "NTC": (32, 512, 1024),
    "NHTD": (32, 16, 512, 64),
    "NHQK": (8, 16, 384, 384),
}
PATTERN = TokenPattern(size=4, stride=12, rate=0.5)
Forward = Callable[[torch.Tensor], torch.Tensor]


def activation(layout: str, dtype: torch.dtype) -> torch.Tensor:
    """Standard normal numbers; NHTD is the transposed view of a projection (N, T, H * D)."""
    shape = CASES[layout]
    if layout != "NHTD":
        return torch.randn(shape, dtype=dtype, device=DEVICE)
    n, heads, tokens, d = shape
    return torch.randn(n, tokens, heads, d, dtype=dtype, device=DEVICE).transpose(1, 2)


def ours(layout: str, share_t: bool = False, share_c: bool = False) -> Forward:
    fields = PATTERN.fields()
    return lambda x: token_dropout(x, fields, layout=layout, share_t=share_t, share_c=share_c)


def naive(layout: str, share_c: bool) -> Forward:
    period = PATTERN.size + PATTERN.stride
    scale = 1 / (1 - PATTERN.expected_rate(512))

    def forward(x: torch.Tensor) -> torch.Tensor:
        time = layout.index("K" if layout == "NHQK" else "T")
        token = torch.arange(x.shape[time], device=x.device).view([-1 if d == time else 1 for d in range(x.dim())])
        phase = torch.randint(period, [len(x)] + [1] * (x.dim() - 1), device=x.device)
        sides = [side if d in (0, time) or not share_c else 1 for d, side in enumerate(x.shape)]
        drawn = torch.rand(sides, device=x.device) < PATTERN.rate
        dropped = ((token + phase) % period < PATTERN.size) & drawn
        return torch.where(dropped, 0.0, x * scale).to(x.dtype)

    return forward


def contenders(layout: str) -> dict[str, Forward]:
    return {
        "share_t": ours(layout, share_t=True),
        "share_c": ours(layout, share_c=True),
        "naive": naive(layout, share_c=False),
        "naive share_c": naive(layout, share_c=True),
        "F.dropout": lambda x: F.dropout(x, 0.1),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", CASES if ON_GPU else ["NTC", "NHQK"])
def bench_forward(benchmark: Any, report: Report, layout: str, dtype: torch.dtype) -> None:
    x = activation(layout, dtype)
    peers: dict[str, Callable[[], object]] = {"x * 2": lambda: x * 2}
    peers |= {name: lambda forward=forward: forward(x) for name, forward in contenders(layout).items()}
    own = ours(layout)
    report.add("tokens, forward", x.shape, layout, interleaved(benchmark, lambda: own(x), peers, rounds_for(x)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_forward_backward(benchmark: Any, report: Report, dtype: torch.dtype) -> None:
    """`both` is forward and backward of the unit itself: what two live results cost on this heap."""
    x = activation("NTC", dtype).requires_grad_()
    upstream = torch.randn_like(x)

    def both(forward: Forward) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(x), x, upstream)

    peers: dict[str, Callable[[], object]] = {"x * 2": lambda: x.detach() * 2, "both": both(lambda x: x * 2)}
    peers |= {name: both(forward) for name, forward in contenders("NTC").items()}
    timings = interleaved(benchmark, both(ours("NTC")), peers, rounds_for(x))
    report.add("tokens, forward + backward", x.shape, "NTC", timings, dtype)
