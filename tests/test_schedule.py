"""Schedules: exact values, exact resume, one compilation for a whole ramp, refusals that name what is wrong."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from applied import MIXED
from applied import site_dropouts
from applied import small
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from trained import Case
from trained import activation
from trained import every_op
from trained import fresh_dynamo  # noqa: F401

from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Policy
from autodropout import TiledPattern
from autodropout import apply_policy
from autodropout import pattern_dropout
from autodropout.fused import BatchNormPatternReLU2d
from autodropout.nn import DropBlock2d
from autodropout.nn import DropPath
from autodropout.nn import PatternDropout
from autodropout.schedule import LinearSchedule

IMAGES = activation((2, 3, 16, 16))


def patterns(model: nn.Module) -> list[Any]:
    return [module.pattern for module in model.modules() if isinstance(module, PatternDropout)]


def draw(module: nn.Module, x: torch.Tensor, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    y: torch.Tensor = module(x)
    return y


def check_ramp(start: float, end: float, steps: int, seen: list[float]) -> None:
    """Against exact arithmetic: the ends themselves, between them four roundings, each of 2^-53 of at most 1."""
    for t, value in enumerate(seen):
        exact = Fraction(start) + (Fraction(end) - Fraction(start)) * min(t, steps) / steps
        assert abs(Fraction(value) - exact) <= Fraction(4, 2**53), t
    assert seen[0] == start
    assert set(seen[steps:]) == {end}


@pytest.mark.parametrize(("start", "end", "steps"), [(0.0, 0.3, 7), (0.9, 0.1, 10), (0.2, 0.2, 3), (0.0, 0.95, 1)])
def test_moves_linearly_and_stays(start: float, end: float, steps: int) -> None:
    layer = DropBlock2d(0.5, 3)
    schedule = LinearSchedule(layer, start, end, steps)
    seen = []
    for t in range(steps + 4):
        assert schedule.last_step == t
        assert schedule.value == layer.p
        seen.append(layer.p)
        schedule.step()
    check_ramp(start, end, steps, seen)


@every_op
def test_masks_are_those_of_the_pattern_of_the_step(case: Case) -> None:
    x = activation(case.shape)
    layer = PatternDropout(case.pattern)
    schedule = LinearSchedule(layer, 0.0, 0.9, 3, case.field)
    dropped = []
    for t in range(4):
        values = {key: value for key, value in case.pattern.to_json().items() if key != "op"}
        pattern = type(case.pattern)(**(values | {case.field: 0.0 + 0.9 * (t / 3)}))
        assert layer.pattern == pattern
        torch.manual_seed(3)
        y = pattern_dropout(x, pattern)
        assert torch.equal(draw(layer, x), y)
        dropped.append(int((y == 0).sum()))
        schedule.step()
    assert dropped[0] == 0
    assert dropped[0] < dropped[3]


def test_integer_fields_are_rounded() -> None:
    layer = PatternDropout(BlockPattern(0.1, 1))
    schedule = LinearSchedule(layer, 1, 3, 8, field="block_size")
    seen = []
    for _ in range(10):
        seen.append(layer.pattern.block_size)
        assert layer.pattern.rate == 0.1
        schedule.step()
    assert seen == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_fields_of_one_model_go_together() -> None:
    layer = DropBlock2d(0.5, 2)
    schedules = [LinearSchedule(layer, 0.0, 0.4, 4), LinearSchedule(layer, 7, 3, 4, field="block_size")]
    for t in range(5):
        assert layer.pattern == BlockPattern(0.4 * (t / 4), 7 - t)
        for schedule in schedules:
            schedule.step()


def test_strength_of_a_policy_scales_every_site_of_every_kind() -> None:
    model = small()
    apply_policy(model, MIXED, example=IMAGES)
    full = patterns(model)
    assert len({type(pattern) for pattern in full}) == 3
    schedule = LinearSchedule(model, 0.0, 1.0, 4, field="strength")
    for t in range(6):
        assert patterns(model) == [pattern.scaled(min(t, 4) / 4) for pattern in full]
        schedule.step()
    assert patterns(model) == full


def test_rate_of_a_policy_is_that_of_every_site() -> None:
    model = small()
    apply_policy(model, Policy.uniform(BlockPattern(0.1, 3)), example=IMAGES)
    assert len(patterns(model)) > 1
    LinearSchedule(model, 0.0, 0.2, 10).step()
    assert patterns(model) == [BlockPattern(0.0 + 0.2 * (1 / 10), 3)] * len(patterns(model))


def test_starts_at_once() -> None:
    layer = DropPath(0.3)
    LinearSchedule(layer, 0.0, 0.3, 10)
    x = activation((8, 4))
    assert torch.equal(layer(x), x)


def test_fused_layers_are_scheduled() -> None:
    pattern = TiledPattern(0.4, stride=0.2)
    fused, dropout = BatchNormPatternReLU2d(3, pattern), PatternDropout(pattern)
    schedule = LinearSchedule(nn.Sequential(fused, dropout), 0.0, 1.0, 4, field="strength")
    images = torch.randn(4, 3, 16, 16)
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    torch.testing.assert_close(fused(images), plain(images))
    for t in range(1, 6):
        schedule.step()
        assert fused.pattern == dropout.pattern == pattern.scaled(min(t, 4) / 4)
    assert LinearSchedule(BatchNormPatternReLU2d(3, pattern), 0.1, 0.2, 4, field="size").value == 0.1


# ---- compiled ------------------------------------------------------------------------------------------------------


@every_op
@pytest.mark.usefixtures("fresh_dynamo")
def test_fifty_steps_are_one_compilation(case: Case) -> None:
    layer = PatternDropout(case.pattern)
    width = case.shape[-1]
    model = nn.Sequential(nn.Linear(width, width), layer, nn.Linear(width, width))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    schedule = LinearSchedule(compiled, 0.0, 0.9, 50, case.field)
    x = activation(case.shape)
    zeros = []
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True, suppress_errors=False):
        for t in range(50):
            y = draw(compiled, x, seed=t)
            y.sum().backward()
            assert torch.equal(y, draw(model, x, seed=t))
            zeros.append(int((draw(layer, x, seed=0) == 0).sum()))
            schedule.step()
    assert counter.frame_count == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert zeros[0] == 0
    assert len(set(zeros)) > 5


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_ramped_policy_is_compiled_once() -> None:
    model = small()
    apply_policy(model, MIXED, example=IMAGES)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    schedules = [LinearSchedule(m, 0.0, 1.0, 50, field="strength") for m in (compiled, eager)]
    with torch._dynamo.config.patch(error_on_recompile=True, suppress_errors=False):
        for t in range(50):
            y = draw(compiled, IMAGES, seed=t)
            if t % 10 == 9:
                assert torch.equal(y, draw(eager, IMAGES, seed=t))
            else:  # the running statistics go on
                draw(eager, IMAGES, seed=t)
            for schedule in schedules:
                schedule.step()
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_draws_the_masks_of_the_schedule() -> None:
    layer = DropBlock2d(0.0, 3)
    compiled = torch.compile(layer, fullgraph=True)
    schedule = LinearSchedule(layer, 0.0, 0.6, 3)
    x = activation((4, 6, 8, 8))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            assert torch.equal(draw(compiled, x), draw(layer, x))
            schedule.step()


# ---- gradients -----------------------------------------------------------------------------------------------------


@every_op
def test_a_step_before_the_backward_pass_does_not_change_it(case: Case) -> None:
    x = activation(case.shape).requires_grad_()
    layer = PatternDropout(case.pattern)
    gradients = []
    for stepped in (False, True):
        schedule = LinearSchedule(layer, 0.3, 0.8, 2, case.field)
        y = draw(layer, x)
        if stepped:
            schedule.step()
        gradients.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    assert torch.equal(*gradients)


# ---- state ---------------------------------------------------------------------------------------------------------


def by_torch_save(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def policy_model() -> nn.Module:
    model = small()
    apply_policy(model, MIXED, example=IMAGES)
    return model


def copied_midway(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


@pytest.mark.parametrize("through", [by_torch_save, lambda state: json.loads(json.dumps(state)), copy.deepcopy])
@pytest.mark.parametrize("resumed_model", [lambda _: policy_model(), copied_midway], ids=["made anew", "copied"])
@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_goes_on_exactly_where_it_stopped(
    through: Callable[[Any], Any], resumed_model: Callable[[nn.Module], nn.Module], wrap: Any
) -> None:
    """Ten steps at once are four, a checkpoint, and six; the second schedule is made with other arguments."""
    straight = policy_model()
    schedule = LinearSchedule(straight, 0.1, 1.0, 8, field="strength")
    seen = []
    for _ in range(10):
        schedule.step()
        seen.append(patterns(straight))

    model = policy_model()
    schedule = LinearSchedule(model, 0.1, 1.0, 8, field="strength")
    for _ in range(4):
        schedule.step()
    state = through(schedule.state_dict())
    model = resumed_model(model)
    schedule = LinearSchedule(wrap(model), 0.0, 2.0, 3, field="strength")
    schedule.load_state_dict(state)
    assert patterns(model) == seen[3]
    for t in range(4, 10):
        schedule.step()
        assert patterns(model) == seen[t]
    assert schedule.last_step == 10


def test_resumes_a_field() -> None:
    layer, other = DropBlock2d(0.5, 3), DropBlock2d(0.1, 5)
    schedule = LinearSchedule(layer, 0.0, 0.3, 9)
    for _ in range(5):
        schedule.step()
    resumed = LinearSchedule(other, 0.2, 0.2, 1)
    resumed.load_state_dict(by_torch_save(schedule.state_dict()))
    for _ in range(6):
        assert other.p == layer.p
        assert other.pattern.block_size == 5
        schedule.step()
        resumed.step()


def test_resumes_an_integer_field() -> None:
    layer, other = DropBlock2d(0.5, 1), DropBlock2d(0.5, 3)
    schedule = LinearSchedule(layer, 1, np.int64(7), 3, "block_size")
    schedule.step()
    resumed = LinearSchedule(other, 3, 3, 1, "block_size")
    resumed.load_state_dict(by_torch_save(schedule.state_dict()))
    assert resumed.state_dict() == schedule.state_dict()
    assert other.pattern == layer.pattern == BlockPattern(0.5, 3)
    resumed.step()
    assert other.pattern == BlockPattern(0.5, 5)


def test_copies_of_model_and_schedule_stay_together() -> None:
    layer = DropPath(0.5)
    schedule = LinearSchedule(layer, 0.0, 0.4, 4)
    other, other_schedule = copy.deepcopy((layer, schedule))
    other_schedule.step()
    assert (layer.drop_prob, other.drop_prob) == (0.0, 0.1)
    assert repr(other_schedule) == "LinearSchedule(start=0.0, end=0.4, steps=4, field='rate', last_step=1)"


# ---- refusals ------------------------------------------------------------------------------------------------------

TILED = PatternDropout(TiledPattern(0.2, stride=0.2, repeat=0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model", 0.0, 0.1, 5), TypeError, r"^model must be an nn.Module, got str$"),
        ((nn.ReLU(), 0.0, 0.1, 5), ValueError, r"^model must have a PatternDropout or .* got ReLU without one$"),
        ((DropPath(), 0.0, 1.1, 5), ValueError, r"^end must .* of model: rate must be in \[0, 1\], got 1.1$"),
        ((DropBlock2d(0.1, 3), 0.96, 0.0, 5), ValueError, r"^start .* rate must be in \[0, 0.95\], got 0.96$"),
        ((DropPath(), float("nan"), 0.1, 5), ValueError, r"^start .* rate must be in .*, got nan$"),
        ((DropPath(), "0", 0.1, 5), TypeError, r"^start .* rate must be in .*, got '0' of type str$"),
        ((DropPath(), 0.0, True, 5), TypeError, r"^end .* rate must be in .*, got True of type bool$"),
        ((DropPath(), 0.0, 0.1, 0), ValueError, r"^steps must be an integer in .*, got 0$"),
        ((DropPath(), 0.0, 0.1, 2.5), TypeError, r"^steps must be an integer in .*, got 2.5 of type float$"),
        ((DropBlock2d(0.1, 3), 1, 7.5, 5, "block_size"), TypeError, r"^end .* block_size must be an integer .*7.5"),
        ((TILED, 0.0, 0.1, 5), ValueError, r"^field must be one of strength, size, .* which model has, got 'rate'$"),
        ((DropPath(), 0.0, 1.0, 5, "shared"), ValueError, r"^field must be one of strength, rate, .* got 'shared'$"),
        ((TILED, 0.0, 1.0, 5, "share_c"), ValueError, r"^field must be one of .* got 'share_c'$"),
        ((TILED, 0.1, 0.0, 5, "stride"), ValueError, r"^end must .* of model: stride must be above 0"),
        ((DropPath(), -0.1, 1.0, 5, "strength"), ValueError, r"^start must .* factor must be .* got -0.1$"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, error: type[Exception], message: str) -> None:
    before = patterns(arguments[0]) if isinstance(arguments[0], nn.Module) else []
    with pytest.raises(error, match=message):
        LinearSchedule(*arguments)
    assert before == (patterns(arguments[0]) if before else [])


def test_the_site_is_named() -> None:
    model = policy_model()
    names = list(site_dropouts(model))
    with pytest.raises(
        ValueError, match=rf"^field must be one of strength, size, .* which {names[0]} has, got 'rate'$"
    ):
        LinearSchedule(model, 0.0, 0.1, 5)
    layers = nn.Sequential(PatternDropout(BernoulliPattern(0.1)), DropBlock2d(0.1, 3))
    with pytest.raises(ValueError, match=r"^end must be allowed by the pattern of 1: rate must be in \[0, 0.95\]"):
        LinearSchedule(layers, 0.0, 1.0, 5)
    assert patterns(layers)[0].rate == 0.1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (TiledPattern(0.3), r"^pattern of 1 must have a field 'rate', got TiledPattern\("),
        (BlockPattern(0.3, 3), r"^value must be allowed by the pattern of 1: rate must be in \[0, 0.95\], got 1.0$"),
    ],
)
def test_a_step_that_fails_changes_nothing(pattern: Any, message: str) -> None:
    layers = nn.Sequential(DropPath(0.1), PatternDropout(BernoulliPattern(0.1)))
    schedule = LinearSchedule(layers, 0.0, 1.0, 2)
    schedule.step()
    layers[1].pattern = pattern
    before = patterns(layers)
    with pytest.raises(ValueError, match=message):
        schedule.step()
    assert schedule.last_step == 1
    assert patterns(layers) == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"last_step": -1}, ValueError, r"^last_step must be an integer in .* got -1$"),
        ({"end": -2.0}, ValueError, r"^end must be allowed .* got -2.0$"),
        ({"patterns": []}, ValueError, r"^state must be of a model with 1 patterns, got patterns=\[\]$"),
        ({"patterns": None}, ValueError, r"^state must be of a model with 1 patterns, got patterns=None$"),
        ({"patterns": [{"op": "tiles"}]}, ValueError, r"^state.patterns\[0\].op: must be one of .* got 'tiles'$"),
        ({"extra": 1}, ValueError, r"^state must be a mapping with the keys start, end, .* got \['end', 'extra', "),
    ],
)
def test_bad_states_are_named_and_change_nothing(change: Any, error: type[Exception], message: str) -> None:
    layer = DropPath(0.4)
    schedule = LinearSchedule(layer, 0.5, 1.0, 4, field="strength")
    state = schedule.state_dict()
    with pytest.raises(error, match=message):
        schedule.load_state_dict(state | change)
    with pytest.raises(ValueError, match=r"^state must be a mapping .* got NoneType$"):
        schedule.load_state_dict(None)  # type: ignore[arg-type]
    assert schedule.state_dict() == state
    assert layer.drop_prob == 0.2


@pytest.mark.parametrize("other", [nn.Sequential(DropPath(0.4), DropPath(0.4)), nn.Sequential(DropPath(0.4), TILED)])
def test_a_state_of_other_kinds_of_patterns_is_refused_and_changes_nothing(other: nn.Module) -> None:
    """A mask of one kind is not one of another; and a compiled model would recompile."""
    model = nn.Sequential(DropPath(0.4), DropBlock2d(0.2, 3))
    schedule = LinearSchedule(model, 0.5, 1.0, 4, field="strength")
    before, held = schedule.state_dict(), patterns(model)
    state = LinearSchedule(copy.deepcopy(other), 0.0, 1.0, 4, field="strength").state_dict()
    kind = type(patterns(other)[1]).__name__
    with pytest.raises(ValueError, match=rf"^state.patterns\[1\] must be a BlockPattern, which 1 has, got {kind}\("):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == before
    assert patterns(model) == held
    state["patterns"][1] = DropBlock2d(0.1, 7).pattern.to_json()  # other numbers of the same kind fit
    schedule.load_state_dict(state)
    assert schedule.state_dict() == state
