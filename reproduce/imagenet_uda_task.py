"""What table 1 trains when only a share of the images has labels: uda_task.py's methods on torchvision's networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autodropout import Policy

from .experiment import Job
from .experiment import Settings
from .imagenet_data import ImageNetData
from .imagenet_data import Images
from .imagenet_task import ImageNetTask
from .imagenet_training import TrainedModel
from .imagenet_uda import ImageNetUdaRecipe
from .imagenet_uda import hide_labels
from .imagenet_uda import steps_per_epoch
from .imagenet_uda import train_uda_imagenet
from .methods import OFF
from .uda_task import STRENGTHS
from .uda_task import method_recipe
from .uda_task import uses_labels_alone


def label_count(share: float, images: int) -> int:
    """How many of so many images keep their labels: the nearest integer."""
    return int(share * images + 0.5)


def labels_and_steps(recipe: ImageNetUdaRecipe, share: float, images: int) -> tuple[int, int]:
    """`label_count`, and the steps of an epoch on so many images.

    Raises:
        ValueError: too few images of a kind for a step; names --labels.
    """
    labels = label_count(share, images)
    try:
        return labels, steps_per_epoch(recipe, labels, images - labels)
    except ValueError as error:
        raise ValueError(f"--labels {share:g} of {images:,} training images: {error}") from error


def imagenet_method_recipe(method: str, strength: float, recipe: ImageNetUdaRecipe) -> ImageNetUdaRecipe:
    """As `uda_task.method_recipe`. Where unlabelled images take no part, a micro-batch is made of labelled ones, as
    many of a rank's share as fit, so that batch normalisation sees more than a few.
    """
    recipe = method_recipe(method, strength, recipe)
    if not uses_labels_alone(method):
        return recipe
    share, most = recipe.batch_size // recipe.ranks, recipe.micro_batch * (1 + recipe.unlabelled)
    at_once = max(n for n in range(1, min(share, most) + 1) if share % n == 0)
    return dataclasses.replace(recipe, micro_batch=at_once)


class ImageNetUdaTask(ImageNetTask):
    """`settings.recipe`: an `ImageNetUdaRecipe`; `labels`: the share of the images of a model that have labels.

    Raises:
        ValueError: too few images of a kind for a step.
    """

    strengths = STRENGTHS
    labels: float

    def __init__(self, settings: Settings, data: ImageNetData, labels: float) -> None:
        super().__init__(settings, data)
        self.labels = labels
        for images in (data.train, data.pool) if settings.final_on_all else (data.train,):
            labels_and_steps(settings.recipe, labels, len(images))

    def policy(self, method: str, strength: float | None) -> Policy:
        return super().policy(method.removeprefix("uda+"), strength) if method.startswith("uda+") else OFF

    def applied(self, job: Job) -> object:
        recipe, policy = self._recipe(job), self.policy(job.method, job.strength)
        return {"labels": self.labels, "recipe": dataclasses.asdict(recipe), "policy": policy.to_json()}

    def fit(
        self, job: Job, images: Images, device: torch.device, checkpoint: Path | None, on_epoch: Callable[[], None]
    ) -> tuple[TrainedModel, dict[str, Any]]:
        recipe, policy = self._recipe(job), self.policy(job.method, job.strength)
        labels = label_count(self.labels, len(images))
        data = hide_labels(images, labels, job.seed)
        trained = train_uda_imagenet(recipe, policy, data, self.data.classes, job.seed, device, checkpoint, on_epoch)
        return trained, {**dataclasses.asdict(recipe), "labels": labels}

    def _recipe(self, job: Job) -> ImageNetUdaRecipe:
        assert job.strength is not None, "every method has a strength here"
        return imagenet_method_recipe(job.method, job.strength, self.settings.recipe)
