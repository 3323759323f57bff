"""DropBlock against a plain multiply and its peers, rate 0.1, block 7: `pytest bench/bench_block.py`.

The unit is the time of `x * 2`, one read and one write of the activation, measured in the same round. Peers: DropBlock
of torchvision, and of timm with blocks of their own for every channel, as ours and torchvision's have, and with those
that all channels share, which is its default; `share_c` is ours with those.

Peers drop other shares when asked for 10% (docs/dropblock.md); that changes the number of zeros, not the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from clock import DEVICE
from clock import DTYPES
from clock import ON_GPU
from conftest import Report
from interleaved import interleaved
from interleaved import rounds_for
from timm.layers import drop_block_2d as timm_drop_block
from torchvision.ops import drop_block2d

from autodropout.kernels import block_dropout

TESTS = ("test_block.py",)
SHAPES = [(128, 160, 32, 32), (128, 320, 16, 16), (128, 640, 8, 8)]
FIELDS = (0.1, 7)
Forward = Callable[[torch.Tensor], torch.Tensor]

PEERS: dict[str, Forward] = {
    "torchvision": lambda x: drop_block2d(x, *FIELDS),
    "timm per channel": lambda x: timm_drop_block(x, *FIELDS, couple_channels=False),
    "timm shared": lambda x: timm_drop_block(x, *FIELDS, couple_channels=True),
    "share_c": lambda x: block_dropout(x, FIELDS, share_c=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_forward(benchmark: Any, report: Report, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype, device=DEVICE)
    contenders: dict[str, Callable[[], object]] = {"x * 2": lambda: x * 2}
    contenders |= {name: lambda forward=forward: forward(x) for name, forward in PEERS.items()}
    timings = interleaved(benchmark, lambda: block_dropout(x, FIELDS), contenders, rounds_for(x))
    report.add("DropBlock, forward", shape, "", timings, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES if ON_GPU else SHAPES[2:], ids=lambda shape: "x".join(map(str, shape)))
def bench_forward_backward(benchmark: Any, report: Report, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """`both` is forward and backward of the unit itself: what two live results cost on this heap."""
    x = torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()
    upstream = torch.randn(shape, dtype=dtype, device=DEVICE)

    def both(forward: Forward) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(x), x, upstream)

    contenders: dict[str, Callable[[], object]] = {"x * 2": lambda: x.detach() * 2, "both": both(lambda x: x * 2)}
    contenders |= {name: both(forward) for name, forward in PEERS.items()}
    timings = interleaved(benchmark, both(lambda x: block_dropout(x, FIELDS)), contenders, rounds_for(x))
    report.add("DropBlock, forward + backward", shape, "", timings, dtype)
