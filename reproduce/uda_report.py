"""What tables 1 and 2 say when only some images have labels."""

from __future__ import annotations

from collections.abc import Sequence

from .experiment import Result
from .experiment import Settings
from .methods import method_label
from .methods import policy_origin
from .report import DASH
from .report import Row
from .report import paired
from .report import shown
from .uda_task import UdaTask

# AutoDropout with UDA on CIFAR-10, 4,000 labels, WRN-28-2: leaderboards quote an error of 4.2%, shown as accuracy.
PAPER = "95.8"
PAPER_NETWORK = (28, 2)
PAPER_LABELS = 4000
PAPER_IMAGES = 50_000
# What is compared with what, seed by seed.
PAIRS = (("uda", "supervised"), ("uda", "augmented"), ("uda+dropout", "uda"), ("uda+autodropout", "uda"))


def uda_report(task: UdaTask, results: Sequence[Result]) -> tuple[list[str], list[Row], list[str]]:
    """Title, rows and notes of the table."""
    settings, data, recipe = task.settings, task.data, task.settings.recipe
    more = len(data.valid) if settings.final_on_all else 0
    hidden = len(data.train) + more - task.labels
    given_back = " (of them the validation images, whose labels only choose strengths)" if more else ""
    title = [
        f"Table 2 (the numbering is ours): test accuracy in %, {task.labels:,} labels, WRN-{recipe.depth}-"
        f"{recipe.width}, {recipe.epochs} epochs, augmentation: {_words(recipe.augment)}; "
        f"strong: {_words(recipe.strong_augment)}",
        f"Data: {data.title}, fingerprint {data.fingerprint[:12]}; {task.labels:,} labelled, {hidden:,} unlabelled "
        f"training images{given_back}, {len(data.valid):,} validation, {len(data.test):,} test images",
    ]
    known = (
        data.title.startswith("CIFAR-10")
        and (recipe.depth, recipe.width) == PAPER_NETWORK
        and task.labels == PAPER_LABELS
        and len(data.train) + len(data.valid) == PAPER_IMAGES
    )
    notes = uda_notes(
        settings,
        results,
        "CIFAR-10 with 4,000 labels, WRN-28-2, an error of 4.2% as accuracy, beside that experiment only.",
    )
    return title, uda_rows(settings, results, PAPER if known else None), notes


def uda_rows(settings: Settings, results: Sequence[Result], paper: str | None) -> list[Row]:
    """`paper`: accuracy of AutoDropout with UDA in the paper, where the experiment is the paper's."""
    return [
        Row(
            method_label(result.method, settings.policy_name, policy_origin(settings.policy)),
            result.strength,
            tuple(100 * accuracy for accuracy in result.values),
            paper if result.method == "uda+autodropout" else None,
        )
        for result in results
    ]


def uda_notes(settings: Settings, results: Sequence[Result], paper: str) -> list[str]:
    """What is under the table; `paper`: which experiment the paper's number is of."""
    rows = dict(zip((result.method for result in results), uda_rows(settings, results, None), strict=True))
    trials = f"{settings.tuning_seeds} seed{'s' if settings.tuning_seeds > 1 else ''}"
    return [
        *(
            f"Paired by seed: {_short(rows[method].label)} minus {_short(rows[base].label)}: "
            f"{_difference(rows[method].values, rows[base].values)}"
            for method, base in PAIRS
            if method in rows and base in rows
        ),
        f"tuned: the best of three strengths on the validation images, {trials} each (supervised: a factor on the "
        "learning rate; UDA: the weight of its consistency term; AutoDropout: a factor on the sizes or rates of its "
        f"policy's patterns). Seeds 0 to {settings.seeds - 1}; a seed also draws which images have labels. Intervals: "
        f"Student's t over seeds; p: paired t-test, two-sided. paper: Pham & Le 2021, {paper}",
    ]


def _difference(values: Sequence[float], base: Sequence[float]) -> str:
    found, p = paired(values, base)
    half = DASH if found.half_width is None else f"{found.half_width:.2f}"
    return f"{shown(found.mean, '+')} +- {half}, p = {DASH if p is None else f'{p:.2g}'}"


def _short(label: str) -> str:
    return label.split(" (")[0]


def _words(augment: str) -> str:
    return augment.replace("_", " and ").replace("+", ", ")
