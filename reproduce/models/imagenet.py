"""The networks of table 1: torchvision's, without weights, and a small one of its parts for the demo."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet

from autodropout.sites import ModelSite
from autodropout.sites import find_sites


@dataclass(frozen=True)
class Network:
    """What the script knows of a model.

    Args:
        title: in tables.
        image_size: side of the images it is trained on, in pixels: as published.
        own_regularisers: what torchvision's model drops by itself, under every method; None: nothing.
    """

    title: str
    image_size: int
    own_regularisers: str | None


DEMO = "resnet11"
NETWORKS = {
    DEMO: Network("torchvision's ResNet with three narrow bottlenecks", 32, None),
    "resnet50": Network("ResNet-50", 224, None),
    "efficientnet_b0": Network("EfficientNet-B0", 224, "dropout 0.2, stochastic depth up to 0.2"),
    "efficientnet_b7": Network("EfficientNet-B7", 600, "dropout 0.5, stochastic depth up to 0.2"),
}


def build_network(name: str, classes: int) -> nn.Module:
    """A network of NETWORKS for images `(N, 3, H, W)`, with random weights from PyTorch's default generator.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NETWORKS:
        raise ValueError(f"model must be one of {', '.join(NETWORKS)}, got {name!r}")
    model: nn.Module
    if name != DEMO:
        model = get_model(name, weights=None, num_classes=classes)
        return model
    # A quarter as wide inside, and without the last stage, which would have a single cell of so small an image.
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=classes, width_per_group=16)
    model.layer4, model.fc = nn.Identity(), nn.Linear(1024, classes)
    return model


@cache
def sites_of(name: str) -> tuple[ModelSite, ...]:
    """The batch normalisations of a network in order of execution, and which of them end a residual block.

    Of the EfficientNets none is known to end one; they have stochastic depth of their own.
    """
    size = NETWORKS[name].image_size
    with torch.device("meta"):
        return find_sites(build_network(name, classes=2), torch.empty(1, 3, size, size))
