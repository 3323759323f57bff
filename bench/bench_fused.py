"""Fused neighbours against the chains they replace: `pytest bench/bench_fused.py`.

The unit is the time of `x * 2`, one read and one write of the activation, measured in the same round. `chain` is the
same work as separate operations: batch_norm, tiled_dropout and relu_; or `residual + dropout(x)`. `bn` is batch_norm
alone, `bn relu` batch_norm and relu_, what a network without dropout pays.
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

from autodropout import TiledPattern
from autodropout.kernels import Atlas
from autodropout.kernels import batch_norm_pattern_relu
from autodropout.kernels import bernoulli_dropout
from autodropout.kernels import drop_path_add
from autodropout.kernels import tiled_dropout
from autodropout.kernels import tiled_dropout_add

TESTS = ("test_batch_norm.py", "test_batch_norm_module.py", "test_residual.py")
SHAPES = [(128, 160, 32, 32), (32, 256, 56, 56), (128, 320, 16, 16), (128, 640, 8, 8)]
BACKWARD_SHAPES = SHAPES if ON_GPU else SHAPES[2:]  # on two cores: five minutes for all of bench/

Layer = Callable[[torch.Tensor], torch.Tensor]


def layers(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Layer]:
    """Batch normalisation with what follows it, by name; parameters and running averages in float32."""
    c = shape[1]
    atlas = TiledPattern(size=0.25, stride=0.25, repeat=3, rotate=30).atlas(*shape[2:])
    weight = torch.ones(c, device=DEVICE).requires_grad_()
    bias = torch.zeros(c, device=DEVICE).requires_grad_()
    running = torch.zeros(c, device=DEVICE), torch.ones(c, device=DEVICE)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, *running, weight, bias, True)

    return {
        "ours": lambda x: batch_norm_pattern_relu(x, *running, weight, bias, atlas),
        "chain": lambda x: torch.relu_(tiled_dropout(norm(x), atlas)),
        "bn relu": lambda x: torch.relu_(norm(x)),
        "bn": norm,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_batch_norm(benchmark: Any, report: Report, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype, device=DEVICE)

    def forward(layer: Layer) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return layer(x)

        return run

    contenders = {name: forward(layer) for name, layer in layers(shape, dtype).items()}
    ours = contenders.pop("ours")
    timings = interleaved(benchmark, ours, {"x * 2": lambda: x * 2} | contenders, rounds_for(x))
    report.add("batch norm, pattern, ReLU: forward", shape, "", timings, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BACKWARD_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_batch_norm_both(benchmark: Any, report: Report, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()
    upstream = torch.randn(shape, dtype=dtype, device=DEVICE)

    def both(layer: Layer) -> Callable[[], object]:
        return lambda: torch.autograd.grad(layer(x), x, upstream)

    contenders = {name: both(layer) for name, layer in layers(shape, dtype).items()}
    ours = contenders.pop("ours")
    timings = interleaved(benchmark, ours, {"x * 2": lambda: x.detach() * 2} | contenders, rounds_for(x))
    report.add("batch norm, pattern, ReLU: forward + backward", shape, "", timings, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("kind", ["tiled", "drop path"])
def bench_residual(benchmark: Any, report: Report, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in "xr")
    atlas: Atlas = TiledPattern(size=0.25, stride=0.25, repeat=3, rotate=30).atlas(*shape[2:])
    peers: dict[str, Callable[[], object]] = {"x * 2": lambda: x * 2, "residual + x": lambda: residual + x}
    ours: Callable[[], object]
    if kind == "tiled":
        peers["chain"] = lambda: residual + tiled_dropout(x, atlas)
        ours = lambda: tiled_dropout_add(x, residual, atlas)  # noqa: E731
    else:
        peers["chain"] = lambda: residual + bernoulli_dropout(x, 0.2, shared="sample")
        ours = lambda: drop_path_add(x, residual, 0.2)  # noqa: E731
    report.add("residual + dropout(x): forward", shape, kind, interleaved(benchmark, ours, peers, rounds_for(x)), dtype)
