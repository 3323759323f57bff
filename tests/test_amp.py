"""Mixed precision: masks do not depend on the dtype, and the scaler of gradients sees what it has to see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from trained import Case
from trained import Dropped
from trained import activation
from trained import every_op

from autodropout import pattern_dropout
from autodropout.nn import PatternDropout

SEED = 2**40 + 8


def scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_draws_the_masks_of_full_precision(case: Case, dtype: torch.dtype) -> None:
    """A dropout in autocast takes what the layer before it gives, and gives it back in that dtype, as `nn.Dropout`."""
    torch.manual_seed(0)
    first = nn.Linear(case.shape[-1], case.shape[-1])
    layer = PatternDropout(case.pattern)
    x = activation(case.shape).requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            hidden = first(x)
            torch.manual_seed(3)
            y = layer(hidden)
        assert y.dtype == hidden.dtype == (dtype if enabled else torch.float32)
        (gradient,) = torch.autograd.grad(y.float().sum(), hidden)
        assert gradient.dtype == hidden.dtype
        torch.manual_seed(3)
        assert torch.equal(y, pattern_dropout(hidden, case.pattern))
        results.append((y == 0, gradient == 0))
    masks = [mask for pair in results for mask in pair]
    assert 0 < int(masks[0].sum()) < masks[0].numel()
    for mask in masks[1:]:
        # A hidden value that rounds to 0 counts as dropped; the seed makes sure that there is none.
        assert torch.equal(mask, masks[0])


@every_op
def test_scaled_gradients_are_unscaled_without_a_trace(case: Case) -> None:
    """A power of two changes no mantissa: three steps with the scaler are three without it, bit for bit."""
    trained = []
    for scale in (1.0, 2.0**12):
        model = Dropped(case)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaled = scaler(scale)
        torch.manual_seed(1)
        for step in range(3):
            optimizer.zero_grad()
            scaled.scale(model(activation(case.shape, seed=step)).square().mean()).backward()
            scaled.step(optimizer)
            scaled.update()
        assert scaled.get_scale() == scale
        trained.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*trained, strict=True))


@every_op
@pytest.mark.parametrize("autocast", [False, True])
def test_infinite_gradients_skip_the_step_and_halve_the_scale(case: Case, autocast: bool) -> None:
    """They pass through where cells are kept: a mask that hid them there would let a broken step through."""
    model = Dropped(case)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaled = scaler(2.0**10)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(activation(case.shape))
    scaled.scale((y * float("inf")).sum()).backward()
    scaled.step(optimizer)
    scaled.update()
    assert scaled.get_scale() == 2.0**9
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


@every_op
def test_infinite_gradients_at_dropped_cells_are_none(case: Case) -> None:
    """What is dropped has no gradient, whatever comes back from above: not NaN, and no reason to skip a step."""
    x = activation(case.shape).requires_grad_()
    y = pattern_dropout(x, case.pattern, seed=SEED)
    dropped = y == 0
    for value in (float("inf"), float("nan")):
        upstream = torch.where(dropped, value, 1.0)
        (gradient,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
        assert not gradient[dropped].any()
        assert torch.equal(gradient, torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0])


@every_op
def test_float16_overflow_is_the_scalers_business(case: Case) -> None:
    """A gradient beyond float16 becomes infinite in the product, and is found: never clipped, never NaN."""
    x = activation(case.shape).half().requires_grad_()
    y = pattern_dropout(x, case.pattern, seed=SEED, normalize="expected")
    kept = y != 0
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, 60000.0))
    assert bool(kept.any())
    assert bool(torch.isinf(gradient[kept]).all())
    assert not gradient[~kept].any()


def test_grad_scaler_of_the_cpu_exists() -> None:
    """Since torch 2.3; were it to fall silent (`is_enabled`), the tests above would prove nothing."""
    one: Any = scaler(4.0)
    assert one.is_enabled()
    assert one.scale(torch.ones(())).item() == 4.0
