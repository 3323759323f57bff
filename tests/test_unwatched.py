"""Eager ops go the short way where nobody looks on, and the dispatcher's where somebody does: with the same result."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from marks import TORCH_2_6
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autodropout.kernels import Atlas
from autodropout.kernels import batch_norm_pattern_relu
from autodropout.kernels import bernoulli_dropout
from autodropout.kernels import block_dropout
from autodropout.kernels import drop_path_add
from autodropout.kernels import softmax_token_dropout
from autodropout.kernels import tiled_dropout
from autodropout.kernels import tiled_dropout_add
from autodropout.kernels import token_attention
from autodropout.kernels import token_dropout
from autodropout.kernels.seeds import Seed
from autodropout.kernels.seeds import as_number
from autodropout.kernels.seeds import as_seed
from autodropout.kernels.unwatched import is_unwatched

ATLAS = Atlas.of(0.5, 0.25, 2, 30.0, 0.0, 0.0, 4, 4)
SPANS = (2, 2, 0.5)

Op = Callable[[torch.Tensor], torch.Tensor]

# The ops that each call makes, and the call on an activation (2, 4, 4, 4).
OPS: dict[str, tuple[set[str], Op]] = {
    "tiled": ({"tiled_draw", "tiled_apply"}, lambda x: tiled_dropout(x, ATLAS, 1)),
    "block": ({"block_scale", "block_apply"}, lambda x: block_dropout(x, (0.3, 2), 1)),
    "bernoulli": ({"bernoulli_scale", "bernoulli_apply"}, lambda x: bernoulli_dropout(x, 0.3, 1)),
    "token": ({"token_scale", "token_apply"}, lambda x: token_dropout(x, SPANS, 1, "NHTD")),
    "tiled_add": ({"tiled_draw", "tiled_add"}, lambda x: tiled_dropout_add(x, x.cos(), ATLAS, 1)),
    "drop_path_add": ({"drop_path_add"}, lambda x: drop_path_add(x, x.cos(), 0.5, 1)),
    "batch_norm": (
        {"tiled_draw", "batch_norm_pattern_relu"},
        lambda x: batch_norm_pattern_relu(x, None, None, x.mean((0, 2, 3)), None, ATLAS, 1),
    ),
    "softmax": ({"token_scale", "softmax_token_dropout"}, lambda x: softmax_token_dropout(x, SPANS, 1)),
    "attention": ({"token_scale", "token_attention"}, lambda x: token_attention(x, x.sin(), x.cos(), SPANS, 1)),
}
CASES = pytest.mark.parametrize(("names", "op"), OPS.values(), ids=OPS)


def activation(**options: Any) -> torch.Tensor:
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.to(**options).requires_grad_()


def derivatives(op: Op, x: torch.Tensor) -> list[torch.Tensor]:
    """The result, the gradient, and the gradient of a function of the gradient."""
    y = op(x)
    (first,) = torch.autograd.grad(y, x, y.cos(), create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return [y.detach(), first.detach(), second]


class Watching(TorchDispatchMode):
    """Keeps the names of our ops that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "autodropout":
            self.seen.add(func._opname)
        return func(*args, **(kwargs or {}))


class Calling(TorchFunctionMode):
    """The same one level above."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "autodropout" in str(func):
            self.seen.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


class Labelled(torch.Tensor):
    """A subclass as users write it: what comes of one is one."""


@CASES
def test_both_ways_give_the_same_bits(names: set[str], op: Op) -> None:
    x = activation()
    mode = Watching()
    with mode:
        watched = derivatives(op, x)
    assert names <= mode.seen
    unwatched = derivatives(op, x)
    for one, other in zip(watched, unwatched, strict=True):
        assert torch.equal(one, other)


@CASES
def test_the_short_way_is_taken(names: set[str], op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ordinary tensors and parameters, also where nobody differentiates, and under autocast."""
    parts = {"token_apply": torch.ops.autodropout.token_apply}  # of softmax_token_dropout
    monkeypatch.setattr(torch.ops, "autodropout", SimpleNamespace(**{} if "token_apply" in names else parts))
    x = activation()
    torch.autograd.grad(op(x).sum(), x)
    op(torch.nn.Parameter(x.detach()))
    with torch.no_grad():
        op(x)
    with torch.autocast("cpu"):
        op(x.detach().float())


@CASES
@pytest.mark.parametrize("mode", [Calling, Watching])
def test_modes_see_the_ops(mode: type[Calling] | type[Watching], names: set[str], op: Op) -> None:
    with mode() as watching:
        op(activation())
    assert names <= watching.seen


@CASES
def test_profilers_see_the_ops(names: set[str], op: Op) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op(activation())
    assert {f"autodropout::{name}" for name in names} <= {event.key for event in profile.key_averages()}


@pytest.mark.skipif(TORCH_2_6, reason="torch 2.6 has no profiler of all threads")
def test_profilers_of_all_threads_see_the_ops() -> None:
    config = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=config) as profile:
        tiled_dropout(activation(), ATLAS, 1)
    assert {"autodropout::tiled_draw", "autodropout::tiled_apply"} <= {event.name for event in profile.events()}


