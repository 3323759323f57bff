"""What table 2 trains: wide residual networks on images, with the policies of the compared methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from autodropout import Policy
from autodropout import apply_policy

from .data import ImageData
from .experiment import Job
from .experiment import Settings
from .experiment import Task
from .experiment import Trained
from .methods import STRENGTHS
from .methods import method_policy
from .training import build_model
from .training import example_input
from .training import train_model


class ImageTask(Task):
    """`settings.recipe`: a `training.Recipe`."""

    metric = "accuracy"
    larger_is_better = True
    strengths = STRENGTHS

    def __init__(self, settings: Settings, data: ImageData) -> None:
        self.settings, self.data = settings, data
        self.title, self.fingerprint = data.title, data.fingerprint

    def applied(self, job: Job) -> object:
        return self.policy(job.method, job.strength).to_json()

    def policy(self, method: str, strength: float | None) -> Policy:
        """Of a method at a strength."""
        blocks = (self.settings.recipe.depth - 4) // 2
        return method_policy(method, strength, blocks, self.data.block_size, self.settings.policy)

    def train(self, job: Job, device: torch.device, checkpoint: Path, on_epoch: Callable[[], None]) -> Trained:
        data = self.data
        train = data.train + data.valid if job.phase == "final" and self.settings.final_on_all else data.train
        evaluation = data.valid if job.phase == "tune" else data.test
        outcome = train_model(
            self.settings.recipe,
            self.policy(job.method, job.strength),
            train,
            evaluation,
            data.classes,
            job.seed,
            device,
            checkpoint,
            on_epoch,
        )
        arguments = {"train_images": len(train), "evaluation_images": len(evaluation)}
        return Trained(outcome.accuracy, outcome.seconds, arguments)

    def try_policy(self, method: str, strength: float | None) -> None:
        images = self.data.train.images
        model = build_model(self.settings.recipe, images, self.data.classes, seed=0)
        apply_policy(model, self.policy(method, strength), example=example_input(images))
