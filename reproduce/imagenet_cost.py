"""What the trainings of table 1 would cost, for its dry run."""

from __future__ import annotations

import argparse

from torch import nn

from .dry_run import classification_step
from .dry_run import cost_lines
from .dry_run import cost_of
from .dry_run import models_line
from .imagenet_presets import IMAGENET_CLASSES
from .imagenet_presets import IMAGENET_TRAIN
from .imagenet_presets import Preset
from .imagenet_task import chosen_methods
from .imagenet_training import LABEL_SMOOTHING
from .imagenet_training import ImageNetRecipe
from .imagenet_uda import ImageNetUdaRecipe
from .imagenet_uda_task import labels_and_steps
from .learning_rates import only_rises
from .methods import STRENGTHS
from .models.imagenet import NETWORKS
from .models.imagenet import build_network
from .uda_cost import uda_cost
from .uda_cost import uda_models_lines
from .uda_task import METHODS as UDA_METHODS
from .uda_task import STRENGTHS as UDA_STRENGTHS


def described(args: argparse.Namespace, preset: Preset, recipe: ImageNetRecipe) -> str:
    """What one network would cost: on digits in the demo, else on ImageNet, whether that is there or not."""
    network = NETWORKS[recipe.model]
    classes, pool = (10, preset.train_images) if args.preset == "demo" else (IMAGENET_CLASSES, IMAGENET_TRAIN)
    final_images = pool if preset.final_on_all else preset.train_images
    copies = 1 if recipe.average is None else 2  # momentum; the moving average
    width = 4 if args.preset == "demo" else 2
    seeds, tuning_seeds = args.seeds or preset.seeds, preset.tuning_seeds

    def build() -> nn.Module:
        return build_network(recipe.model, classes)

    if isinstance(recipe, ImageNetUdaRecipe):
        methods = args.methods or UDA_METHODS
        batch = f"{recipe.batch_size:,} labelled and {recipe.unlabelled_batch:,} unlabelled images"
        smoothing = ""
        unlabelled = recipe.micro_batch * recipe.unlabelled
        uda = uda_cost(build, recipe, recipe.micro_batch, unlabelled, 3, network.image_size, recipe.accumulated)
        costs = uda.lines(network.image_size, copies, width)
        models = []
        for phase, images, each in (
            ("to tune", preset.train_images, {m: tuning_seeds * len(UDA_STRENGTHS[m]) for m in methods}),
            ("final", final_images, dict.fromkeys(methods, seeds)),
        ):
            labels, steps = labels_and_steps(recipe, args.labels, images)
            models += uda_models_lines(
                phase, each, labels, images, recipe.epochs, steps * recipe.epochs, uda, recipe.ranks
            )
    else:
        methods = chosen_methods(recipe.model, args.methods)
        batch, smoothing = f"{recipe.batch_size:,}", f"; label smoothing {LABEL_SMOOTHING:g}"
        cost = cost_of(classification_step(build, recipe.micro_batch, 3, network.image_size, LABEL_SMOOTHING))
        at_once = f"{recipe.micro_batch} images of {network.image_size}x{network.image_size}"
        costs = cost_lines(cost, at_once, recipe.accumulated, copies, width)
        flops = cost.flops * recipe.accumulated * recipe.ranks
        models = [
            models_line(
                name, n, f"{images:,} images", recipe.epochs, images // recipe.batch_size * recipe.epochs, flops
            )
            for name, n, images in (
                ("to tune", tuning_seeds * sum(len(STRENGTHS[method]) for method in methods), preset.train_images),
                ("final", seeds * len(methods), final_images),
            )
        ]
    return "\n".join(
        [
            f"{network.title}, {recipe.ranks} process{'es' if recipe.ranks > 1 else ''}",
            f"Methods: {', '.join(methods)}",
            *costs,
            f"SGD with Nesterov momentum, batch {batch}, learning rate to {recipe.learning_rate:g} in {recipe.warmup} "
            f"epochs{only_rises(recipe.warmup, recipe.epochs, 'epochs')}, then to 0 along a cosine; weight decay "
            f"{recipe.weight_decay:g}{smoothing}"
            + ("" if recipe.average is None else f"; moving average {recipe.average:g}"),
            *models,
        ]
    )