@CASES
def test_what_functorch_traces_can_be_called(names: set[str], op: Op) -> None:
    """Also where a seed is drawn in it: every op of the graph has a name that Python takes."""
    x = activation().detach()
    torch.manual_seed(0)
    expected = op(bernoulli_dropout(x, 0.5))
    torch.manual_seed(0)
    traced = make_fx(lambda x: op(bernoulli_dropout(x, 0.5)))(x)
    torch.manual_seed(0)
    assert torch.equal(traced(x), expected)


def test_a_pytorch_without_the_private_names_goes_the_long_way() -> None:
    code = """
import torch
del torch._C._dispatch_keys
from autodropout.kernels import bernoulli_dropout, unwatched
assert not unwatched.is_unwatched((torch.ones(1),))
x = torch.ones(2, 3, requires_grad=True)
bernoulli_dropout(x, 0.5, 1).sum().backward()
print(x.grad.tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    x = torch.ones(2, 3, requires_grad=True)
    bernoulli_dropout(x, 0.5, 1).sum().backward()
    assert result.returncode == 0, result.stderr
    assert x.grad is not None
    assert result.stdout == f"{x.grad.tolist()}\n"


@CASES
def test_fake_tensors_stay_fake(names: set[str], op: Op) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # the fields of the atlas
        x = torch.empty(2, 4, 4, 4)
        y = op(x)
    assert y.shape == x.shape
    assert mode.is_our_fake(y)


@CASES
def test_subclasses_stay_subclasses(names: set[str], op: Op) -> None:
    x = activation().detach()
    y = op(x.as_subclass(Labelled))
    assert type(y) is Labelled
    assert torch.equal(y.as_subclass(torch.Tensor), op(x))


def contexts() -> dict[str, AbstractContextManager[Any]]:
    return {
        "dispatch mode": Watching(),
        "function mode": Calling(),
        "default device": torch.device("cpu"),
        "fake": FakeTensorMode(allow_non_fake_inputs=True),
        "inference": torch.inference_mode(),
        "profiler": torch.autograd.profiler.profile(),
    }


@pytest.mark.parametrize("name", contexts())
def test_what_watches(name: str) -> None:
    x = torch.ones(2, 2)
    assert is_unwatched((x, 1, None))
    with contexts()[name]:
        assert not is_unwatched((x,))
    assert is_unwatched((x,))


def test_whose_tensors_are_watched() -> None:
    x = torch.ones(2, 2)
    assert is_unwatched((x, torch.nn.Parameter(x), x[::2].T, x.to(memory_format=torch.preserve_format)))
    assert not is_unwatched((x, x.as_subclass(Labelled)))
    assert not is_unwatched((torch._neg_view(x),))
    assert not is_unwatched((x.to_sparse(),))
    assert not is_unwatched((x.to("meta"),))
    seen = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_unwatched((torch.ones(1),)) or is_unwatched((x,)))
        return x.sum()

    torch.func.grad(ask)(x)
    torch.func.vmap(ask)(x)
    torch.func.functionalize(ask)(x)
    torch.autograd.functional.jacobian(ask, x, vectorize=True, strategy="forward-mode")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(ask, (x,), check_trace=False)
    assert seen == [False] * 5


@pytest.mark.parametrize("seed", [None, 5, -1, 2**64 - 1, torch.tensor(-(2**63))])
def test_seeds_are_the_same_as_numbers(seed: Seed) -> None:
    """And take as much from PyTorch's generator."""
    drawn = []
    for number_of in (as_number, lambda seed: int(as_seed(seed, torch.device("cpu")))):
        torch.manual_seed(3)
        drawn.append([number_of(seed) % 2**64, number_of(seed) % 2**64, torch.rand(()).item()])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("seed", "error"), [(True, TypeError), (1.0, TypeError), (2**64, ValueError)])
def test_a_seed_that_is_none_is_refused(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed must be"):
        as_number(seed)


def test_threads_draw_seeds_of_their_own() -> None:
    """From one generator, every one once, whichever thread draws it."""
    torch.manual_seed(4)
    alone = {as_number(None) for _ in range(400)}
    torch.manual_seed(4)
    with ThreadPoolExecutor(4) as pool:
        together = [
            number
            for numbers in pool.map(lambda _: [as_number(None) for _ in range(100)], range(4))
            for number in numbers
        ]
    assert len(together) == 400
    assert set(together) == alone


@pytest.mark.parametrize("first", ["with torch.inference_mode(): {}", "torch.export.export(Model(), (x,))"])
def test_the_first_call_may_be_under_a_mode(first: str) -> None:
    """The folder of the ops is imported by the first call: nothing that is kept may be made under its mode."""
    call = "autodropout.pattern_dropout(x, autodropout.TiledPattern(0.2))"
    code = f"""
import torch, autodropout
x = torch.ones(2, 4, 8, 8)

class Model(torch.nn.Module):
    def forward(self, x):
        return {call}

{first.format(call)}
assert {call}.count_nonzero() < x.numel()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
