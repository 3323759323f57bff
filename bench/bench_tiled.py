"""Tiled pattern dropout against a plain multiply and the peers: `pytest bench/bench_tiled.py`.

The unit is the time of `x * 2`, one read and one write of the activation, measured in the same round. Peers:
`torch.nn.functional.dropout`; DropBlock with block 7 and rate 0.1 of torchvision and of timm; and `compiled`, what
Inductor makes of the op in plain PyTorch, given the placements. On the CPU also ours as it is where Numba is not
installed.
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
from plain_torch import plain
from timm.layers import drop_block_2d as timm_drop_block
from torchvision.ops import drop_block2d

from autodropout import TiledPattern
from autodropout.kernels import tiled_dropout

TESTS = ("test_tiled.py", "test_tiled_sequences.py")
SHAPES = [(128, 160, 32, 32), (32, 256, 56, 56), (128, 320, 16, 16), (128, 640, 8, 8)]
BACKWARD_SHAPES = SHAPES if ON_GPU else [SHAPES[0], *SHAPES[2:]]  # on two cores: five minutes for all of bench/


Forward = Callable[[torch.Tensor], torch.Tensor]


def ours(shape: tuple[int, ...], share_c: bool) -> Forward:
    atlas = TiledPattern(size=0.25, stride=0.25, repeat=3, rotate=30).atlas(*shape[2:])
    return lambda x: tiled_dropout(x, atlas, share_c=share_c)


def naive(shape: tuple[int, ...]) -> Forward:
    """The mask by indexing, a product and a select, as Inductor fuses them."""
    n, c, height, width = shape
    kept = torch.from_numpy(~TiledPattern(size=0.25, stride=0.25, repeat=3, rotate=30).atlas(height, width).dropped)
    kept, scale = kept.to(DEVICE), torch.tensor(1.1, device=DEVICE)
    row, column = torch.arange(height, device=DEVICE)[:, None], torch.arange(width, device=DEVICE)

    @torch.compile(dynamic=False)
    def forward(x: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        mask = kept[top[:, :, None, None] + row, left[:, :, None, None] + column]
        return torch.where(mask, x * scale, 0.0).to(x.dtype)

    def drawn(x: torch.Tensor) -> torch.Tensor:
        top = torch.randint(height, (n, c), device=DEVICE)
        return forward(x, top, torch.randint(width, (n, c), device=DEVICE))

    return drawn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_forward(benchmark: Any, report: Report, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype, device=DEVICE)
    peers: dict[str, Forward] = {
        "x * 2": lambda x: x * 2,
        "F.dropout": lambda x: F.dropout(x, 0.1),
        "torchvision": lambda x: drop_block2d(x, 0.1, 7),
        "timm": lambda x: timm_drop_block(x, 0.1, 7),
        "compiled": naive(shape),
        "share_c": ours(shape, share_c=True),
    }
    if not ON_GPU:
        peers["no Numba"] = plain(ours(shape, share_c=False))
    per_channel = ours(shape, share_c=False)
    contenders = {name: lambda forward=forward: forward(x) for name, forward in peers.items()}
    report.add("forward", shape, "", interleaved(benchmark, lambda: per_channel(x), contenders, rounds_for(x)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BACKWARD_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_forward_backward(benchmark: Any, report: Report, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """`both` is forward and backward of the unit itself: what two live results cost on this heap."""
    x = torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()
    upstream = torch.randn(shape, dtype=dtype, device=DEVICE)

    def both(forward: Forward) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(x), x, upstream)

    peers: dict[str, Forward] = {
        "both": lambda x: x * 2,
        "F.dropout": lambda x: F.dropout(x, 0.1),
        "torchvision": lambda x: drop_block2d(x, 0.1, 7),
        "share_c": ours(shape, share_c=True),
    }
    contenders: dict[str, Callable[[], object]] = {"x * 2": lambda: x.detach() * 2}
    contenders |= {name: both(forward) for name, forward in peers.items()}
    per_channel = both(ours(shape, share_c=False))
    report.add("forward + backward", shape, "", interleaved(benchmark, per_channel, contenders, rounds_for(x)), dtype)
