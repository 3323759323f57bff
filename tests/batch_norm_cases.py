"""Inputs of batch_norm_pattern_relu, what its float64 twin makes of them, and how far a result may be from that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from twins import batch_norm_numpy as twin
from twins import tiled_numpy
from twins.tiled_numpy import Tiling

TILING = Tiling(0.3, 0.25, 2, 30.0, 0.2)
EPS = 1e-5
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Tensors of one call in the dtypes in which they go in, the kept cells, and the twin's result for these values."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    upstream: torch.Tensor
    kept: torch.Tensor
    scale: float
    expected: twin.Result


def case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    seed: int,
    share_c: bool = False,
    normalize: str = "mask",
    rank: int = 0,
    offset: float = 2.0,
) -> Case:
    """Channels with means about `offset` and standard deviations from 0.5 to 2."""
    generator = torch.Generator().manual_seed(seed % 2**32)
    c = shape[1]
    x = torch.randn(shape, generator=generator) * torch.linspace(0.5, 2, c).view(1, c, 1, 1) + offset
    x, upstream = x.to(dtype), torch.randn(shape, generator=generator).to(dtype)
    of_channels = torch.float64 if dtype == torch.float64 else torch.float32
    weight = (torch.rand(c, generator=generator) + 0.5).to(of_channels)
    weight[::3] *= -1
    bias = torch.randn(c, generator=generator).mul(0.3).to(of_channels)
    kept = tiled_numpy.mask(TILING, *shape, seed, share_c, rank)
    if normalize == "mask":
        scale = tiled_numpy.mask_scale(kept)
    elif normalize == "expected":
        scale = tiled_numpy.expected_scale(tiled_numpy.expected_rate(TILING, *shape[2:]))
    else:
        scale = 1.0
    values = [tensor.double().numpy() for tensor in (x, weight, bias)]
    expected = twin.batch_norm_pattern_relu(*values, kept * scale, upstream.double().numpy(), EPS)
    return Case(x, weight, bias, upstream, torch.from_numpy(kept), scale, expected)


def drawn(shape: tuple[int, ...], seed: int, share_c: bool, normalize: str, rank: int, device: str) -> tuple[Any, ...]:
    """Atlas, starts and scale of a call of `case`, as the ops draw them."""
    import autodropout.kernels.tiled  # noqa: F401  (registers the op)
    from autodropout.kernels import Atlas

    n, c, *sides = shape
    t = TILING
    atlas = Atlas.of(t.size, t.stride, t.repeat, t.rotate, t.shear_x, t.shear_y, *sides)
    key = torch.tensor(seed, device=device)
    return atlas, *torch.ops.autodropout.tiled_draw(atlas.fields, key, n, c, sides, share_c, normalize, rank)


def check(got: dict[str, Any], case: Case) -> None:
    """Every result within its bound; dropped cells exactly 0.

    u is the rounding of the compute type, s that of the result's type. A mean of m numbers is at most 2 log2(m) u off,
    relative to the mean of their magnitudes (PyTorch and the kernels add up pairwise, or in tens of strands), and rstd
    likewise relative to itself; each of the few operations that follow adds u of what it handles. K = 8 + 2 log2(m)
    covers both. A bn within its bound of 0 may get another sign, and then dx one whole term; such cells are counted
    into the bounds of the sums, which are the only ones to see them.
    """
    x, expected = case.x.double().numpy(), case.expected
    u = torch.finfo(torch.float64 if case.x.dtype == torch.float64 else torch.float32).eps
    s = torch.finfo(case.x.dtype).eps
    m = case.x.numel() // case.x.shape[1]
    k = 8 + 2 * np.log2(m)

    def of_channels(values: Any) -> Any:
        return np.asarray(values)[None, :, None, None]

    weight, bias = (of_channels(v) for v in (case.weight.double(), case.bias.double()))
    rstd = 1 / np.sqrt(of_channels(expected.unbiased) * (m - 1) / m + EPS)
    magnitude = of_channels(np.abs(x).mean((0, 2, 3)))
    handled = np.abs(weight) * rstd * (np.abs(x) + magnitude) + np.abs(bias)
    bn_bound = k * u * handled
    unsure = np.abs(expected.bn) <= bn_bound

    y = got["y"].detach().double().numpy()
    assert (y[~case.kept.numpy()] == 0).all()
    assert (np.abs(y - expected.y) <= case.scale * bn_bound + s * np.abs(expected.y) + TINY[case.x.dtype]).all()
    factor = case.kept.numpy() * case.scale
    term = np.abs(case.upstream.double().numpy()) * factor
    xhat = (np.abs(x) + magnitude) * rstd  # an upper bound, which the rounding of x - mean is relative to
    dbias_bound = ((k * u + unsure) * term).sum((0, 2, 3))
    dweight_bound = ((2 * k * u * xhat + unsure * xhat) * term).sum((0, 2, 3))
    assert (np.abs(got["dbias"].double().numpy() - expected.dbias) <= dbias_bound).all()
    assert (np.abs(got["dweight"].double().numpy() - expected.dweight) <= dweight_bound).all()
    sums = of_channels(term.sum((0, 2, 3))) + xhat * of_channels((term * xhat).sum((0, 2, 3)))
    dx_bound = np.abs(weight) * rstd * (3 * k * u * (term + sums / m) + unsure * term)
    dx_bound += np.abs(weight) * rstd * (of_channels(dbias_bound) + xhat * of_channels(dweight_bound)) / m
    dx = got["dx"].double().numpy()
    assert (np.abs(dx - expected.dx) <= dx_bound + s * np.abs(expected.dx) + TINY[case.x.dtype]).all()
    for name, value in (("mean", expected.mean), ("unbiased", expected.unbiased)):
        if name in got:
            bound = k * u * (magnitude.reshape(-1) if name == "mean" else value + 2 * expected.mean**2 * u)
            assert (np.abs(got[name].double().numpy() - value) <= bound).all(), name


# Half the step between subnormal numbers, where rounding is not relative.
TINY = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}


def affine(c: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of so many channels."""
    generator = torch.Generator().manual_seed(4)
    return torch.rand(c, generator=generator) + 0.5, torch.randn(c, generator=generator)
