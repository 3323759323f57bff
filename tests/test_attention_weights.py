"""What is listened to inside an attention: every way to call softmax, and what is left to PyTorch as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn

from autodropout import Policy
from autodropout import Site
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout.attention_weights import Dropped
from autodropout.attention_weights import Listener
from autodropout.nn import PatternSite

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": lambda x: torch.softmax(x, -1, dtype=torch.float64),
    "torch, by position": lambda x: torch.softmax(x, -1, torch.float64),
    "torch, by other names": lambda x: torch.softmax(input=x, dim=x.dim() - 1, dtype=torch.float64),
    "tensor, by position": lambda x: x.softmax(-1, torch.float64),
    "special, by position": lambda x: torch.special.softmax(x, -1, torch.float64),
    "functional": lambda x: F.softmax(x, dim=-1, _stacklevel=5, dtype=torch.float64),
    "functional, by position": lambda x: F.softmax(x, -1, 3, torch.float64),
}


def seen_in(function: Callable[[], Tensor]) -> tuple[Tensor, list[tuple[str, int]]]:
    seen: list[tuple[str, int]] = []
    with Listener(lambda place, tokens: seen.append((place, tokens)), lambda _weight, _y: None):
        y = function()
    return y, seen


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5)])
def test_every_call_of_softmax_gives_what_it_gave(shape: tuple[int, ...], call: Callable[[Tensor], Tensor]) -> None:
    """Scores have four dimensions; with three it may be anything, a router of experts for one."""
    x = torch.randn(shape)
    y, seen = seen_in(lambda: call(x))
    assert y.dtype == torch.float64
    assert torch.equal(y, call(x))
    assert seen == ([("softmax", 5)] if len(shape) == 4 else [])


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 5)])
def test_a_softmax_that_writes_to_a_tensor_does_so(shape: tuple[int, ...]) -> None:
    x, out = torch.randn(shape), torch.zeros(shape)
    y, seen = seen_in(lambda: torch.softmax(x, -1, out=out))
    assert y is out
    assert torch.equal(out, x.softmax(-1))
    assert seen == []


def test_names_of_numpy_are_left_to_pytorch() -> None:
    x = torch.randn(2, 3, 4, 5)
    y, seen = seen_in(lambda: torch.softmax(x=x, axis=-1))  # type: ignore[call-overload]
    assert torch.equal(y, x.softmax(-1))
    assert seen == []


class Routed(nn.Module):
    """Beside its place a router, which computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.residual = nn.Linear(8, 2), PatternSite("residual")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.residual(x) * torch.softmax(self.gate(x), -1, torch.float32)[..., :1]
        return y


def test_a_policy_goes_on_a_model_with_a_router() -> None:
    x = torch.randn(2, 6, 8)
    policy = Policy((Site("s", 0.0, "residual", TokenPattern(1, rate=0.1)),))
    assert [site.name for site in apply_policy(Routed(), policy, x)] == ["residual"]


def test_what_is_before_the_heads_is_samples() -> None:
    scores, seen = torch.randn(2, 3, 4, 5, 6), []

    def weights(x: Tensor) -> Tensor:
        seen.append(x)
        return x.softmax(-1)

    with Dropped(weights, None, {}, []):
        y = scores.softmax(-1)
    assert torch.equal(seen[0], scores.flatten(0, 1))
    assert torch.equal(y, scores.softmax(-1))


def plainly(*arguments: Any, **options: Any) -> Tensor:
    """`scaled_dot_product_attention` as it is written out for a pattern, here one that drops nothing."""
    with Dropped(lambda scores: scores.softmax(-1), None, {}, []):
        y: Tensor = F.scaled_dot_product_attention(*arguments, **options)
    return y


# Under autocast PyTorch refuses a float32 mask beside float64 queries.
TAKEN = [
    (dtype, mask_dtype, autocast)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for mask_dtype in (torch.bool, torch.float32, None)
    for autocast in (False, True)
    if (dtype, mask_dtype, autocast) != (torch.float64, torch.float32, True)
]


@pytest.mark.parametrize(("dtype", "mask_dtype", "autocast"), TAKEN)
def test_every_mask_that_pytorch_takes(dtype: torch.dtype, mask_dtype: torch.dtype | None, autocast: bool) -> None:
    """A float32 mask beside queries of half a dtype is a mixed-precision model's; its numbers overflow float16."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = seen
    if mask_dtype != torch.bool:
        far = torch.finfo(torch.float16).min if mask_dtype is None else torch.finfo(torch.float32).min
        mask = torch.zeros(5, 5, dtype=mask_dtype or dtype).masked_fill(~seen, far)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = plainly(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    assert y.dtype == expected.dtype
    close: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 or autocast else {}
    torch.testing.assert_close(y, expected, **close)
    grads = [torch.autograd.grad(x.sum(), (q, k, v)) for x in (y, expected)]
    torch.testing.assert_close(*grads, **{name: 2 * value for name, value in close.items()})


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (2, 3, 5, 8), (2, 3, 4, 5, 8)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_heads_and_samples_may_be_missing(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *shape)
    seen = []

    def weights(scores: Tensor) -> Tensor:
        seen.append(scores.dim())
        return scores.softmax(-1)

    with Dropped(weights, None, {}, []):
        y = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, **options))
    assert seen == [4]


REFUSED: list[tuple[Tensor, bool, type[Exception], str]] = [
    (torch.ones(5, 5, dtype=torch.bool), True, ValueError, r"attn_mask must be None where is_causal is True, got .*5"),
    (torch.ones(5), False, ValueError, r"attn_mask must have at least 2 dimensions .*, got shape \(5,\)"),
    (torch.ones(5, 5, dtype=torch.int64), False, TypeError, "attn_mask must be bool, float32 or .*, got torch.int64"),
    (torch.ones(5, 5, dtype=torch.float64), False, TypeError, "attn_mask must be bool, .*float32, got torch.float64"),
]


@pytest.mark.parametrize(("mask", "causal", "error", "message"), REFUSED)
def test_masks_that_pytorch_refuses(mask: Tensor, causal: bool, error: type[Exception], message: str) -> None:
    q = torch.randn(2, 3, 5, 8)
    with pytest.raises((RuntimeError, IndexError)):
        F.scaled_dot_product_attention(q, q, q, mask, is_causal=causal)
    with pytest.raises(error, match=message):
        plainly(q, q, q, mask, is_causal=causal)
