"""What table 2 trains when only some images have labels: supervised training, UDA, and UDA with patterns; and the
methods of that question, which table 1 asks, too.

All methods of one seed have the same labelled images, the same initial weights and the same number of steps, in which
they see the labelled images in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from typing import TypeVar

import torch

from autodropout import Policy
from autodropout import apply_policy

from .data import ImageData
from .experiment import Job
from .experiment import Settings
from .experiment import Task
from .experiment import Trained
from .methods import OFF
from .methods import STRENGTHS as OF_PATTERNS
from .methods import method_policy
from .training import build_model
from .training import example_input
from .uda_training import UdaRecipe
from .uda_training import hide_labels
from .uda_training import train_uda

if TYPE_CHECKING:  # table 2 needs no torchvision for its digits
    from .imagenet_uda import ImageNetUdaRecipe

AnyRecipe = TypeVar("AnyRecipe", UdaRecipe, "ImageNetUdaRecipe")

# For supervised training a factor on the learning rate, for UDA the weight of its consistency term, else as in
# methods.py, at the recipe's weight. Our choice: three each, around the usual values.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "supervised": (0.3, 1.0, 3.0),
    "augmented": (0.3, 1.0, 3.0),
    "uda": (0.5, 1.0, 2.0),
    "uda+dropout": OF_PATTERNS["dropout"],
    "uda+autodropout": OF_PATTERNS["autodropout"],
}
METHODS = tuple(STRENGTHS)
# What the student sees, by the usual augmentation of such images, which labelled images and the teacher get.
STRONG_AUGMENT = {"none": "affine+cutout", "flip_crop": "flip_crop+randaugment+cutout"}


def uses_labels_alone(method: str) -> bool:
    """Whether the unlabelled images take no part."""
    return method in ("supervised", "augmented")


def method_recipe(method: str, strength: float, recipe: AnyRecipe) -> AnyRecipe:
    """The recipe of `method` at `strength`, made from the experiment's.

    "supervised" uses the labelled images alone; "augmented" does that with the strong augmentation, which tells what
    the unlabelled images bring beyond it.

    Raises:
        ValueError: an unknown method.
    """
    if method not in STRENGTHS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "uda":
        return dataclasses.replace(recipe, weight=strength)
    if uses_labels_alone(method):
        augment = recipe.augment if method == "supervised" else recipe.strong_augment
        rate = recipe.learning_rate * strength
        return dataclasses.replace(recipe, weight=0.0, augment=augment, learning_rate=rate)
    return recipe


def check_labels(labels: int, images: int) -> None:
    """Raises a ValueError if so many labels leave none of the training images without."""
    if labels >= images:
        raise ValueError(f"--labels must be below the {images} training images, got {labels}")


class UdaTask(Task):
    """`settings.recipe`: a `UdaRecipe`; `labels`: how many of the training images have one.

    With `settings.final_on_all` the final models see the validation images, too, as unlabelled ones.

    Raises:
        ValueError: not fewer labels than training images.
    """

    metric = "accuracy"
    larger_is_better = True
    strengths = STRENGTHS
    labels: int

    def __init__(self, settings: Settings, data: ImageData, labels: int) -> None:
        check_labels(labels, len(data.train))
        self.settings, self.data, self.labels = settings, data, labels
        self.title, self.fingerprint = data.title, data.fingerprint

    def policy(self, method: str, strength: float) -> Policy:
        """Of a method at a strength."""
        if not method.startswith("uda+"):
            return OFF
        blocks = (self.settings.recipe.depth - 4) // 2
        pattern = method.removeprefix("uda+")
        return method_policy(pattern, strength, blocks, self.data.block_size, self.settings.policy)

    def applied(self, job: Job) -> object:
        recipe, policy = self._of(job)
        return {"labels": self.labels, "recipe": dataclasses.asdict(recipe), "policy": policy.to_json()}

    def train(self, job: Job, device: torch.device, checkpoint: Path, on_epoch: Callable[[], None]) -> Trained:
        recipe, policy = self._of(job)
        more = self.data.valid.images if job.phase == "final" and self.settings.final_on_all else None
        data = hide_labels(self.data.train, self.labels, job.seed, more)
        evaluation = self.data.valid if job.phase == "tune" else self.data.test
        outcome = train_uda(recipe, policy, data, evaluation, self.data.classes, job.seed, device, checkpoint, on_epoch)
        arguments = {
            **dataclasses.asdict(recipe),
            "train_images": len(data.labelled) + len(data.unlabelled),
            "labels": self.labels,
            "evaluation_images": len(evaluation),
        }
        return Trained(outcome.accuracy, outcome.seconds, arguments)

    def try_policy(self, method: str, strength: float | None) -> None:
        images = self.data.train.images
        model = build_model(self.settings.recipe, images, self.data.classes, seed=0)
        assert strength is not None
        apply_policy(model, self.policy(method, strength), example=example_input(images))

    def _of(self, job: Job) -> tuple[UdaRecipe, Policy]:
        assert job.strength is not None, "every method has a strength here"
        return method_recipe(job.method, job.strength, self.settings.recipe), self.policy(job.method, job.strength)
