"""Everything at once: torch.compile, checkpoints, autocast, a schedule, and a custom op that is not ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from marks import dynamo_reads_patterns_lazily
from torch import nn
from torch.utils.checkpoint import checkpoint
from trained import CASES
from trained import activation
from trained import fresh_dynamo  # noqa: F401

from autodropout import Pattern
from autodropout import TokenPattern
from autodropout.nn import PatternDropout
from autodropout.schedule import LinearSchedule

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SHAPE = (4, 6, 8, 7)
STEPS = 3


@torch.library.custom_op("autodropout_tests::above_one", mutates_args=())
def above_one(x: torch.Tensor) -> torch.Tensor:
    """|x| + 1: where the mask keeps, the product is not 0, and its gradient is not either."""
    return x.abs() + 1


@above_one.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


above_one.register_autograd(
    lambda ctx, grad: grad * torch.where(ctx.saved_tensors[0] < 0, -1, 1).to(grad.dtype),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Block(nn.Module):
    """x plus a layer, the foreign op, a probe whose gradient shows the mask of the backward pass, and a pattern."""

    def __init__(self, dropout: PatternDropout) -> None:
        super().__init__()
        self.mix = nn.Linear(SHAPE[-1], SHAPE[-1])
        self.probe = nn.Parameter(torch.ones(SHAPE))
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = above_one(self.mix(x))
        h = h * self.probe.to(h.dtype)
        if isinstance(self.dropout.pattern, TokenPattern):
            h = self.dropout(h.flatten(2)).view(SHAPE)
        else:
            h = self.dropout(h)
        return x.to(h.dtype) + h, h != 0


class Model(nn.Module):
    """One block per op, each second one checkpointed, the masks beside the output."""

    def __init__(self, names: Iterable[str] = CASES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(PatternDropout(CASES[name].pattern)) for name in names)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        masks = []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for i, block in enumerate(self.blocks):
                x, kept = checkpoint(block, x, use_reentrant=False) if i % 2 else block(x)
                masks.append(kept)
        return x, masks


def steps(model: Model, compiled: Any) -> list[dict[str, Any]]:
    """Three steps of a ramp; forward and backward as compiled, weights as they are."""
    schedule = LinearSchedule(model, 0.5, 1.0, STEPS, field="strength")
    seen = []
    for step in range(STEPS):
        model.zero_grad()
        torch.manual_seed(step)
        y, masks = compiled(activation(SHAPE, seed=step))
        (y.float() * activation(SHAPE, seed=9)).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        patterns = [block.dropout.pattern for block in model.blocks]
        seen.append({"y": y.detach(), "masks": masks, "gradients": gradients, "patterns": patterns})
        schedule.step()
    return seen


def masks_of_seed(patterns: list[Pattern], seed: torch.Tensor) -> list[torch.Tensor]:
    """What each block would keep if it drew this seed."""
    ones = torch.ones(SHAPE)
    inputs = [ones.flatten(2) if isinstance(pattern, TokenPattern) else ones for pattern in patterns]
    return [(pattern._drop(x, seed, 0) != 0).view(SHAPE) for pattern, x in zip(patterns, inputs, strict=True)]


def check_backward_masks(step: dict[str, Any], masks: list[torch.Tensor]) -> None:
    """The gradient of a probe is 0 at all dropped cells, and hardly anywhere else: bfloat16 sums may cancel."""
    gradients = [gradient for name, gradient in step["gradients"].items() if name.endswith("probe")]
    for kept, gradient in zip(masks, gradients, strict=True):
        assert not gradient[~kept].any()
        assert int((gradient[kept] != 0).sum()) > 0.99 * int(kept.sum())


def test_the_model_shows_its_masks() -> None:
    """Every pattern drops something and keeps something, and the backward pass uses the masks of the forward pass."""
    model = Model()
    for step in steps(model, model):
        assert step["y"].dtype == torch.bfloat16
        assert all(bool(kept.any()) for kept in step["masks"])
        check_backward_masks(step, step["masks"])


def test_checkpoints_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    expected = steps(model, model)
    fresh = Model()
    monkeypatch.setattr("test_composition.checkpoint", lambda block, x, use_reentrant: block(x))
    for got, want in zip(steps(fresh, fresh), expected, strict=True):
        assert torch.equal(got["y"], want["y"])
        assert all(torch.equal(got["gradients"][name], want["gradients"][name]) for name in want["gradients"])


def compiled_steps(model: Model, **arguments: Any) -> list[dict[str, Any]]:
    """One graph, and no recompilation over the ramp."""
    compiled = torch.compile(model, fullgraph=True, **arguments)
    with torch._dynamo.config.patch(error_on_recompile=True):
        return steps(model, compiled)


@dynamo_reads_patterns_lazily
def test_compiled_equals_eager() -> None:
    model = Model()
    for got, expected in zip(compiled_steps(Model(), backend="aot_eager"), steps(model, model), strict=True):
        assert torch.equal(got["y"], expected["y"])
        assert all(torch.equal(*pair) for pair in zip(got["masks"], expected["masks"], strict=True))
        for name, gradient in expected["gradients"].items():
            assert torch.equal(got["gradients"][name], gradient), name


@pytest.mark.slow
@dynamo_reads_patterns_lazily
def test_inductor_draws_the_masks_of_eager_in_program_order() -> None:
    """It fuses, and so rounds differently: masks are compared, of the forward and of the backward pass."""
    model = Model()
    in_order = compiled_steps(Model(), options={"reorder_for_peak_memory": False})
    for got, expected in zip(in_order, steps(model, model), strict=True):
        assert all(torch.equal(*pair) for pair in zip(got["masks"], expected["masks"], strict=True))
        check_backward_masks(got, expected["masks"])


@pytest.mark.slow
@dynamo_reads_patterns_lazily
def test_inductor_draws_the_seeds_of_eager_in_an_order_of_its_own() -> None:
    """By default it moves ops that do not depend on each other, draws among them, to save memory.

    So each mask is that of one of the seeds that eager code draws in this step, and backward uses it, too.
    """
    names = ("tiled", "bernoulli", "block", "token")
    for step, got in enumerate(compiled_steps(Model(names))):
        torch.manual_seed(step)
        seeds = [torch.ops.autodropout.draw_seed(device=torch.device("cpu")) for _ in names]
        possible = [masks_of_seed(got["patterns"], seed) for seed in seeds]
        for i, kept in enumerate(got["masks"]):
            assert any(torch.equal(kept, masks[i]) for masks in possible), i
        check_backward_masks(got, got["masks"])
