"""Activation checkpointing: gradients are those of the run without it, bit for bit.

The forward pass runs again during backward, and must draw the masks it drew before: from the random state that PyTorch
puts back (`preserve_rng_state`), or from a seed that is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from applied import MIXED
from applied import small
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.checkpoint import checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from trained import CASES
from trained import Case
from trained import Dropped
from trained import activation
from trained import every_op
from trained import fresh_dynamo  # noqa: F401

from autodropout import apply_policy

SEED = 2**40 + 8

either_mode = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


def train_step(forward: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, x: torch.Tensor) -> list[Any]:
    """Output and all gradients of a forward pass whose random numbers start anew."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    y = forward(x)
    y.backward(activation(tuple(y.shape), seed=6))
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def all_equal(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_op
@either_mode
@pytest.mark.parametrize(("preserve", "seed"), [(True, None), (True, SEED), (False, SEED)])
def test_gradients_are_those_without(case: Case, reentrant: bool, preserve: bool, seed: int | None) -> None:
    model = Dropped(case, seed)

    def checkpointed(x: torch.Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=reentrant, preserve_rng_state=preserve)

    x = activation(case.shape)
    assert all_equal(train_step(checkpointed, model, x), train_step(model, model, x))


@every_op
@either_mode
def test_without_preserved_state_and_seed_they_are_not(case: Case, reentrant: bool) -> None:
    """The two ways out of the test above are needed, and it can fail."""
    model = Dropped(case)

    def checkpointed(x: torch.Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=reentrant, preserve_rng_state=False)

    x = activation(case.shape)
    got, expected = train_step(checkpointed, model, x), train_step(model, model, x)
    assert torch.equal(got[0], expected[0])
    assert not all_equal(got, expected)


@every_op
def test_the_seed_of_the_next_step_is_the_same_with_and_without(case: Case) -> None:
    """Recomputation leaves the generator where the forward pass left it: the second step draws alike, too."""
    model = Dropped(case)
    x = activation(case.shape)
    after = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        train_step(forward, model, x)
        after.append(model(x))
    assert torch.equal(*after)


@every_op
@pytest.mark.parametrize("kept", ["draws", "masked", "random", "everything"])
def test_selective_checkpointing_may_keep_any_op(case: Case, kept: str) -> None:
    """What is kept and what is computed again need not be decided together: the seed may come from either."""
    model = Dropped(case)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        ours = getattr(op, "namespace", "") == "autodropout"
        small_output = "draw" in str(op) or "scale" in str(op)
        keep = {
            "draws": ours and small_output,
            "masked": ours and not small_output,
            "random": torch.Tag.nondeterministic_seeded in op.tags,
            "everything": True,
        }
        return CheckpointPolicy.MUST_SAVE if keep[kept] else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(x: torch.Tensor) -> Any:
        return checkpoint(
            model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )

    x = activation(case.shape)
    assert all_equal(train_step(checkpointed, model, x), train_step(model, model, x))


@either_mode
def test_a_policy_in_every_block(reentrant: bool) -> None:
    """Blocks of a network one by one, patterns of three kinds and masked skip tensors among them."""
    model = small()
    apply_policy(model, MIXED)
    images = activation((2, 3, 16, 16))
    expected = train_step(model, model, images)

    blocks = [module for module in model.modules() if type(module).__name__ == "WideBlock"]
    assert len(blocks) > 1
    for block in blocks:

        def forward(*args: Any, inner: Any = block.forward) -> Any:
            return checkpoint(inner, *args, use_reentrant=reentrant)

        block.forward = forward
    assert all_equal(train_step(model, model, images), expected)


@pytest.mark.usefixtures("fresh_dynamo")
@every_op
@pytest.mark.parametrize("seed", [None, SEED])
def test_compiled_checkpoints(case: Case, seed: int | None) -> None:
    """AOTAutograd decides anew what to keep; it draws a seed again by the random state it keeps (`rng_prims`)."""
    model = Dropped(case, seed)

    def checkpointed(x: torch.Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False)

    x = activation(case.shape)
    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    assert all_equal(train_step(compiled, model, x), train_step(model, model, x))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["tiled", "bernoulli", "block"])
def test_inductor_recomputes_the_masks_it_drew(name: str) -> None:
    """Its arithmetic rounds differently; a mask that changed between the passes would be an error of the size of x."""
    model = Dropped(CASES[name])

    def checkpointed(x: torch.Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False)

    x = activation(CASES[name].shape)
    compiled = torch.compile(checkpointed, fullgraph=True)
    for got, expected in zip(train_step(compiled, model, x), train_step(model, model, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
