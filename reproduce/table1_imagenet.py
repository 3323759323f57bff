"""ImageNet with torchvision's networks: AutoDropout against the classical regularisers, all at the same budget.

    python reproduce/table1_imagenet.py                                         # demo: minutes, offline, no arguments
    python reproduce/table1_imagenet.py --preset paper --dry-run                # what the real networks would cost
    torchrun --nproc-per-node 8 reproduce/table1_imagenet.py --preset paper --model resnet50 --data DIR
    python reproduce/table1_imagenet.py --labels 0.1                            # UDA on a tenth of the labels

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

import torch

from autodropout.reproduce import group
from autodropout.reproduce.command import REFUSED
from autodropout.reproduce.command import Parser
from autodropout.reproduce.command import Report
from autodropout.reproduce.command import add_experiment_options
from autodropout.reproduce.command import count
from autodropout.reproduce.command import preset_parser
from autodropout.reproduce.command import refused
from autodropout.reproduce.command import refused_in_training
from autodropout.reproduce.command import run_table
from autodropout.reproduce.command import share
from autodropout.reproduce.command import some_of
from autodropout.reproduce.data import DIGITS
from autodropout.reproduce.data import HUB
from autodropout.reproduce.data import DataError
from autodropout.reproduce.experiment import Experiment
from autodropout.reproduce.experiment import Result
from autodropout.reproduce.experiment import Settings
from autodropout.reproduce.group import process_group
from autodropout.reproduce.imagenet_cost import described
from autodropout.reproduce.imagenet_data import HUB_NAME
from autodropout.reproduce.imagenet_data import open_imagenet
from autodropout.reproduce.imagenet_presets import LABEL_PRESETS
from autodropout.reproduce.imagenet_presets import LABEL_RECIPE
from autodropout.reproduce.imagenet_presets import PRESETS
from autodropout.reproduce.imagenet_presets import RECIPES
from autodropout.reproduce.imagenet_presets import Preset
from autodropout.reproduce.imagenet_report import report
from autodropout.reproduce.imagenet_report import uda_report
from autodropout.reproduce.imagenet_task import ImageNetTask
from autodropout.reproduce.imagenet_task import chosen_methods
from autodropout.reproduce.imagenet_training import ImageNetRecipe
from autodropout.reproduce.imagenet_uda import ImageNetUdaRecipe
from autodropout.reproduce.imagenet_uda_task import ImageNetUdaTask
from autodropout.reproduce.methods import METHODS
from autodropout.reproduce.methods import open_policy
from autodropout.reproduce.uda_task import METHODS as UDA_METHODS

NAME = "table1_imagenet"
DATA_VARIABLE = "AUTODROPOUT_DATA"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    preset = (PRESETS if args.labels is None else LABEL_PRESETS)[args.preset]
    if preset.threads is not None:
        torch.set_num_threads(preset.threads)
    with process_group() as device:
        try:
            if args.dry_run:
                if group.rank() == 0:
                    print("\n\n".join(described(args, preset, recipe) for recipe in _chosen(args, preset)))
                return 0
            task = _task(args, preset)
            task.check_policies()
        except (ValueError, OSError) as error:
            return _refused(error)
        if group.rank() != 0:
            try:
                task.follow(device)
            except DataError as error:  # of an image that no other rank has read
                return refused_in_training(NAME, error)
            return 0
        return _run(task, device)


def _run(task: ImageNetTask, device: torch.device) -> int:
    """What rank 0 does: the trainings, then the table."""
    try:
        experiment = Experiment(task, device)
    except (ValueError, OSError) as error:
        task.finish()
        return _refused(error)

    def reports(results: Sequence[Result]) -> list[Report]:
        return [uda_report(task, results) if isinstance(task, ImageNetUdaTask) else report(task, results)]

    code = run_table(NAME, experiment, "test accuracy in %", reports)
    if code == 0:
        task.finish()
    return code


def _refused(error: Exception) -> int:
    return refused(NAME, error) if os.environ.get("LOCAL_RANK", "0") == "0" else REFUSED  # one line a machine


def _parser() -> Parser:
    parser = preset_parser(NAME, str(__doc__), {name: preset.cost for name, preset in PRESETS.items()})
    labels = [f"  {name:<5} {preset.cost}" for name, preset in LABEL_PRESETS.items()]
    parser.epilog = "\n".join([str(parser.epilog), "with --labels:", *labels])
    parser.add_argument(
        "--labels",
        type=share,
        metavar="F",
        help="keep the labels of this share of the training images only, for example 0.1, and compare supervised "
        "training on them with UDA, with and without patterns (ResNet-50 for proxy and paper)",
    )
    parser.add_argument(
        "--model",
        choices=[recipe.model for recipe in RECIPES],
        help=f"network of the presets proxy and paper (default: {RECIPES[0].model}; --dry-run: all)",
    )
    parser.add_argument(
        "--methods",
        type=some_of((*METHODS, *UDA_METHODS)),
        metavar="A,B,...",
        help=f"from: {', '.join(METHODS)}; with --labels from: {', '.join(UDA_METHODS)} (default: all that the network "
        "can have)",
    )
    parser.add_argument(
        "--micro-batch",
        type=count,
        metavar="N",
        help="images that a process takes at once, at most what its memory allows; gradients add up to the batch "
        f"(default: {', '.join(f'{r.micro_batch} for {r.model}' for r in RECIPES)}; their shares of a step if less); "
        f"with --labels: labelled images, and {LABEL_RECIPE.unlabelled} times as many without labels beside them "
        f"(default: {LABEL_RECIPE.micro_batch})",
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
    if args.labels is not None and args.model not in (None, LABEL_RECIPE.model):
        raise ValueError(f"--model must be {LABEL_RECIPE.model} with --labels, got {args.model}")
    if args.model is not None and args.model not in {recipe.model for recipe in preset.recipes}:
        raise ValueError(f"--model {args.model} needs --preset proxy or paper; {args.preset} has a network of its own")
    allowed = METHODS if args.labels is None else UDA_METHODS
    for method in args.methods or ():
        if method not in allowed:
            raise ValueError(f"unknown method {method!r}; --methods takes {', '.join(allowed)}")
    if args.labels is not None and args.augment != "default":
        raise ValueError(f"--augment must be default with --labels, whose student sees more, got {args.augment}")
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
    methods = chosen_methods(recipe.model, args.methods) if args.labels is None else args.methods or UDA_METHODS
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
    stronger = "randaugment" if augment == "none" else f"{augment}+randaugment"
    if isinstance(recipe, ImageNetUdaRecipe):
        recipe = dataclasses.replace(recipe, strong_augment=stronger)
    elif args.augment == "randaugment":
        augment = stronger
    if recipe.batch_size > len(data.train):
        raise ValueError(f"the {len(data.train)} training images must be at least a batch of {recipe.batch_size}")
    settings = Settings(
        name=NAME,
        preset=args.preset,
        recipe=dataclasses.replace(recipe, augment=augment),
        methods=methods,
        seeds=args.seeds or preset.seeds,
        tuning_seeds=preset.tuning_seeds,
        final_on_all=preset.final_on_all,
        policy_name=policy_name,
        policy=policy,
    )
    return ImageNetTask(settings, data) if args.labels is None else ImageNetUdaTask(settings, data, args.labels)


if __name__ == "__main__":
    sys.exit(main())
