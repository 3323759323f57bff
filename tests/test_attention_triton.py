"""The Triton kernels of token_attention against the float64 twin, interpreted where there is no GPU."""

from __future__ import annotations

import attention_cases as cases
import pytest
import torch
from attention_cases import DTYPES
from attention_cases import FIELDS
from attention_cases import SHARING
from mask_contracts import SEED
from mask_contracts import filled_memory  # noqa: F401

from autodropout.kernels import token_attention
from autodropout.kernels import token_dropout

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("filled_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Samples, heads, queries, keys, head size. Several tiles each way, the last not full; heads begin 0 to 3 channels
# behind a multiple of 4; a memory; a head size that fills no tile, and one that does.
SHAPES = [((1, 4, 67, 101, 20), True), ((2, 2, 33, 45, 32), False), ((1, 1, 1, 1, 3), True)]


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_kernels_equal_the_twin(index: int, sharing: tuple[bool, bool]) -> None:
    shape, causal = SHAPES[index]
    seed, rank = 2**40 + index, index % 2 * 3
    plain = sharing == (False, False)
    # The other dtypes differ in nothing that has to do with sharing.
    for dtype in DTYPES[1:] if plain else DTYPES[1:2]:
        case = cases.case(shape, dtype, seed, sharing, "expected", rank, causal)
        # Transposed as projections give them, and such that rows are copied together first.
        gaps = torch.empty(*case.v.shape[:3], 2 * case.v.shape[3], dtype=dtype, device=DEVICE)[..., ::2]
        leaves = (
            case.q.to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
            case.k.to(DEVICE).clone().requires_grad_(),
            (gaps.copy_(case.v) if plain else case.v.to(DEVICE).clone()).requires_grad_(),
        )
        options = {"share_t": sharing[0], "share_c": sharing[1], "rank": rank, "implementation": "triton"}
        out = token_attention(*leaves, FIELDS, seed, causal=causal, scale=case.factor, **options)
        gradients = torch.autograd.grad(out, leaves, case.upstream.to(DEVICE))
        assert out.stride() == gradients[0].stride() == leaves[0].stride()
        got = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
        cases.check({name: one.cpu() for name, one in got.items()}, case, rounded=True)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("sharing", SHARING)
def test_masks_and_scale_are_those_of_token_dropout(sharing: tuple[bool, bool], dtype: torch.dtype) -> None:
    """Values that are unit vectors show the weights. Scores of 0 make them exactly 1 before the sum over 64 keys."""
    options = {"share_t": sharing[0], "share_c": sharing[1], "rank": 3}
    zeros = torch.zeros(1, 2, 67, 64, dtype=dtype, device=DEVICE)
    keys, values = (x.expand(1, 2, 64, 64) for x in (zeros[:, :, :1], torch.eye(64, dtype=dtype, device=DEVICE)))
    for normalize in ("expected", "mask", "none"):
        shown = token_attention(
            zeros, keys, values, FIELDS, SEED, normalize=normalize, implementation="triton", **options
        )
        expected = token_dropout(
            torch.full_like(zeros, 1 / 64), FIELDS, SEED, layout="NHQK", normalize=normalize, **options
        )
        assert torch.equal(shown, expected)
    assert 0 < int((shown == 0).sum()) < shown.numel()


def test_kernels_and_runs_of_rows_save_the_same() -> None:
    """Either may run backward on what the other saved, and rows of all keys do not depend on where tiles end."""
    q, k, v = (torch.randn(1, 2, length, 16) for length in (5, 70, 70))
    arguments = (FIELDS, torch.tensor(SEED), torch.tensor(1.5, dtype=torch.float64), 0.3, False, False, False, 0)
    of_runs, of_kernels = (
        torch.ops.autodropout.token_attention(q.to(device), k.to(device), v.to(device), *at(arguments, device), which)
        for which, device in ((False, "cpu"), (True, DEVICE))
    )
    # Of a score of size up to 6 in fp32, by 16 products, and a sum of 70 terms: (16 + 70 + 4) * 6 roundings.
    for one, other in zip(of_runs, of_kernels, strict=True):
        assert float((one - other.cpu()).abs().max()) <= 540 * torch.finfo(torch.float32).eps * 3


def at(arguments: tuple[object, ...], device: str) -> tuple[object, ...]:
    """Seed and scale on the device; the fields stay on the host."""
    return (arguments[0], *(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments[1:]))


def test_opcheck() -> None:
    q, k, v = (torch.randn(1, 2, length, 16, device=DEVICE).requires_grad_() for length in (6, 9, 9))
    others = at(
        (FIELDS, torch.tensor(SEED), torch.tensor(1.5, dtype=torch.float64), 0.3, True, False, False, 3), DEVICE
    )
    torch.library.opcheck(torch.ops.autodropout.token_attention.default, (q, k, v, *others, True))
    with torch.no_grad():
        out, lse = torch.ops.autodropout.token_attention(q, k, v, *others, True)
    arguments = (torch.randn_like(q), q.detach(), k.detach(), v.detach(), out, lse, *others, True)
    torch.library.opcheck(torch.ops.autodropout.token_attention_backward.default, arguments)


def test_rows_that_32_bits_do_not_reach_are_copied_together() -> None:
    """Offsets inside of a head are 32-bit numbers; from head to head they have 64."""
    from autodropout.kernels.attention_triton import _addressed

    far = torch.empty_strided((1, 1, 2**10, 8), (0, 0, 2**21, 1), device="meta")
    assert _addressed(far).stride(2) == 8
    near = torch.empty_strided((1, 1, 2**10, 8), (0, 0, 2**20, 1), device="meta")
    assert _addressed(near) is near
    gaps = torch.empty_strided((1, 1, 4, 8), (64, 64, 16, 2), device="meta")
    assert _addressed(gaps).stride(3) == 1
