"""What is listened to inside an attention: every way to call softmax, and what is left to PyTorch as it is."""

from __future__ import annotations

from collections.abc import Callable

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
