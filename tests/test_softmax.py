"""softmax_token_dropout: values against float64 twins and the chain of the two, and the contracts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import mask_contracts as contracts
import pytest
import softmax_cases as cases
import torch
from marks import TORCH_2_6
from mask_contracts import LAYOUTS
from mask_contracts import SEED
from mask_contracts import fresh_dynamo  # noqa: F401
from softmax_cases import DTYPES
from softmax_cases import FIELDS
from softmax_cases import SHARING

from autodropout.kernels import softmax_token_dropout
from autodropout.kernels import token_dropout

OPS = torch.ops.autodropout
NORMALIZE = ("expected", "mask", "none")
SHAPES = [(2, 3, 5, 7), (3, 2, 8, 8), (1, 1, 1, 1), (2, 1, 3, 40)]


def fused(scores: torch.Tensor, fields: Any = FIELDS, seed: Any = SEED, **options: Any) -> torch.Tensor:
    return softmax_token_dropout(scores, fields, seed, **options)


def chain(scores: torch.Tensor, fields: Any = FIELDS, seed: Any = SEED, **options: Any) -> torch.Tensor:
    return token_dropout(torch.softmax(scores, -1), fields, seed, "NHQK", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_equals_the_twin(index: int, sharing: tuple[bool, bool], dtype: torch.dtype) -> None:
    normalize, rank, seed = NORMALIZE[index % 3], index % 2 * 3, 2**40 + index
    case = cases.case(SHAPES[index], dtype, seed, sharing, normalize, rank)
    options = {"share_t": sharing[0], "share_c": sharing[1], "normalize": normalize, "rank": rank}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        scores = case.scores.clone(memory_format=memory_format).requires_grad_()
        y = fused(scores, seed=seed, **options)
        (gradient,) = torch.autograd.grad(y, scores, case.upstream)
        assert y.stride() == scores.stride()
        cases.check(y, gradient, case)


@pytest.mark.parametrize("sharing", SHARING)
def test_equals_the_chain(sharing: tuple[bool, bool]) -> None:
    """In float32 on the CPU, to the bit forward: the same two operations."""
    scores = torch.randn(2, 3, 16, 24)
    options = {"share_t": sharing[0], "share_c": sharing[1]}
    assert torch.equal(fused(scores, **options), chain(scores, **options))
    assert torch.equal(fused(scores, (2, 3, 0.6), **options), chain(scores, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_spoils_its_row_but_no_dropped_weight(dtype: torch.dtype) -> None:
    kept = fused(torch.zeros(2, 3, 5, 7, dtype=dtype)) != 0
    for value in (float("nan"), float("inf")):
        scores = torch.randn(2, 3, 5, 7, dtype=dtype)
        scores[1, 2, 3, 4] = value
        y = fused(scores)
        assert bool((y[~kept] == 0).all())
        assert bool(y[1, 2, 3][kept[1, 2, 3]].isnan().all())
        assert int(y.isnan().any(-1).sum()) == 1


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    scores = torch.empty(shape, requires_grad=True)
    y = fused(scores)
    y.sum().backward()
    assert y.shape == scores.grad.shape == shape


@pytest.mark.parametrize("sharing", SHARING)
def test_gradients_and_their_gradients(sharing: tuple[bool, bool]) -> None:
    scores = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def function(scores: torch.Tensor) -> torch.Tensor:
        return fused(scores, share_t=sharing[0], share_c=sharing[1], normalize="mask")

    assert torch.autograd.gradcheck(function, (scores,))
    assert torch.autograd.gradgradcheck(function, (scores,))


def test_forward_mode_and_vmap_are_refused() -> None:
    scores = torch.randn(2, 2, 3, 3)
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward mode"):
        torch.func.jvp(fused, (scores,), (scores,))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda scores: fused(scores, seed=torch.tensor(3)))(scores[None])


def test_saved_for_backward() -> None:
    """The scores, 8 bytes a row, seed, scale and three fields: no mask, no weights."""
    scores = torch.randn(2, 4, 64, 64, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        fused(scores)
    assert sum(saved) == scores.nbytes + 8 * 2 * 4 * 64 + 8 + 8 + 24


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    scores = contracts.activation(layout, dtype=dtype)
    others = (FIELDS, torch.tensor(SEED), torch.tensor(1.5, dtype=torch.float64), False, False, 3)
    torch.library.opcheck(OPS.softmax_token_dropout.default, (scores.requires_grad_(), *others))
    with torch.no_grad():
        _, largest, inverse = OPS.softmax_token_dropout(scores, *others)
    arguments = (contracts.activation("channels_last").to(dtype), scores.detach(), largest, inverse, *others)
    torch.library.opcheck(OPS.softmax_token_dropout_backward.default, arguments)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_equals_eager(layout: str) -> None:
    contracts.check_compiled_equals_eager(lambda x, fields, seed: fused(x, fields, seed), FIELDS, layout)


@pytest.mark.usefixtures("fresh_dynamo")
def test_no_recompilation() -> None:
    values = [torch.tensor([1 + i % 7, i % 5, i / 50], dtype=torch.float64) for i in range(51)]
    contracts.check_no_recompilation(lambda x, fields, seed: fused(x, fields, seed), values)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 3, 4)}, ValueError, r"x must have 4 dimensions \(N, H, Q, K\), got shape"),
        ({"x": torch.ones(2, 3, 4, 5, dtype=torch.int64)}, TypeError, "x must be float64, .* got torch.int64"),
        ({"fields": 0.3}, TypeError, r"fields must be \(size, stride, rate\) or .* got 0.3"),
        ({"fields": (0, 1, 0.5)}, ValueError, r"size must be in \[1, "),
        ({"fields": (2, 1, 1.5)}, ValueError, r"rate must be in \[0, 1\], got 1.5"),
        ({"fields": FIELDS.float()}, ValueError, "fields must be a float64 CPU tensor"),
        ({"share_t": 1}, TypeError, "share_t must be a bool, got 1 of type int"),
        ({"share_c": None}, TypeError, "share_c must be a bool, got None"),
        ({"normalize": "sum"}, ValueError, "normalize must be .* got 'sum'"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[-2\^63, 2\^64\)"),
        ({"rank": -1}, ValueError, r"rank must be in \[0, 2\^32\), got -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    accepted = {"x": torch.randn(2, 3, 4, 5), "fields": FIELDS, "seed": 3}
    softmax_token_dropout(**accepted)
    with pytest.raises(error, match=message):
        softmax_token_dropout(**(accepted | arguments))


def test_forward_mode_is_refused_when_compiled() -> None:
    """PyTorch would take the tangent of the op to be zero."""
    x = torch.randn(1, 2, 3, 8)

    def tangent(x: torch.Tensor) -> torch.Tensor:
        derivative: torch.Tensor = torch.func.jvp(lambda x: softmax_token_dropout(x, FIELDS, SEED), (x,), (x,))[1]
        return derivative

    # Dynamo of 2.6 does not get as far.
    with pytest.raises(Exception, match="WITH_EXCEPT_START" if TORCH_2_6 else "no forward-mode derivative"):
        torch.compile(tangent, backend="aot_eager", fullgraph=True)(x)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.compile(tangent, backend="aot_eager")(x)


# In a process of its own: PyTorch keeps a part of this setting until its end.
COMPILED_AUTOGRAD = """
import torch
from autodropout.kernels import softmax_token_dropout
x = torch.randn((1, 2, 3, 8), generator=torch.Generator().manual_seed(0)).requires_grad_()
def loss(): return softmax_token_dropout(x, (2, 1, 0.5), 5).sin().sum()
(expected,) = torch.autograd.grad(loss(), x)
y = loss()
torch._dynamo.config.compiled_autograd = True
torch.compile(lambda y: y.backward(), backend="aot_eager")(y)
assert torch.equal(x.grad, expected)
"""


def test_compiled_autograd() -> None:
    subprocess.run([sys.executable, "-c", COMPILED_AUTOGRAD], check=True)
