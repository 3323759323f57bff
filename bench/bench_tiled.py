"""Tiled pattern dropout on the CPU against a plain multiply and the peers, fp32: `pytest bench/bench_tiled.py`.

The unit is the time of `x * 2`, one read and one write of the activation, measured in the same round. Peers:
`torch.nn.functional.dropout`, and DropBlock with block 7 and rate 0.1 of torchvision and of timm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Report
from interleaved import interleaved
from timm.layers import drop_block_2d as timm_drop_block
from torchvision.ops import drop_block2d

from autodropout import TiledPattern
from autodropout.kernels import tiled_dropout

SHAPES = [(128, 160, 32, 32), (32, 256, 56, 56), (128, 320, 16, 16), (128, 640, 8, 8)]
ROUNDS = 11


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("share_c", [False, True], ids=["per channel", "share_c"])
def bench_forward(benchmark: Any, report: Report, shape: tuple[int, ...], share_c: bool) -> None:
    x = torch.randn(shape)
    pattern = TiledPattern(size=0.25, stride=0.25, repeat=3, rotate=30, share_c=share_c)
    atlas = pattern.atlas(*shape[2:])
    peers: dict[str, Callable[[], object]] = {
        "x * 2": lambda: x * 2,
        "F.dropout": lambda: F.dropout(x, 0.1),
        "torchvision": lambda: drop_block2d(x, 0.1, 7),
        "timm": lambda: timm_drop_block(x, 0.1, 7),
    }
    medians = interleaved(benchmark, lambda: tiled_dropout(x, atlas, share_c=share_c), peers, ROUNDS)
    report.add("forward", shape, "share_c" if share_c else "per channel", medians)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("share_c", [False, True], ids=["per channel", "share_c"])
def bench_forward_backward(benchmark: Any, report: Report, shape: tuple[int, ...], share_c: bool) -> None:
    x = torch.randn(shape).requires_grad_()
    upstream = torch.randn(shape)
    atlas = TiledPattern(size=0.25, stride=0.25, repeat=3, rotate=30).atlas(*shape[2:])

    def both(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(x), x, upstream)

    with_peers = {"F.dropout": lambda x: F.dropout(x, 0.1), "torchvision": lambda x: drop_block2d(x, 0.1, 7)}
    peers: dict[str, Callable[[], object]] = {"x * 2": lambda: x.detach() * 2}
    peers |= {name: both(forward) for name, forward in with_peers.items()}
    medians = interleaved(benchmark, both(lambda x: tiled_dropout(x, atlas, share_c=share_c)), peers, ROUNDS)
    report.add("forward + backward", shape, "share_c" if share_c else "per channel", medians)
