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
from dataclasses import dataclass

import torch
from torch import nn

from autodropout.reproduce import group
from autodropout.reproduce.command import REFUSED
from autodropout.reproduce.command import Parser
from autodropout.reproduce.command import Report
from autodropout.reproduce.command import add_experiment_options
from autodropout.reproduce.command import count
from autodropout.reproduce.command import preset_parser
from autodropout.reproduce.command import refused
from autodropout.reproduce.command import run_table
from autodropout.reproduce.command import share
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
from autodropout.reproduce.imagenet_uda import ImageNetUdaRecipe
from autodropout.reproduce.imagenet_uda_task import ImageNetUdaTask
from autodropout.reproduce.imagenet_uda_task import label_count
from autodropout.reproduce.imagenet_uda_task import labels_and_steps
from autodropout.reproduce.methods import METHODS
from autodropout.reproduce.methods import STRENGTHS
from autodropout.reproduce.methods import method_label
from autodropout.reproduce.methods import open_policy
from autodropout.reproduce.methods import policy_origin
from autodropout.reproduce.models.imagenet import DEMO
from autodropout.reproduce.models.imagenet import NETWORKS
from autodropout.reproduce.models.imagenet import build_network
from autodropout.reproduce.report import Row
from autodropout.reproduce.uda_cost import uda_cost
from autodropout.reproduce.uda_cost import uda_models_lines
from autodropout.reproduce.uda_report import uda_notes
from autodropout.reproduce.uda_report import uda_rows
from autodropout.reproduce.uda_task import METHODS as UDA_METHODS
from autodropout.reproduce.uda_task import STRENGTHS as UDA_STRENGTHS

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
# ResNet-50 with UDA on a tenth of the labels, as leaderboards quote it.
UDA_PAPER, UDA_PAPER_LABELS = "72.9", 0.1


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

# With --labels. Temperature and confidence of ResNet-50 are those of UDA's paper. Batches (512 and 30 times as many),
# learning rate and number of steps (40,000) are those that an independent implementation
# (github.com/Jongchan/unsupervised_data_augmentation_pytorch) names for the paper's experiment, not checked against the
# paper. Warm-up, decay, lambda around 1 and no annealing are ours.
LABEL_RECIPE = ImageNetUdaRecipe(
    "resnet50",
    epochs=533,
    batch_size=512,
    micro_batch=8,
    ranks=1,
    learning_rate=0.3,
    warmup=5,
    weight_decay=1e-4,
    average=None,
    augment="none",
    unlabelled=30,
    strong_augment="none",
)
LABEL_PRESETS = {
    # A tenth of 100 images would be one image a class: too little for the question, so more of the digits take part.
    "demo": dataclasses.replace(
        PRESETS["demo"],
        recipes=(
            ImageNetUdaRecipe(
                DEMO,
                epochs=12,
                batch_size=10,
                micro_batch=10,
                ranks=1,
                learning_rate=0.05,
                warmup=2,
                weight_decay=5e-4,
                average=None,
                augment="none",
                unlabelled=4,
                strong_augment="none",
                confidence=0.8,
            ),
        ),
        train_images=500,
        valid_images=200,
        seeds=5,
        cost="40 models, offline (measured: 9 min 18 s on two CPU cores, beside another program)",
    ),
    "proxy": dataclasses.replace(
        PRESETS["proxy"],
        recipes=(LABEL_RECIPE,),
        cost="30 models of ResNet-50 on the paper's 80,000 images of the search; GPU days; not measured",
    ),
    "paper": dataclasses.replace(
        PRESETS["paper"],
        recipes=(LABEL_RECIPE,),
        cost="ResNet-50: 15 models on 80,000 images and 15 on all; GPU weeks; not measured",
    ),
}


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

    def reports(results: Sequence[Result]) -> list[Report]:
        return [_uda_report(task, results) if isinstance(task, ImageNetUdaTask) else _report(task, results)]

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
        methods=args.methods or (methods_for(recipe.model) if args.labels is None else UDA_METHODS),
        seeds=args.seeds or preset.seeds,
        tuning_seeds=preset.tuning_seeds,
        final_on_all=preset.final_on_all,
        policy_name=policy_name,
        policy=policy,
    )
    return ImageNetTask(settings, data) if args.labels is None else ImageNetUdaTask(settings, data, args.labels)


def _report(task: ImageNetTask, results: Sequence[Result]) -> Report:
    settings, data = task.settings, task.data
    recipe = settings.recipe
    network = NETWORKS[recipe.model]
    counts = f"{len(data.train):,} training, {len(data.valid):,} validation, {len(data.test):,} test images"
    if settings.final_on_all:
        counts += f"; final models: all {len(data.pool):,} training images"
    together = "" if recipe.ranks == 1 else f", {recipe.ranks} processes"
    title = [
        f"Table 1 (the numbering is ours): test accuracy in %, {network.title}, {recipe.epochs} epochs, augmentation: "
        f"{_words(recipe.augment)}{together}",
        f"Data: {data.title}, fingerprint {data.fingerprint[:12]}; {counts}",
    ]
    known = _is_imagenet(task)
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


def _uda_report(task: ImageNetUdaTask, results: Sequence[Result]) -> Report:
    settings, data = task.settings, task.data
    recipe = settings.recipe
    pool = data.pool if settings.final_on_all else data.train
    labels = label_count(task.share, len(pool))
    tuned = ""
    if settings.final_on_all:
        few = label_count(task.share, len(data.train))
        tuned = f" (strengths: {few:,} labelled, {len(data.train) - few:,} unlabelled)"
    together = "" if recipe.ranks == 1 else f", {recipe.ranks} processes"
    title = [
        f"Table 1 (the numbering is ours): test accuracy in %, {labels:,} labels, {NETWORKS[recipe.model].title}, "
        f"{recipe.epochs} epochs, augmentation: {_words(recipe.augment)}; strong: {_words(recipe.strong_augment)}"
        f"{together}",
        f"Data: {data.title}, fingerprint {data.fingerprint[:12]}; {labels:,} labelled, {len(pool) - labels:,} "
        f"unlabelled training images{tuned}, {len(data.valid):,} validation, {len(data.test):,} test images",
    ]
    known = _is_imagenet(task) and recipe.model == LABEL_RECIPE.model and task.share == UDA_PAPER_LABELS
    notes = uda_notes(settings, results, "ImageNet with a tenth of the labels, ResNet-50, beside that experiment only.")
    return title, uda_rows(settings, results, UDA_PAPER if known else None), notes


def _words(augment: str) -> str:
    return augment.replace("_", " ").replace("+", ", ")


def _is_imagenet(task: ImageNetTask) -> bool:
    """Whether the final models are trained on all of it."""
    data = task.data
    return task.settings.final_on_all and data.title.startswith("ImageNet") and data.classes == IMAGENET_CLASSES


def _described(args: argparse.Namespace, preset: Preset, recipe: ImageNetRecipe) -> str:
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
        methods = args.methods or methods_for(recipe.model)
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
            f"epochs, then to 0 along a cosine; weight decay {recipe.weight_decay:g}{smoothing}"
            + ("" if recipe.average is None else f"; moving average {recipe.average:g}"),
            *models,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
