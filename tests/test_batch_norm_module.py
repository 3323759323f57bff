"""The module BatchNormPatternReLU2d is the chain of batch norm, pattern dropout and ReLU."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from batch_norm_cases import affine
from mask_contracts import activation
from mask_contracts import fresh_dynamo  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend

from autodropout import TiledPattern
from autodropout.fused import BatchNormPatternReLU2d
from autodropout.kernels import tiled_dropout

PATTERN = TiledPattern(0.3, 0.25, 2, 30.0, 0.2)
FIELDS = PATTERN.fields()


def check_a_step(module: BatchNormPatternReLU2d, norm: torch.nn.BatchNorm2d, x: torch.Tensor, seed: int) -> None:
    """The module gives what the chain gives under the same seed, and both have the same state after it."""
    torch.manual_seed(seed)
    y = module(x)
    torch.manual_seed(seed)
    assert torch.equal(y, torch.relu(tiled_dropout(norm(x), FIELDS)))
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_the_module_is_the_chain_of_three_modules() -> None:
    norm = torch.nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)
    with torch.no_grad():
        norm.weight.copy_(affine(5)[0])
        norm.bias.copy_(affine(5)[1])
    module = BatchNormPatternReLU2d(5, PATTERN, eps=1e-3, momentum=0.3)
    assert module.state_dict().keys() == norm.state_dict().keys()
    module.load_state_dict(norm.state_dict())
    for i in range(3):
        check_a_step(module, norm, torch.randn(4, 5, 6, 7), seed=i)
    norm.load_state_dict(module.state_dict())
    x = torch.randn(4, 5, 6, 7)
    assert torch.equal(module.eval()(x), torch.relu(norm.eval()(x)))


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}])
def test_the_module_with_other_options(options: dict[str, Any]) -> None:
    norm, module = torch.nn.BatchNorm2d(5, **options), BatchNormPatternReLU2d(5, PATTERN, **options)
    for i in range(3):
        check_a_step(module, norm, torch.randn(4, 5, 6, 7), seed=i)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_module_stops_and_resumes_tracking(momentum: float | None) -> None:
    """`track_running_stats` set after the buffers are there, as to leave statistics out of some passes."""
    norm, module = torch.nn.BatchNorm2d(5, momentum=momentum), BatchNormPatternReLU2d(5, PATTERN, momentum=momentum)
    for i, tracked in enumerate([True, False, False, True]):
        norm.track_running_stats = module.track_running_stats = tracked
        before = copy.deepcopy(module.state_dict())
        x = torch.randn(4, 5, 6, 7) + 3
        check_a_step(module, norm, x, seed=i)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(module.state_dict()[name], before[name]) != tracked
    norm.load_state_dict(module.state_dict())
    module.track_running_stats = norm.track_running_stats = False
    assert torch.equal(module.eval()(x), torch.relu(norm.eval()(x)))


def test_the_module_can_be_copied_pickled_and_read() -> None:
    module = BatchNormPatternReLU2d(5, PATTERN)
    x = torch.randn(4, 5, 6, 7)
    torch.manual_seed(0)
    y = copy.deepcopy(module)(x)
    torch.manual_seed(0)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), y)
    assert "size=0.3" in repr(module)
    with pytest.raises(TypeError, match="pattern must be a TiledPattern, got 0.3 of type float"):
        BatchNormPatternReLU2d(5, 0.3)  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh_dynamo")
def test_no_recompilation() -> None:
    """50 patterns and seeds as the attribute of a module: one frame, no break, the values of eager code."""
    counter = CompileCounterWithBackend("aot_eager")
    module = BatchNormPatternReLU2d(5, PATTERN)
    plain = copy.deepcopy(module)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    x = activation("contiguous").requires_grad_()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(50):
            module.pattern = plain.pattern = TiledPattern(0.01 + i / 100, 0.2, i % 5, 7.0 * i)
            results = []
            for function in (compiled, plain):
                torch.manual_seed(i)
                y = function(x)
                results.append((y, *torch.autograd.grad(y, x, x.detach())))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1
    torch.testing.assert_close(module.running_var, plain.running_var, rtol=1e-6, atol=0)
