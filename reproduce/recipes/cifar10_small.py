"""CIFAR-10 with WRN-28-2 on 500 training images: a reduced form of the `cifar10` recipe, minutes a trial on CPU cores.

The network and the space are those of the paper's proxy; images and epochs are ours, for a trial that a few cores can
afford. The metric is the accuracy on the following 1,000 training images. One trial took 431 s of one core's time,
measured with one thread on a busy machine. The data come from where AUTODROPOUT_DATA says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from autodropout import Policy
from autodropout.reproduce.data import ImageData
from autodropout.reproduce.proxy import network_sites
from autodropout.reproduce.proxy import open_cifar10
from autodropout.reproduce.proxy import validation_accuracy
from autodropout.reproduce.training import Recipe
from autodropout.search.conv_space import ConvSpace
from autodropout.search.space import SearchSpace

DIRECTION = "max"
TRAIN_IMAGES, VALID_IMAGES = 500, 1_000
RECIPE = Recipe(28, 2, epochs=40, batch_size=50, learning_rate=0.1, weight_decay=5e-4, augment="flip_crop")
REPORT_EVERY = 5  # epochs


def space() -> SearchSpace:
    """The paper's eight tokens for each site."""
    return ConvSpace(network_sites(RECIPE, channels=3, side=32))


def train(policy: Policy, seed: int, report: Callable[[int, float], None]) -> float:
    """The validation accuracy after the last epoch."""
    return validation_accuracy(RECIPE, _data(), policy, seed, report, REPORT_EVERY)


@cache
def _data() -> ImageData:
    return open_cifar10(TRAIN_IMAGES, VALID_IMAGES)
