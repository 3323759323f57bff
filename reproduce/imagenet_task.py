"""What table 1 trains: torchvision's networks on images, with the policies of the compared methods, by all ranks.

Rank 0 runs the experiment: it decides what is trained next, and alone has records and their lock. The other ranks
`follow`: they wait for the next model, train it together with rank 0, and keep nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autodropout import BernoulliPattern
from autodropout import Policy
from autodropout import Site
from autodropout import apply_policy

from . import group
from .experiment import Job
from .experiment import Settings
from .experiment import Task
from .experiment import Trained
from .imagenet_data import ImageNetData
from .imagenet_data import Images
from .imagenet_training import TrainedModel
from .imagenet_training import accuracy
from .imagenet_training import train_imagenet_model
from .imagenet_training import weights_digest
from .methods import METHODS
from .methods import STRENGTHS
from .methods import method_policy
from .models.imagenet import NETWORKS
from .models.imagenet import build_network
from .models.imagenet import sites_of


def methods_for(model: str) -> tuple[str, ...]:
    """The methods that a network can have: no stochastic depth where it has its own, or no blocks to drop."""
    blocks = any(site.block is not None for site in sites_of(model))
    return tuple(method for method in METHODS if blocks or method != "stochasticdepth")


def chosen_methods(model: str, methods: tuple[str, ...] | None) -> tuple[str, ...]:
    """The methods asked for, or all that the network can have.

    Raises:
        ValueError: the network cannot have one; names --methods.
    """
    able = methods_for(model)
    for method in methods or ():
        if method not in able:
            raise ValueError(f"--methods takes {', '.join(able)} for {model}, got {method!r}")
    return methods or able


def network_policy(model: str, method: str, strength: float | None, block_size: int, learned: Policy) -> Policy:
    """The policy of a method at a strength, as `methods.method_policy`, for a network of `models.imagenet`.

    torchvision's blocks have no place at the end of their branches but the last batch normalisation, whose output is
    what the skip tensor is added to: stochastic depth drops samples there, with probability strength * depth.

    Raises:
        ValueError: as `method_policy`; stochastic depth for a network without known blocks.
    """
    if method != "stochasticdepth" or strength is None:
        return method_policy(method, strength, 0, block_size, learned)
    if method not in methods_for(model):
        own = NETWORKS[model].own_regularisers or "nothing"
        raise ValueError(
            f"method must be one of {', '.join(methods_for(model))} for {model}, which has {own} by itself"
        )
    sites = sites_of(model)
    ends = [site.name for site in sites if site.block is not None]
    rates = {name: strength * block / max(len(ends) - 1, 1) for block, name in enumerate(ends)}
    return Policy(
        tuple(
            Site(s.name, s.depth, pattern=BernoulliPattern(rates[s.name], "sample") if rates.get(s.name) else None)
            for s in sites
        )
    )


class ImageNetTask(Task):
    """`settings.recipe`: an `ImageNetRecipe`. Strengths are tuned on `data.train`; with `final_on_all` the final models
    are trained on all of `data.pool`."""

    metric = "accuracy"
    larger_is_better = True
    strengths: Mapping[str, tuple[float, ...]] = STRENGTHS

    def __init__(self, settings: Settings, data: ImageNetData) -> None:
        self.settings, self.data = settings, data
        self.title, self.fingerprint = data.title, data.fingerprint

    def applied(self, job: Job) -> object:
        return self.policy(job.method, job.strength).to_json()

    def policy(self, method: str, strength: float | None) -> Policy:
        """Of a method at a strength."""
        model = self.settings.recipe.model
        return network_policy(model, method, strength, self.data.block_size, self.settings.policy)

    def train(self, job: Job, device: torch.device, checkpoint: Path, on_epoch: Callable[[], None]) -> Trained:
        """For rank 0; the others are to `follow`."""
        group.broadcast(job)
        return self._train(job, device, checkpoint, on_epoch)

    def follow(self, device: torch.device) -> None:
        """For the other ranks: trains what rank 0 trains, until it calls `finish`."""
        nothing: Job | None = None
        while (job := group.broadcast(nothing)) is not None:
            self._train(job, device, None, lambda: None)

    def finish(self) -> None:
        """For rank 0: there is nothing left to train."""
        group.broadcast(None)

    def _train(self, job: Job, device: torch.device, checkpoint: Path | None, on_epoch: Callable[[], None]) -> Trained:
        data, recipe = self.data, self.settings.recipe
        images = data.pool if job.phase == "final" and self.settings.final_on_all else data.train
        evaluated = data.valid if job.phase == "tune" else data.test
        trained, used = self.fit(job, images, device, checkpoint, on_epoch)
        value = accuracy(trained.model, recipe, evaluated, device)
        figures = {"loss": trained.loss, "weights": weights_digest(trained.model)}
        counts = {"train_images": len(images), "evaluation_images": len(evaluated)}
        return Trained(value, trained.seconds, {**used, **counts}, figures)

    def fit(
        self, job: Job, images: Images, device: torch.device, checkpoint: Path | None, on_epoch: Callable[[], None]
    ) -> tuple[TrainedModel, dict[str, Any]]:
        """The model of a job, and what else than the recipe of the settings was used, to record."""
        policy = self.policy(job.method, job.strength)
        recipe, classes = self.settings.recipe, self.data.classes
        return train_imagenet_model(recipe, policy, images, classes, job.seed, device, checkpoint, on_epoch), {}

    def try_policy(self, method: str, strength: float | None) -> None:
        recipe = self.settings.recipe
        size = NETWORKS[recipe.model].image_size
        with torch.device("meta"):
            model = build_network(recipe.model, self.data.classes)
            example = torch.empty(1, 3, size, size)
        apply_policy(model, self.policy(method, strength), example=example)
