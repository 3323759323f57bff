"""ImageNet with torchvision's networks: AutoDropout against the classical regularisers, all at the same budget.

    python reproduce/table1_imagenet.py                                         # demo: minutes, offline, no arguments
    python reproduce/table1_imagenet.py --preset paper --dry-run                # what the real networks would cost
    torchrun --nproc-per-node 8 reproduce/table1_imagenet.py --preset paper --model resnet50 --data DIR

Every method's strength is chosen on images held out from the training images, with the same number of trials; the test
images (ImageNet's validation set) are used once, by the final models. All processes that torchrun starts train one
model together. An interrupted run continues with the same command. The table goes to stdout, one JSON line per trained
model and the plot to results/, the state of the run to runs/, both in the current directory of the first process.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autodropout.reproduce import group
from autodropout.reproduce.command import REFUSED
from autodropout.reproduce.command import Parser
from autodropout.reproduce.command import add_experiment_options
from autodropout.reproduce.command import count
from autodropout.reproduce.command import preset_parser
from autodropout.reproduce.command import refused
from autodropout.reproduce.command import run_table
from autodropout.reproduce.command import some_of
from autodropout.reproduce.data import DIGITS
from autodropout.reproduce.data import HUB
from autodropout.reproduce.dry_run import classification_step
from autodropout.reproduce.dry_run import cost_lines
from autodropout.reproduce.dry_run import cost_of
from autodropout.reproduce.dry_run import models_line
from autodropout.reproduce.experiment import Experiment
from autodropout.reproduce.experiment import Result
from autodropout.reproduce.experiment import Settings
from autodropout.reproduce.group import process_group
from autodropout.reproduce.imagenet_data import HUB_NAME
from autodropout.reproduce.imagenet_data import PROXY_TRAIN
from autodropout.reproduce.imagenet_data import PROXY_VALID
from autodropout.reproduce.imagenet_data import open_imagenet
from autodropout.reproduce.imagenet_task import ImageNetTask
from autodropout.reproduce.imagenet_task import methods_for
from autodropout.reproduce.imagenet_training import LABEL_SMOOTHING
from autodropout.reproduce.imagenet_training import ImageNetRecipe
from autodropout.reproduce.methods import METHODS
from autodropout.reproduce.methods import STRENGTHS
from autodropout.reproduce.methods import method_label
from autodropout.reproduce.methods import open_policy
from autodropout.reproduce.methods import policy_origin
from autodropout.reproduce.models.imagenet import DEMO
from autodropout.reproduce.models.imagenet import NETWORKS
from autodropout.reproduce.models.imagenet import build_network
from autodropout.reproduce.report import Row

NAME = "table1_imagenet"
DATA_VARIABLE = "AUTODROPOUT_DATA"
IMAGENET_TRAIN, IMAGENET_CLASSES = 1_281_167, 1000
# Top-1 by (model, augmentation, method): quoted from the paper, or as leaderboards quote it. No other is known.
PAPER = {
    ("resnet50", "default", "none"): "76.5",
    ("resnet50", "default", "autodropout"): "78.7",
    ("resnet50", "randaugment", "autodropout"): "80.3",
    ("efficientnet_b0", "default", "autodropout"): "77.5",
    ("efficientnet_b7", "default", "none"): "84.1",
    ("efficientnet_b7", "default", "autodropout"): "84.7",
}


@dataclass(frozen=True)
class Preset:
    """`recipes`: by network, the first being the default; `micro_batch` there is the most that a rank takes at once,
    `ranks` and `augment` are filled in. `final_on_all`: whether final models train on all training images."""

    recipes: tuple[ImageNetRecipe, ...]
    train_images: int
    valid_images: int
    final_on_all: bool
    seeds: int
    tuning_seeds: int
    threads: int | None
    policy: str
    cost: str


def _paper_recipe(
    model: str, epochs: int, micro_batch: int, weight_decay: float, average: float | None
) -> ImageNetRecipe:
    """The paper does not say how it trains. Ours: 0.1 per 256 images, as is usual for SGD; 270 epochs for ResNet-50 as
    in DropBlock's paper; 350 epochs, weight decay and moving average of the EfficientNets' paper for those (which used
    RMSProp); micro-batches that fit 80 GB."""
    return ImageNetRecipe(
        model,
        epochs,
        batch_size=1024,
        micro_batch=micro_batch,
        ranks=1,
        learning_rate=0.4,
        warmup=5,
        weight_decay=weight_decay,
        average=average,
        augment="none",
    )


RECIPES = (
    _paper_recipe("resnet50", 270, 256, 1e-4, None),
    _paper_recipe("efficientnet_b0", 350, 256, 1e-5, 0.9999),
    _paper_recipe("efficientnet_b7", 350, 32, 1e-5, 0.9999),
)
PRESETS = {
    "demo": Preset(
        (
            ImageNetRecipe(
                DEMO,
                epochs=20,
                batch_size=20,
                micro_batch=20,
                ranks=1,
                learning_rate=0.05,
                warmup=3,
                weight_decay=5e-4,
                average=None,
                augment="none",
            ),
        ),
        train_images=100,
        valid_images=500,
        final_on_all=False,
        seeds=3,
        tuning_seeds=1,
        threads=1,
        policy="hand-v0",
        cost="33 models, offline (measured: 4 min 29 s on two CPU cores, beside two other trainings)",
    ),
    "proxy": Preset(
        RECIPES,
        PROXY_TRAIN,
        PROXY_VALID,
        final_on_all=False,
        seeds=3,
        tuning_seeds=1,
        threads=None,
        policy="hand-v0",
        cost="ResNet-50: 33 models on the paper's 80,000 images of the search; GPU days; not measured",
    ),
    "paper": Preset(
        RECIPES,
        PROXY_TRAIN,
        PROXY_VALID,
        final_on_all=True,
        seeds=3,
        tuning_seeds=1,
        threads=None,
        policy="hand-v0",
        cost="ResNet-50: 15 models on 80,000 images and 18 on all; GPU weeks; not measured",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    preset = PRESETS[args.preset]
    if preset.threads is not None:
        torch.set_num_threads(preset.threads)
    with process_group() as device:
        try:
            if args.dry_run:
                if group.rank() == 0:
                    print("\n\n".join(_described(args, preset, recipe) for recipe in _chosen(args, preset)))
                return 0
            task = _task(args, preset)
            task.check_policies()
        except (ValueError, OSError) as error:
            return _refused(error)
        if group.rank() != 0:
            task.follow(device)
            return 0
        return _run(task, device)


def _run(task: ImageNetTask, device: torch.device) -> int:
    """What rank 0 does: the trainings, then the table."""
    try:
        experiment = Experiment(task, device)
    except (ValueError, OSError) as error:
        task.finish()
        return _refused(error)
    code = run_table(NAME, experiment, "test accuracy in %", lambda results: [_report(task, results)])
    if code == 0:
        task.finish()
    return code


def _refused(error: Exception) -> int:
    return refused(NAME, error) if os.environ.get("LOCAL_RANK", "0") == "0" else REFUSED  # one line a machine


def _parser() -> Parser:
    parser = preset_parser(NAME, str(__doc__), {name: preset.cost for name, preset in PRESETS.items()})
    parser.add_argument(
        "--model",
        choices=[recipe.model for recipe in RECIPES],
        help=f"network of the presets proxy and paper (default: {RECIPES[0].model}; --dry-run: all)",
    )
    parser.add_argument(
        "--methods",
        type=some_of(METHODS),
        metavar="A,B,...",
        help=f"from: {', '.join(METHODS)} (default: all that the network can have)",
    )
    parser.add_argument(
        "--micro-batch",
        type=count,
        metavar="N",
        help="images that a process takes at once, at most what its memory allows; gradients add up to the batch "
        f"(default: {', '.join(f'{r.micro_batch} for {r.model}' for r in RECIPES)}; their shares of a step if less)",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder with train/CLASS/* and val/CLASS/*, or with train*.parquet and validation*.parquet (default: "
        f"imagenet in ${DATA_VARIABLE}; demo: {DIGITS}); '{HUB}' downloads {HUB_NAME}; '{DIGITS}' are scikit-learn's",
    )
    parser.add_argument(
        "--policy",
        metavar="POLICY",
        help="name or file of the policy that autodropout scales (default: hand-v0)",
    )
    parser.add_argument(
        "--augment",
        choices=("default", "randaugment"),
        default="default",
        help="default: resized crop and mirror, nothing for digits; randaugment: torchvision's, after the default",
    )
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    add_experiment_options(parser)
    return parser


def _chosen(args: argparse.Namespace, preset: Preset) -> list[ImageNetRecipe]:
    """The recipes of the network asked for, or else all; as they are in this group."""
    if args.model is not None and args.model not in {recipe.model for recipe in preset.recipes}:
        raise ValueError(f"--model {args.model} needs --preset proxy or paper; {args.preset} has a network of its own")
    ranks = group.ranks()
    return [
        dataclasses.replace(
            recipe,
            epochs=args.epochs or recipe.epochs,
            micro_batch=args.micro_batch or min(recipe.micro_batch, max(1, recipe.batch_size // ranks)),
            ranks=ranks,
            compile=args.compile,
        )
        for recipe in preset.recipes
        if args.model in (None, recipe.model)
    ]


def _task(args: argparse.Namespace, preset: Preset) -> ImageNetTask:
    recipe = _chosen(args, preset)[0]
    source = args.data or (DIGITS if args.preset == "demo" else None)
    if source is None and os.environ.get(DATA_VARIABLE):
        source = os.path.join(os.environ[DATA_VARIABLE], "imagenet")
    if source is None:
        raise ValueError(
            f"preset {args.preset} needs ImageNet: give --data DIR (train/ and val/ with a folder for each class, or "
            f"the parquet files of {HUB_NAME}), set {DATA_VARIABLE} to the folder above imagenet/ with them, or "
            f"--data {HUB} to download it"
        )
    policy_name, policy = open_policy(args.policy or preset.policy)
    data = open_imagenet(source, preset.train_images, preset.valid_images)
    augment = data.augment
    if args.augment == "randaugment":
        augment = "randaugment" if augment == "none" else f"{augment}+randaugment"
    if recipe.batch_size > len(data.train):
        raise ValueError(f"the {len(data.train)} training images must be at least a batch of {recipe.batch_size}")
    settings = Settings(
        name=NAME,
        preset=args.preset,
        recipe=dataclasses.replace(recipe, augment=augment),
        methods=args.methods or methods_for(recipe.model),
        seeds=args.seeds or preset.seeds,
        tuning_seeds=preset.tuning_seeds,
        final_on_all=preset.final_on_all,
        policy_name=policy_name,
        policy=policy,
    )
    return ImageNetTask(settings, data)


def _report(task: ImageNetTask, results: Sequence[Result]) -> tuple[list[str], list[Row], list[str]]:
    settings, data = task.settings, task.data
    recipe = settings.recipe
    network = NETWORKS[recipe.model]
    counts = f"{len(data.train):,} training, {len(data.valid):,} validation, {len(data.test):,} test images"
    if settings.final_on_all:
        counts += f"; final models: all {len(data.pool):,} training images"
    together = "" if recipe.ranks == 1 else f", {recipe.ranks} processes"
    title = [
        f"Table 1 (the numbering is ours): test accuracy in %, {network.title}, {recipe.epochs} epochs, augmentation: "
        f"{recipe.augment.replace('_', ' ').replace('+', ', ')}{together}",
        f"Data: {data.title}, fingerprint {data.fingerprint[:12]}; {counts}",
    ]
    known = settings.final_on_all and data.title.startswith("ImageNet") and data.classes == IMAGENET_CLASSES
    asked = "randaugment" if recipe.augment.endswith("randaugment") else "default"
    rows = [
        Row(
            method_label(result.method, settings.policy_name, policy_origin(settings.policy)),
            result.strength,
            tuple(100 * accuracy for accuracy in result.values),
            PAPER.get((recipe.model, asked, result.method)) if known else None,
        )
        for result in results
    ]
    trials = f"{settings.tuning_seeds} seed{'s' if settings.tuning_seeds > 1 else ''}"
    notes = [
        f"tuned: the best of three strengths on the validation images, {trials} each (AutoDropout: a factor on the "
        f"sizes or rates of its policy's patterns). Final models: seeds 0 to {settings.seeds - 1}. Interval: Student's "
        "t over seeds. paper: Pham & Le 2021, where a number is known.",
    ]
    if network.own_regularisers is not None:
        kept = f"Under every method the network keeps what torchvision gives it: {network.own_regularisers}"
        notes.append(f"{kept}. So stochastic depth is no method here.")
    return title, rows, notes


def _described(args: argparse.Namespace, preset: Preset, recipe: ImageNetRecipe) -> str:
    """What one network would cost: on digits in the demo, else on ImageNet, whether that is there or not."""
    network = NETWORKS[recipe.model]
    classes, pool = (10, preset.train_images) if args.preset == "demo" else (IMAGENET_CLASSES, IMAGENET_TRAIN)
    step = classification_step(
        lambda: build_network(recipe.model, classes), recipe.micro_batch, 3, network.image_size, LABEL_SMOOTHING
    )
    cost = cost_of(step)
    batch = f"{recipe.micro_batch} images of {network.image_size}x{network.image_size}"
    copies = 1 if recipe.average is None else 2  # momentum; the moving average
    methods = args.methods or methods_for(recipe.model)
    final_images = pool if preset.final_on_all else preset.train_images
    phases = [
        ("to tune", preset.tuning_seeds * sum(len(STRENGTHS[method]) for method in methods), preset.train_images),
        ("final", (args.seeds or preset.seeds) * len(methods), final_images),
    ]
    lines = [
        f"{network.title}, {recipe.ranks} process{'es' if recipe.ranks > 1 else ''}",
        f"Methods: {', '.join(methods)}",
        *cost_lines(cost, batch, recipe.accumulated, copies, width=4 if args.preset == "demo" else 2),
        f"SGD with Nesterov momentum, batch {recipe.batch_size:,}, learning rate to {recipe.learning_rate:g} in "
        f"{recipe.warmup} epochs, then to 0 along a cosine; weight decay {recipe.weight_decay:g}; label smoothing "
        f"{LABEL_SMOOTHING:g}" + ("" if recipe.average is None else f"; moving average {recipe.average:g}"),
    ]
    flops = cost.flops * recipe.accumulated * recipe.ranks
    for name, models, images in phases:
        steps = images // recipe.batch_size * recipe.epochs
        lines.append(models_line(name, models, f"{images:,} images", recipe.epochs, steps, flops))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
