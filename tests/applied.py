"""Policies, models and measurements that the tests of `apply_policy` share."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from twins import tiled_numpy as twin

from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Pattern
from autodropout import Policy
from autodropout import Site
from autodropout import TiledPattern
from autodropout import apply_policy
from autodropout.apply import SiteDropout
from autodropout.reproduce.models.wide_resnet import WideResNet

SIGMAS = 5.0
TILED = TiledPattern(0.25, stride=0.25, repeat=2, rotate=30)
RESIDUAL = TiledPattern(0.3, stride=0.3, repeat=3, residual=True)
# Every kind of pattern, one place where nothing is dropped, and names that no model has.
MIXED = Policy(
    (
        Site("a", 0.0, pattern=TILED),
        Site("b", 0.25, pattern=BernoulliPattern(0.2)),
        Site("c", 0.5, pattern=None),
        Site("d", 0.75, pattern=BlockPattern(0.15, 2)),
        Site("e", 1.0, pattern=RESIDUAL),
    )
)
PLAIN = Policy((*MIXED.sites[:4], Site("e", 1.0, pattern=TiledPattern(0.3, stride=0.3, repeat=3))))

MODELS: dict[str, tuple[Callable[[], nn.Module], Policy]] = {
    "torchvision resnet18": (torchvision.models.resnet18, MIXED),
    "torchvision resnet50": (torchvision.models.resnet50, MIXED),
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(dropout=0.0), PLAIN),
    "timm resnet18": (lambda: timm.create_model("resnet18"), MIXED),
    "timm resnet26d": (lambda: timm.create_model("resnet26d"), MIXED),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), PLAIN),
    "wide resnet": (lambda: WideResNet(16, 1), MIXED),
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@functools.cache
def original(name: str) -> nn.Module:
    torch.manual_seed(0)
    return with_random_norms(MODELS[name][0]())


def with_random_norms(model: nn.Module) -> nn.Module:
    """No weight or bias of a normalisation is 0 (timm starts residual branches so): what is 0 then was dropped."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return model


def small() -> nn.Module:
    torch.manual_seed(0)
    return with_random_norms(WideResNet(10, 1))


def run(model: nn.Module, x: torch.Tensor = IMAGES, seed: int = 7) -> torch.Tensor:
    torch.manual_seed(seed)
    y: torch.Tensor = model(x)
    return y


def train_copy(model: nn.Module, x: torch.Tensor = IMAGES, seed: int = 7) -> torch.Tensor:
    """The training output of a copy, so that the running statistics of the model stay."""
    return run(copy.deepcopy(model).train(), x, seed)


def site_dropouts(model: nn.Module) -> dict[str, SiteDropout]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SiteDropout)}


def record(model: nn.Module, names: list[str], x: torch.Tensor = IMAGES, passes: int = 1) -> dict[str, list[Any]]:
    """(input, output) of modules in training, as they were before anything was done to them in place."""
    seen: dict[str, list[Any]] = {name: [] for name in names}
    model = copy.deepcopy(model).train()
    for name in names:

        def hook(_: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
            seen[name].append((args[0].detach().clone(), output.detach().clone()))

        # In front of everything else, so that a site's own dropout cannot have masked the output yet.
        model.get_submodule(name).register_forward_hook(hook, prepend=True)
    with torch.no_grad():
        for i in range(passes):
            run(model, x, seed=i)
    return seen


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Class and every attribute of every module; dictionaries copied, to see what was put into them."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        | {"__class__": type(module)}
        for name, module in model.named_modules(remove_duplicate=False)
    }


def assert_same_attributes(model: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, attributes in after.items():
        assert attributes.keys() == before[name].keys(), name
        for key, value in attributes.items():
            old = before[name][key]
            if isinstance(value, dict):
                assert list(value) == list(old), (name, key)
                assert all(value[k] is old[k] for k in value), (name, key)
            else:
                assert value is old or value == old, (name, key)


def standard_error(pattern: Pattern, planes: torch.Tensor) -> float:
    """Of the mean over independent planes (all patterns here are independent by channel); exact where it is known.

    Args:
        pattern: with a mask per channel.
        planes: (N, C, H, W), True where dropped.
    """
    height, width = planes.shape[2:]
    count = planes.shape[0] * planes.shape[1]
    if isinstance(pattern, TiledPattern):
        tiling = twin.Tiling(pattern.size, pattern.stride, pattern.repeat, pattern.rotate)
        return math.sqrt(twin.rate_variance(tiling, height, width) / count)
    if isinstance(pattern, BernoulliPattern):
        return math.sqrt(pattern.rate * (1 - pattern.rate) / (count * height * width))
    return planes.double().mean((2, 3)).std().item() / math.sqrt(count)


def refused(model: nn.Module, policy: Any, example: Any = IMAGES, error: type[Exception] = ValueError) -> str:
    """The message of a refusal that left the model as it was."""
    attributes = snapshot(model)
    with pytest.raises(error) as caught:
        apply_policy(model, policy, example)
    assert_same_attributes(model, attributes)
    return str(caught.value)
