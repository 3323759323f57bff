"""The Triton kernels of batch_norm_pattern_relu against the float64 twin, and what the compiler makes of them.

Without a GPU they run interpreted, on CPU tensors, which takes milliseconds a program: few programs, small tensors.
"""

from __future__ import annotations

import batch_norm_cases as cases
import pytest
import torch
from batch_norm_cases import EPS
from mask_contracts import filled_memory  # noqa: F401

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("filled_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Channels by no power of two, maps of one fragment, of no whole fragments, of a fragment less than a tile; the next to
# last has no table of all windows, the last has planes that begin amid accesses and are more than a tile of them holds.
SHAPES = [(3, 5, 6, 7), (2, 3, 8, 8), (4, 20, 5, 9), (1, 1, 3, 3), (2, 70, 4, 4), (2, 3, 3, 700), (2, 88, 5, 5)]


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """On the device, and in memory as named; around what is sliced everything is NaN."""
    x = x.to(DEVICE)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "contiguous":
        return x
    n, c, h, w = x.shape
    return torch.full((n + 1, c, h + 2, w + 3), float("nan"), dtype=x.dtype, device=DEVICE)[1:, :, 1:-1, 2:-1].copy_(x)


# NumPy warns of a lane that never saw a cell.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("index", range(len(SHAPES)))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_kernels_equal_the_twin(layout: str, index: int) -> None:
    from autodropout.kernels import batch_norm_triton

    shape = SHAPES[index]
    dtypes = cases.DTYPES if shape[0] == 3 else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        share_c, normalize = index % 2 == 0, "mask" if index < 3 else "expected"
        seed = 2**40 + index
        case = cases.case(shape, dtype, seed, share_c, normalize, rank=3, offset=100.0 if index == 1 else 2.0)
        atlas, starts, scale = cases.drawn(shape, seed, share_c, normalize, 3, DEVICE)
        x, weight, bias = laid_out(case.x, layout), case.weight.to(DEVICE), case.bias.to(DEVICE)
        y, mean, rstd, unbiased = batch_norm_triton.forward(x, weight, bias, atlas, starts, scale, EPS)
        # Where it is dropped the gradient does not count, whatever it is.
        upstream = torch.where(case.kept, case.upstream, float("nan"))
        dx, dweight, dbias = batch_norm_triton.backward(
            laid_out(upstream, "channels_last"), x, weight, bias, mean, rstd, atlas, starts, scale
        )
        got = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "mean": mean, "unbiased": unbiased}
        cases.check({name: value.cpu() for name, value in got.items()}, case)
        assert (y.dtype, dx.dtype) == (dtype, dtype)
        assert y.stride() == dx.stride() == torch.empty_like(x).stride()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("shape", [(3, 5, 6, 7), (3, 5, 6, 8)])
def test_chunks_of_samples_are_combined(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples in chunks of two and one; and the same bits every time."""
    from autodropout.kernels import batch_norm_runs_triton
    from autodropout.kernels import batch_norm_triton

    case = cases.case(shape, torch.float32, 5, offset=30.0)
    atlas, starts, scale = cases.drawn(shape, 5, False, "mask", 0, DEVICE)
    monkeypatch.setattr(batch_norm_runs_triton, "TURNS", 1)
    monkeypatch.setattr(batch_norm_triton, "TURNS", 1)
    assert batch_norm_runs_triton.suits(case.x.to(DEVICE), atlas) == (shape == (3, 5, 6, 7))
    tensors = [tensor.to(DEVICE) for tensor in (case.x, case.weight, case.bias)]
    results: dict[int, dict[str, torch.Tensor]] = {}
    for programs in (1, 2, 2):
        monkeypatch.setattr(batch_norm_runs_triton, "REDUCING", programs)
        y, mean, rstd, unbiased = batch_norm_triton.forward(*tensors, atlas, starts, scale, EPS)
        dx, dweight, dbias = batch_norm_triton.backward(
            case.upstream.to(DEVICE), *tensors, mean, rstd, atlas, starts, scale
        )
        got = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "mean": mean, "unbiased": unbiased}
        got = {name: value.cpu() for name, value in got.items()}
        cases.check(got, case)
        assert all(torch.equal(value, got[name]) for name, value in results.get(programs, got).items())
        results[programs] = got


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
def test_not_a_number_stays_in_its_channel_and_out_of_dropped_cells() -> None:
    from autodropout.kernels import batch_norm_triton

    case = cases.case((2, 3, 8, 8), torch.float32, 7)
    atlas, starts, scale = cases.drawn((2, 3, 8, 8), 7, False, "mask", 0, DEVICE)
    x = case.x.clone()
    x[0, 1, 2, 3] = float("nan")
    arguments = [tensor.to(DEVICE) for tensor in (x, case.weight, case.bias)]
    y = batch_norm_triton.forward(*arguments, atlas, starts, scale, EPS)[0].cpu()
    assert bool((y[~case.kept] == 0).all())
    assert bool(y[:, 1][case.kept[:, 1]].isnan().all())
    assert not bool(y[:, [0, 2]].isnan().any())
