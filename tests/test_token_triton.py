"""The Triton kernels of the token op, run interpreted without a GPU, against the op on the CPU: bit for bit."""

from __future__ import annotations

import pytest
import torch
from mask_contracts import DTYPES
from mask_contracts import SEED
from mask_contracts import filled_memory  # noqa: F401

from autodropout.kernels import token_dropout
from autodropout.kernels.token import by_token
from autodropout.kernels.token import sides_of

token_triton = pytest.importorskip("autodropout.kernels.token_triton")
token_draw_triton = pytest.importorskip("autodropout.kernels.token_draw_triton")
pytestmark = pytest.mark.usefixtures("filled_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARING = [(False, False), (True, False), (False, True), (True, True)]
# (layout, shape, size, stride, rate). The interpreter takes 11 ms a program: tensors are small.
CASES = [
    ("NTC", (2, 12, 6), 3, 2, 0.5),
    ("NTC", (1, 70, 40), 1, 0, 0.3),
    ("NTC", (3, 5, 1), 50, 0, 0.6),
    ("TNC", (9, 2, 24), 4, 1, 1.0),
    ("NHTD", (2, 2, 12, 8), 2, 3, 0.5),
    ("NHTD", (1, 3, 7, 4), 2**30 - 1, 2**30 - 1, 0.5),
    ("NHTD", (2, 3, 6, 5), 5, 0, 0.4),  # calls of Philox that straddle heads
    ("NHQK", (2, 2, 3, 12), 3, 2, 0.5),
    ("NHQK", (1, 3, 5, 33), 7, 3, 0.0),
    ("NHQK", (2, 3, 1, 16), 2, 1, 0.7),
    ("NHQK", (1, 2, 6, 1), 1, 1, 0.5),
]


def run(
    x: torch.Tensor,
    layout: str,
    values: tuple[float, ...],
    sharing: tuple[bool, bool],
    normalize: str = "none",
    seed: int = SEED,
    rank: int = 3,
) -> torch.Tensor:
    """What the launchers make of x, in memory that was full of NaN."""
    x = x.to(DEVICE)
    fields = torch.tensor(values, dtype=torch.float64)
    on_device = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=DEVICE)
    if normalize == "mask":
        scale = token_draw_triton.scale_of_mask(fields, on_device, *sides_of(x.shape, layout), *sharing, rank)
    else:
        sides = sides_of(x.shape, layout)
        scale = torch.ops.autodropout.token_scale(fields, on_device, *sides, *sharing, normalize, rank)
    y = torch.empty_like(x).fill_(float("nan"))
    token_triton.apply(by_token(x, layout), by_token(y, layout), fields, on_device, scale, *sharing, rank)
    return y.cpu()


@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_equals_the_cpu(index: int, sharing: tuple[bool, bool]) -> None:
    """NaN and infinities where it drops, in two of the dtypes and scales each, and a rank with its highest bit set."""
    layout, shape, *values = CASES[index]
    for i in (index, index + 1):
        dtype, normalize, rank = DTYPES[i % 4], ("mask", "expected", "mask")[i % 3], (3, 2**31, 2**32 - 1)[i % 3]
        seed = (SEED, -1, 2**64 - 5)[i % 3]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        kept = token_dropout(torch.ones(shape), tuple(values), seed, layout, *sharing, "none", rank) != 0
        expected = token_dropout(x, tuple(values), seed, layout, *sharing, normalize, rank)
        for poison in (float("nan"), float("inf")):
            y = run(torch.where(kept, x, poison), layout, tuple(values), sharing, normalize, seed, rank)
            assert torch.equal(y, expected), (dtype, normalize, poison)
            if not kept.all():
                break


def in_memory(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same numbers, the dimensions lying in memory in this order."""
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.dim())])


@pytest.mark.parametrize("sharing", SHARING[:3], ids=str)
@pytest.mark.parametrize("layout", ["NHTD", "NHQK"])
@pytest.mark.parametrize("memory", [(0, 2, 1, 3), (3, 0, 1, 2), (0, 1, 3, 2), (2, 1, 3, 0), "sliced", "expanded"])
def test_any_strides(layout: str, memory: tuple[int, ...] | str, sharing: tuple[bool, bool]) -> None:
    dense = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    if memory == "sliced":
        x = torch.full((3, 4, 9, 12), float("nan"))[1:, :, 2:8, 3:11].copy_(dense)
    elif memory == "expanded":
        x = dense[:, :1, :, :1].expand_as(dense)
    else:
        x = in_memory(dense, memory)
    y = run(x, layout, (3, 1, 0.5), sharing)
    assert torch.equal(y, token_dropout(x.contiguous(), (3, 1, 0.5), SEED, layout, *sharing, "none", 3))
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("sharing", SHARING[:3], ids=str)
@pytest.mark.parametrize(("layout", "shape"), [("NTC", (2, 1100, 12)), ("NTC", (1, 3, 2100)), ("NHQK", (1, 3, 70, 40))])
def test_many_programs(layout: str, shape: tuple[int, ...], sharing: tuple[bool, bool]) -> None:
    """Where one kernel or the other takes more than one program, also for the count."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).half()
    y = run(x, layout, (5, 4, 0.5), sharing, "mask")
    assert torch.equal(y, token_dropout(x, (5, 4, 0.5), SEED, layout, *sharing, "mask", 3))


def test_everything_dropped_scales_by_zero() -> None:
    y = run(torch.full((2, 5, 6), float("nan")), "NTC", (1, 0, 1.0), (False, False), "mask")
    assert torch.equal(y, torch.zeros(2, 5, 6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_cuda_graph_capture(sharing: tuple[bool, bool]) -> None:
    """Forward and backward are captured and replayed with other seeds."""
    x = torch.randn(4, 64, 128, device="cuda", requires_grad=True)
    seed = torch.tensor(SEED, device="cuda")
    fields = torch.tensor([4, 4, 0.5], dtype=torch.float64)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = token_dropout(x, fields, seed, "NTC", *sharing, "mask")
        (gradient,) = torch.autograd.grad(y, x, x.detach())
        return y.detach(), gradient

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradient = step()
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, gradient)
        assert torch.equal(y, step()[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_on_a_gpu(dtype: torch.dtype) -> None:
    for layout, shape, *values in CASES:
        for sharing in SHARING:
            x = torch.randn(shape).to(dtype)
            y = token_dropout(x.cuda(), tuple(values), SEED, layout, *sharing, "mask").cpu()
            assert torch.equal(y, token_dropout(x, tuple(values), SEED, layout, *sharing, "mask"))
