"""Table 1 in words and rows, with the figures of the paper where they are of the same experiment."""

from __future__ import annotations

from collections.abc import Sequence

from .command import Report
from .experiment import Result
from .imagenet_presets import IMAGENET_CLASSES
from .imagenet_presets import LABEL_RECIPE
from .imagenet_task import ImageNetTask
from .imagenet_training import ImageNetRecipe
from .imagenet_uda_task import ImageNetUdaTask
from .imagenet_uda_task import label_count
from .learning_rates import only_rises
from .methods import method_label
from .methods import policy_origin
from .models.imagenet import NETWORKS
from .report import Row
from .uda_report import uda_notes
from .uda_report import uda_rows

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


def report(task: ImageNetTask, results: Sequence[Result]) -> Report:
    """Title, rows and notes of the table."""
    settings, data = task.settings, task.data
    recipe = settings.recipe
    network = NETWORKS[recipe.model]
    counts = f"{len(data.train):,} training, {len(data.valid):,} validation, {len(data.test):,} test images"
    if settings.final_on_all:
        counts += f"; final models: all {len(data.pool):,} training images"
    together = "" if recipe.ranks == 1 else f", {recipe.ranks} processes"
    title = [
        f"Table 1 (the numbering is ours): test accuracy in %, {network.title}, {_epochs(recipe)}, augmentation: "
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


def uda_report(task: ImageNetUdaTask, results: Sequence[Result]) -> Report:
    """The same of a table with few labels."""
    settings, data = task.settings, task.data
    recipe = settings.recipe
    pool = data.pool if settings.final_on_all else data.train
    labels = label_count(task.labels, len(pool))
    tuned = ""
    if settings.final_on_all:
        few = label_count(task.labels, len(data.train))
        tuned = f" (strengths: {few:,} labelled, {len(data.train) - few:,} unlabelled)"
    together = "" if recipe.ranks == 1 else f", {recipe.ranks} processes"
    title = [
        f"Table 1 (the numbering is ours): test accuracy in %, {labels:,} labels, {NETWORKS[recipe.model].title}, "
        f"{_epochs(recipe)}, augmentation: {_words(recipe.augment)}; strong: {_words(recipe.strong_augment)}{together}",
        f"Data: {data.title}, fingerprint {data.fingerprint[:12]}; {labels:,} labelled, {len(pool) - labels:,} "
        f"unlabelled training images{tuned}, {len(data.valid):,} validation, {len(data.test):,} test images",
    ]
    known = _is_imagenet(task) and recipe.model == LABEL_RECIPE.model and task.labels == UDA_PAPER_LABELS
    notes = uda_notes(settings, results, "ImageNet with a tenth of the labels, ResNet-50, beside that experiment only.")
    return title, uda_rows(settings, results, UDA_PAPER if known else None), notes


def _epochs(recipe: ImageNetRecipe) -> str:
    return f"{recipe.epochs} epochs{only_rises(recipe.warmup, recipe.epochs, 'epochs')}"


def _words(augment: str) -> str:
    return augment.replace("_", " ").replace("+", ", ")


def _is_imagenet(task: ImageNetTask) -> bool:
    """Whether the final models are trained on all of it."""
    data = task.data
    return task.settings.final_on_all and data.title.startswith("ImageNet") and data.classes == IMAGENET_CLASSES
