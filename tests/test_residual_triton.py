"""The Triton kernels of `residual + dropout(x)` against the float64 twin, interpreted where there is no GPU."""

from __future__ import annotations

from typing import Any

import batch_norm_cases as cases
import numpy as np
import pytest
import torch
from mask_contracts import filled_memory  # noqa: F401
from test_residual import TILING
from test_residual import pair
from twins import residual_numpy as twin
from twins import tiled_numpy

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("filled_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 5, 6, 7), (2, 3, 8, 8), (4, 20, 5, 9), (2, 3, 3, 700)]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(y: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, kept: Any, scale: float) -> None:
    double = x.dtype == torch.float64
    compute = torch.finfo(torch.float64 if double else torch.float32).eps / 2
    result = torch.finfo(x.dtype).eps / 2 if x.dtype.itemsize == 2 else 0.0
    values = (x.double().numpy(), residual.double().numpy(), kept, scale)
    error = np.abs(y.cpu().double().numpy() - twin.add(*values))
    # Half a step of float16's subnormal numbers, where rounding is not relative.
    assert (error <= twin.bound(*values, compute, result) + (2.0**-25 if x.dtype == torch.float16 else 0)).all()
    assert y.dtype == x.dtype


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "sliced":
        n, c, h, w = x.shape
        return torch.full((n + 1, c, h, w + 3), float("nan"), dtype=x.dtype, device=DEVICE)[1:, :, :, 1:-2].copy_(x)
    return x.to(DEVICE).to(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_tiled_equals_the_twin(index: int, layout: str) -> None:
    from autodropout.kernels import residual_triton

    shape, share_c = SHAPES[index], index % 2 == 1
    atlas, starts, scale = cases.drawn(shape, index, share_c, "mask", 0, DEVICE)
    kept = tiled_numpy.mask(TILING, *shape, index, share_c)
    for dtype in DTYPES if index == 0 else DTYPES[1::2]:
        x, residual = pair(shape, dtype)
        x[torch.from_numpy(~kept)] = float("nan")
        laid = laid_out(x, layout)
        y = residual_triton.add_tiled(laid, laid_out(residual, "channels_last"), atlas, starts, scale)
        check(y, x, residual, kept, tiled_numpy.mask_scale(kept))
        assert y.stride() == torch.empty_like(laid).stride()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_drop_path_equals_the_twin(layout: str) -> None:
    """Also where a sample is longer than a program, and of no whole vectors."""
    from autodropout.kernels import residual_triton

    for shape in ((3, 5, 6, 7), (2, 3, 40, 40)):
        kept = np.array([True, False, True][: shape[0]]).reshape(-1, 1, 1, 1)
        for dtype in DTYPES:
            x, residual = pair(shape, dtype)
            x[1] = float("nan")
            factor = torch.tensor([1.5, 0.0, 1.5][: shape[0]], device=DEVICE)
            factor = factor.to(torch.float64 if dtype == torch.float64 else torch.float32)
            laid = laid_out(x, layout)
            y = residual_triton.add_scaled_samples(laid, laid_out(residual, "channels_last"), factor)
            check(y, x, residual, kept, 1.5)
            assert y.stride() == torch.empty_like(laid).stride()


def test_drop_path_of_other_dimensions() -> None:
    from autodropout.kernels import residual_triton

    for shape in ((3,), (3, 5), (3, 4, 6), (3, 2, 2, 2, 2)):
        x, residual = (tensor.to(DEVICE) for tensor in pair(shape))
        factor = torch.tensor([2.0, 0.0, 2.0], device=DEVICE)
        y = residual_triton.add_scaled_samples(x, residual, factor)
        assert torch.equal(y, residual + x * factor.view(-1, *[1] * (len(shape) - 1)))
