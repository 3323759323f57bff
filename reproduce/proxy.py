"""What the recipes share: a wide residual network trained with a policy and measured on the validation images.

Test images take no part in a search.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autodropout import Policy
from autodropout.sites import ModelSite
from autodropout.sites import find_sites

from .data import HUB
from .data import ImageData
from .data import open_data
from .training import Recipe
from .training import build_model
from .training import example_input
from .training import train_model

DATA_VARIABLE = "AUTODROPOUT_DATA"


def network_sites(recipe: Recipe, channels: int, side: int) -> tuple[ModelSite, ...]:
    """The batch-norm sites of the recipe's network for images of `channels` x `side` x `side`, with their maps."""
    images = torch.zeros(1, channels, side, side, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):  # the weights are of no interest here, and drawing them must change nothing
        model = build_model(recipe, images, classes=10, seed=0)
        return find_sites(model, example_input(images))


def validation_accuracy(
    recipe: Recipe, data: ImageData, policy: Policy, seed: int, report: Callable[[int, float], None], every: int
) -> float:
    """Trains from scratch; `report` gets (epochs, validation accuracy) after every `every` epochs but the last."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outcome = train_model(
        recipe,
        policy,
        data.train,
        data.valid,
        data.classes,
        seed,
        device,
        on_accuracy=report,
        accuracy_every=every,
    )
    return outcome.accuracy


def open_cifar10(train_images: int, valid_images: int) -> ImageData:
    """CIFAR-10 from where the environment variable AUTODROPOUT_DATA says: a folder, or "hub" to download it.

    Raises:
        ValueError: the variable is not set.
        DataError: as `open_data`.
    """
    source = os.environ.get(DATA_VARIABLE)
    if not source:
        raise ValueError(
            f"this recipe needs CIFAR-10: set {DATA_VARIABLE} to a folder with train.parquet and test.parquet of the "
            f"Hugging Face data set uoft-cs/cifar10, or to '{HUB}' to download it"
        )
    return open_data(source, train_images, valid_images)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread inside, for networks so small that a second one costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
