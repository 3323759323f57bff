"""CIFAR-10 with wide residual networks: AutoDropout against the classical regularisers, all at the same budget.

    python reproduce/table2_cifar.py                                      # demo: minutes, offline, no arguments needed
    python reproduce/table2_cifar.py --preset small --data DIR            # DIR has train.parquet and test.parquet
    python reproduce/table2_cifar.py --preset paper --data hub --augment randaugment
    python reproduce/table2_cifar.py --preset paper --data hub --labels 4000   # UDA on few labels, WRN-28-2

Every method's strength is chosen on validation images, with the same number of trials; test images are used once, by
the final models. An interrupted run continues with the same command. The table goes to stdout, one JSON line per
trained model and the plot to results/, the state of the run to runs/, both in the current directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autodropout.reproduce.command import Parser
from autodropout.reproduce.command import Report
from autodropout.reproduce.command import add_experiment_options
from autodropout.reproduce.command import count
from autodropout.reproduce.command import preset_parser
from autodropout.reproduce.command import refused
from autodropout.reproduce.command import run_table
from autodropout.reproduce.data import DIGITS
from autodropout.reproduce.data import HUB
from autodropout.reproduce.data import ImageData
from autodropout.reproduce.data import open_data
from autodropout.reproduce.dry_run import classification_step
from autodropout.reproduce.dry_run import cost_lines
from autodropout.reproduce.dry_run import cost_of
from autodropout.reproduce.dry_run import models_line
from autodropout.reproduce.experiment import Experiment
from autodropout.reproduce.experiment import Result
from autodropout.reproduce.experiment import Settings
from autodropout.reproduce.image_task import ImageTask
from autodropout.reproduce.methods import METHODS
from autodropout.reproduce.methods import STRENGTHS
from autodropout.reproduce.methods import method_label
from autodropout.reproduce.methods import open_policy
from autodropout.reproduce.methods import policy_origin
from autodropout.reproduce.models.wide_resnet import WideResNet
from autodropout.reproduce.report import Row
from autodropout.reproduce.training import Recipe
from autodropout.reproduce.uda_cost import uda_cost
from autodropout.reproduce.uda_cost import uda_models_lines
from autodropout.reproduce.uda_report import uda_report
from autodropout.reproduce.uda_task import METHODS as UDA_METHODS
from autodropout.reproduce.uda_task import STRENGTHS as UDA_STRENGTHS
from autodropout.reproduce.uda_task import STRONG_AUGMENT
from autodropout.reproduce.uda_task import UdaTask
from autodropout.reproduce.uda_task import check_labels
from autodropout.reproduce.uda_training import UdaRecipe
from autodropout.reproduce.uda_training import steps_per_epoch

NAME = "table2_cifar"
DATA_VARIABLE = "AUTODROPOUT_DATA"
# Accuracy of AutoDropout on CIFAR-10 with WRN-28-10 as leaderboards quote it, by augmentation. No other is known.
PAPER = {"flip_crop": "96.8", "flip_crop+randaugment": "97.9"}
PAPER_NETWORK, PAPER_IMAGES = (28, 10), 50_000


@dataclass(frozen=True)
class Preset:
    """`valid_images` None: a tenth of the training images, given back for the final models. `policy`: unless asked."""

    recipe: Recipe
    train_images: int
    valid_images: int | None
    seeds: int
    tuning_seeds: int
    threads: int | None
    policy: str
    cost: str


# Batch, learning rate, decay and epochs of `paper` are those of the wide residual networks' paper; the rest is ours.
PRESETS = {
    # 100 images leave something to learn (about 88% without a regulariser, 98% from 300 images on), and are so little
    # work for a step that a second thread would cost more than it brings.
    "demo": Preset(
        Recipe(10, 1, epochs=60, batch_size=50, learning_rate=0.1, weight_decay=5e-4, augment="default"),
        train_images=100,
        valid_images=500,
        seeds=5,
        tuning_seeds=2,
        threads=1,
        policy="digits-v1",
        cost="60 models, 3 to 4 minutes on two CPU cores, offline (measured: 3 min 12 s)",
    ),
    "small": Preset(
        Recipe(28, 2, epochs=30, batch_size=100, learning_rate=0.1, weight_decay=5e-4, augment="default"),
        train_images=5000,
        valid_images=None,
        seeds=3,
        tuning_seeds=1,
        threads=None,
        policy="hand-v0",
        cost="33 models, about 17 hours on two CPU cores (measured: 50 to 96 s an epoch); GPUs: not measured",
    ),
    "paper": Preset(
        Recipe(28, 10, epochs=200, batch_size=128, learning_rate=0.1, weight_decay=5e-4, augment="default"),
        train_images=50000,
        valid_images=None,
        seeds=5,
        tuning_seeds=1,
        threads=None,
        policy="hand-v0",
        cost="45 models of 200 epochs, 1.4e19 floating-point operations: GPU days; not measured",
    ),
}

# With --labels. Learning rate, decay, batches and number of steps (200,000) of `paper` are those of the script of UDA's
# authors for one GPU; the rest is ours.
LABEL_PRESETS = {
    "demo": dataclasses.replace(
        PRESETS["demo"],
        recipe=UdaRecipe(10, 1, 40, 50, 0.1, 5e-4, "default", unlabelled_batch=100, strong_augment="default"),
        train_images=800,
        valid_images=200,
        cost="55 models, offline (measured: 4 min 6 s on two CPU cores, beside another training)",
    ),
    "small": dataclasses.replace(
        PRESETS["small"],
        recipe=UdaRecipe(28, 2, 30, 50, 0.1, 5e-4, "default", unlabelled_batch=100, strong_augment="default"),
        cost="30 models, 15 to 28 hours on two CPU cores, reckoned from what small costs without --labels",
    ),
    "paper": dataclasses.replace(
        PRESETS["paper"],
        recipe=UdaRecipe(28, 2, 697, 32, 0.03, 5e-4, "default", unlabelled_batch=160, strong_augment="default"),
        cost="40 models of WRN-28-2, 200,000 steps each, 1.6e18 floating-point operations: not measured",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    preset = (PRESETS if args.labels is None else LABEL_PRESETS)[args.preset]
    if preset.threads is not None:
        torch.set_num_threads(preset.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.dry_run:
            print(_described(args, preset))
            return 0
        data = _data(args, preset)
        settings = _settings(args, preset, data.augment)
        task = ImageTask(settings, data) if args.labels is None else UdaTask(settings, data, args.labels)
        task.check_policies()
        experiment = Experiment(task, device)
    except (ValueError, OSError) as error:
        return refused(NAME, error)

    def reports(results: Sequence[Result]) -> list[Report]:
        return [uda_report(task, results) if isinstance(task, UdaTask) else _report(settings, data, results)]

    return run_table(NAME, experiment, "test accuracy in %", reports)


def _parser() -> Parser:
    parser = preset_parser(NAME, str(__doc__), {name: preset.cost for name, preset in PRESETS.items()})
    labels = [f"  {name:<5} {preset.cost}" for name, preset in LABEL_PRESETS.items()]
    parser.epilog = "\n".join([str(parser.epilog), "with --labels:", *labels])
    parser.add_argument(
        "--methods",
        type=lambda names: tuple(names.split(",")),
        metavar="A,B,...",
        help=f"from: {', '.join(METHODS)}; with --labels from: {', '.join(UDA_METHODS)} (default: all)",
    )
    parser.add_argument(
        "--labels",
        type=count,
        metavar="N",
        help="keep the labels of N training images only, and compare supervised training on them with UDA, with and "
        "without patterns (WRN-28-2 for paper)",
    )
    parser.add_argument("--train-images", type=count, metavar="N", help="use only the first N training images")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help=f"folder with CIFAR-10 as train.parquet and test.parquet, or above cifar10/ with them (default: "
        f"${DATA_VARIABLE}; demo: {DIGITS}); '{HUB}' downloads uoft-cs/cifar10; '{DIGITS}' are scikit-learn's",
    )
    parser.add_argument(
        "--policy",
        metavar="POLICY",
        help=f"name or file of the policy that autodropout scales, for example DIR/policies/best.json of a search "
        f"(default: {', '.join(f'{preset.policy} for {name}' for name, preset in PRESETS.items())})",
    )
    parser.add_argument(
        "--augment",
        choices=("default", "randaugment"),
        default="default",
        help="default: mirror and crop for CIFAR-10, nothing for digits; randaugment: torchvision's, after the default",
    )
    add_experiment_options(parser)
    return parser


def _data(args: argparse.Namespace, preset: Preset) -> ImageData:
    source = args.data or (DIGITS if args.preset == "demo" else os.environ.get(DATA_VARIABLE))
    if not source:
        raise ValueError(
            f"preset {args.preset} needs CIFAR-10: give --data DIR (train.parquet and test.parquet of the Hugging Face "
            f"data set uoft-cs/cifar10), set {DATA_VARIABLE}=DIR, or --data {HUB} to download it"
        )
    images = _train_images(args, preset)
    if preset.valid_images is not None:
        return open_data(source, images, preset.valid_images)
    valid = max(1, images // 10)
    return open_data(source, images - valid, valid)


def _train_images(args: argparse.Namespace, preset: Preset) -> int:
    images: int = args.train_images or preset.train_images
    if images < 2:
        raise ValueError(f"--train-images must be at least 2, got {images}")
    return images


def _settings(args: argparse.Namespace, preset: Preset, augment: str) -> Settings:
    allowed = METHODS if args.labels is None else UDA_METHODS
    methods = args.methods or allowed
    for method in methods:
        if method not in allowed:
            raise ValueError(f"unknown method {method!r}; --methods takes {', '.join(allowed)}")
    recipe = dataclasses.replace(preset.recipe, epochs=args.epochs or preset.recipe.epochs, augment=augment)
    if isinstance(recipe, UdaRecipe):
        if args.augment != "default":
            raise ValueError(f"--augment must be default with --labels, whose student sees more, got {args.augment}")
        recipe = dataclasses.replace(recipe, strong_augment=STRONG_AUGMENT[augment])
    elif args.augment == "randaugment":
        recipe = dataclasses.replace(recipe, augment="randaugment" if augment == "none" else f"{augment}+randaugment")
    policy_name, policy = open_policy(args.policy or preset.policy)
    return Settings(
        name=NAME,
        preset=args.preset,
        recipe=recipe,
        methods=tuple(dict.fromkeys(methods)),
        seeds=args.seeds or preset.seeds,
        tuning_seeds=preset.tuning_seeds,
        final_on_all=preset.valid_images is None,
        policy_name=policy_name,
        policy=policy,
    )


def _described(args: argparse.Namespace, preset: Preset) -> str:
    """What it would cost, on digits in the demo and else on CIFAR-10, whether that is there or not."""
    digits = args.data == DIGITS or (args.data is None and args.preset == "demo")
    channels, size, width = (1, 8, 4) if digits else (3, 32, 2)
    settings = _settings(args, preset, "none" if digits else "flip_crop")
    recipe, images = settings.recipe, _train_images(args, preset)
    valid = max(1, images // 10) if preset.valid_images is None else 0
    augment = recipe.augment

    def build() -> nn.Module:
        return WideResNet(recipe.depth, recipe.width, 10, channels)

    if isinstance(recipe, UdaRecipe):
        augment += f", strong {recipe.strong_augment}"
        costs, models = _uda_described(args.labels, settings, recipe, build, channels, size, width, images, valid)
    else:
        cost = cost_of(classification_step(build, recipe.batch_size, channels, size))
        costs = cost_lines(cost, f"{recipe.batch_size} images of {size}x{size}", 1, copies=1, width=width)
        trials = settings.tuning_seeds * sum(len(STRENGTHS[method]) for method in settings.methods)
        models = [
            models_line(
                name, count, f"{n:,} images", recipe.epochs, max(1, n // recipe.batch_size) * recipe.epochs, cost.flops
            )
            for name, count, n in (
                ("to tune", trials, images - valid),
                ("final", settings.seeds * len(settings.methods), images),
            )
        ]
    return "\n".join(
        [
            f"WRN-{recipe.depth}-{recipe.width}, augmentation {augment}",
            f"Methods: {', '.join(settings.methods)}",
            *costs,
            f"SGD with Nesterov momentum, learning rate from {recipe.learning_rate:g} to 0 along a cosine, weight "
            f"decay {recipe.weight_decay:g}",
            *models,
        ]
    )


def _uda_described(
    labels: int,
    settings: Settings,
    recipe: UdaRecipe,
    build: Callable[[], nn.Module],
    channels: int,
    size: int,
    width: int,
    images: int,
    valid: int,
) -> tuple[list[str], list[str]]:
    """The lines on a step and those on all models; the validation images are without labels in the final models."""
    check_labels(labels, images - valid)
    cost = uda_cost(build, recipe, recipe.batch_size, recipe.unlabelled_batch, channels, size)
    tuned = {method: settings.tuning_seeds * len(UDA_STRENGTHS[method]) for method in settings.methods}
    models = []
    for phase, each, n in (
        ("to tune", tuned, images - valid),
        ("final", dict.fromkeys(settings.methods, settings.seeds), images),
    ):
        steps = steps_per_epoch(recipe, n - labels) * recipe.epochs
        models += uda_models_lines(phase, each, labels, n, recipe.epochs, steps, cost, devices=1)
    return cost.lines(size, copies=1, width=width), models


def _report(settings: Settings, data: ImageData, results: Sequence[Result]) -> tuple[list[str], list[Row], list[str]]:
    recipe = settings.recipe
    images = f"{len(data.train):,} training, {len(data.valid):,} validation, {len(data.test):,} test images"
    title = [
        f"Table 2 (the numbering is ours): test accuracy in %, WRN-{recipe.depth}-{recipe.width}, "
        f"{recipe.epochs} epochs, augmentation: {recipe.augment.replace('_', ' and ').replace('+', ', ')}",
        f"Data: {data.title}, fingerprint {data.fingerprint[:12]}; {images}",
    ]
    known = (
        (recipe.depth, recipe.width) == PAPER_NETWORK
        and data.title.startswith("CIFAR-10")
        and len(data.train) + len(data.valid) == PAPER_IMAGES
    )
    rows = [
        Row(
            method_label(result.method, settings.policy_name, policy_origin(settings.policy)),
            result.strength,
            tuple(100 * accuracy for accuracy in result.values),
            PAPER.get(recipe.augment) if known and result.method == "autodropout" else None,
        )
        for result in results
    ]
    final = "training and validation images together" if settings.final_on_all else "the training images only"
    trials = f"{settings.tuning_seeds} seed{'s' if settings.tuning_seeds > 1 else ''}"
    notes = [
        f"tuned: the best of three strengths on the validation images, {trials} each (AutoDropout: a factor on the "
        f"sizes or rates of its policy's patterns). Final models: trained on {final}, seeds 0 to {settings.seeds - 1}. "
        "Interval: Student's t over seeds. paper: Pham & Le 2021, WRN-28-10 on CIFAR-10, where a number is known.",
    ]
    return title, rows, notes


if __name__ == "__main__":
    sys.exit(main())
