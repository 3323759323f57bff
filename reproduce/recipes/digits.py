"""scikit-learn's digits with WRN-10-1 on 100 training images: offline, seconds a trial.

Network, data and training are those of table2_cifar's demo. The metric is the accuracy on 500 validation images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from autodropout import Policy
from autodropout.reproduce.data import DIGITS
from autodropout.reproduce.data import ImageData
from autodropout.reproduce.data import open_data
from autodropout.reproduce.proxy import network_sites
from autodropout.reproduce.proxy import one_thread
from autodropout.reproduce.proxy import validation_accuracy
from autodropout.reproduce.training import Recipe
from autodropout.search.conv_space import KINDS
from autodropout.search.conv_space import ConvSpace
from autodropout.search.space import SearchSpace

DIRECTION = "max"
TRAIN_IMAGES, VALID_IMAGES = 100, 500
RECIPE = Recipe(10, 1, epochs=60, batch_size=50, learning_rate=0.1, weight_decay=5e-4, augment="none")
REPORT_EVERY = 15  # epochs


def space() -> SearchSpace:
    """For each site which kind of pattern it gets, then the paper's tokens or the rate of a classical regulariser."""
    return ConvSpace(network_sites(RECIPE, channels=1, side=8), kinds=KINDS)


def train(policy: Policy, seed: int, report: Callable[[int, float], None]) -> float:
    """The validation accuracy after the last epoch."""
    with one_thread():
        return validation_accuracy(RECIPE, _data(), policy, seed, report, REPORT_EVERY)


@cache
def _data() -> ImageData:
    return open_data(DIGITS, TRAIN_IMAGES, VALID_IMAGES)
