"""Table 1 with a share of the labels, as a user runs it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from image_folders import write_folder
from image_folders import write_parquet
from scripts import records

from autodropout import load_policy
from autodropout.reproduce import results_page
from autodropout.reproduce import table1_imagenet as script
from autodropout.reproduce.experiment import Job
from autodropout.reproduce.experiment import Result
from autodropout.reproduce.imagenet_data import Images
from autodropout.reproduce.imagenet_presets import IMAGENET_TRAIN
from autodropout.reproduce.imagenet_presets import LABEL_RECIPE
from autodropout.reproduce.imagenet_report import uda_report
from autodropout.reproduce.imagenet_task import network_policy
from autodropout.reproduce.imagenet_uda_task import ImageNetUdaTask
from autodropout.reproduce.imagenet_uda_task import label_count
from autodropout.reproduce.methods import OFF
from autodropout.reproduce.models.imagenet import DEMO
from autodropout.reproduce.uda_task import METHODS
from autodropout.reproduce.uda_task import STRENGTHS


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(script.DATA_VARIABLE, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def shrink(monkeypatch: pytest.MonkeyPatch, train: int, valid: int, batch: int, unlabelled: int = 4) -> None:
    """Makes the demo that of so few images."""
    demo = script.LABEL_PRESETS["demo"]
    recipe = dataclasses.replace(demo.recipes[0], batch_size=batch, micro_batch=batch, unlabelled=unlabelled)  # type: ignore[call-arg]
    small = dataclasses.replace(demo, recipes=(recipe,), train_images=train, valid_images=valid)
    monkeypatch.setitem(script.LABEL_PRESETS, "demo", small)


def task_of(*arguments: str, preset: str = "demo") -> ImageNetUdaTask:
    task = script._task(script._parser().parse_args(arguments), script.LABEL_PRESETS[preset])
    assert isinstance(task, ImageNetUdaTask)
    return task


@pytest.mark.slow
def test_to_the_table_and_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, 40, 30, batch=4)
    arguments = ["--labels", "0.2", "--epochs", "1", "--seeds", "2"]
    assert script.main(arguments) == 0
    first = capsys.readouterr().out
    lines = first.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(first.split())
    assert "test accuracy in %, 8 labels, torchvision's ResNet with three narrow bottlenecks, 1 epochs" in text
    assert "augmentation: none; strong: randaugment" in text
    assert "8 labelled, 32 unlabelled training images, 30 validation, 797 test images" in text
    labels = ["supervised ", "supervised, strongly augmented ", "UDA ", "UDA + Dropout ", "UDA + AutoDropout (hand-v0,"]
    starts = [next(i for i, line in enumerate(lines) if line.startswith(label)) for label in labels]
    assert starts == sorted(starts)
    for pair in ("UDA minus supervised: ", "UDA + Dropout minus UDA: ", "UDA + AutoDropout minus UDA: "):
        assert f"Paired by seed: {pair}" in text

    found = records(tmp_path)
    final = [record for record in found if record["phase"] == "final"]
    assert len(found) == 5 * 3 + 5 * 2
    assert [record["method"] for record in final] == list(METHODS) * 2
    for record in found:
        used = record["arguments"]
        assert isinstance(used, dict)
        assert (used["labels"], used["train_images"]) == (8, 40)
        assert used["weight"] == {"supervised": 0, "augmented": 0, "uda": record["strength"]}.get(record["method"], 1.0)
        assert used["evaluation_images"] == (30 if record["phase"] == "tune" else 797)
    assert len({record["key"] for record in found}) == len(found)
    assert script.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert records(tmp_path) == found

    (results,) = (tmp_path / "results").glob("*.jsonl")
    page = results_page.page([results])
    assert "8 labels, 32 unlabelled training images" in page
    assert "difference to supervised |" in page


@pytest.mark.parametrize("write", [write_folder, write_parquet])
def test_photographs(write: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """12 images of three classes, which are cropped and mirrored for teacher and labels."""
    write(Path("data"))  # type: ignore[operator]
    shrink(monkeypatch, 8, 4, batch=2, unlabelled=1)
    demo = dataclasses.replace(script.LABEL_PRESETS["demo"], final_on_all=True)
    monkeypatch.setitem(script.LABEL_PRESETS, "demo", demo)
    arguments = ["--labels", "0.5", "--data", "data", "--epochs", "1", "--seeds", "1", "--methods", "uda+autodropout"]
    assert script.main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "augmentation: resized crop flip; strong: resized crop flip, randaugment" in text
    assert (
        "6 labelled, 6 unlabelled training images (strengths: 4 labelled, 4 unlabelled), 4 validation, 6 test" in text
    )
    (final,) = [record for record in records(Path()) if record["phase"] == "final"]
    assert final["arguments"]["labels"] == 6  # type: ignore[index]


def test_what_determines_a_model_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [task_of("--labels", share) for share in ("0.1", "0.2")]
    keys = [
        json.dumps(task.applied(Job("final", method, strength, 0)), sort_keys=True)
        for task in tasks
        for method in METHODS
        for strength in STRENGTHS[method]
    ]
    assert len(set(keys)) == 2 * 5 * 3
    task, hand = tasks[0], load_policy("hand-v0")
    assert task.policy("uda", 1.0) == task.policy("supervised", 1.0) == OFF
    for pattern, strength in (("autodropout", 1.5), ("dropout", 0.1)):
        expected = network_policy(DEMO, pattern, strength, task.data.block_size, hand)
        assert task.policy(f"uda+{pattern}", strength) == expected


def test_the_papers_number_stands_beside_its_own_experiment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [Result(method, 1.0, (0.9, 0.8)) for method in ("uda", "uda+autodropout")]
    digits = task_of("--labels", "0.1")

    def shown(
        share: float = 0.1, final_on_all: bool = True, model: str = "resnet50", **data: object
    ) -> list[str | None]:
        recipe = dataclasses.replace(digits.settings.recipe, model=model)
        settings = dataclasses.replace(digits.settings, recipe=recipe, final_on_all=final_on_all)
        of_imagenet = {"title": "ImageNet (parquet)", "classes": 1000}
        task = ImageNetUdaTask(settings, dataclasses.replace(digits.data, **{**of_imagenet, **data}), share)  # type: ignore[arg-type]
        return [row.paper for row in uda_report(task, results)[1]]

    assert shown() == [None, "72.9"]
    for other in (
        {"share": 0.2},
        {"final_on_all": False},
        {"model": DEMO},
        {"title": "digits"},
        {"classes": 10},
    ):
        assert shown(**other) == [None, None]  # type: ignore[arg-type]


def test_settings_of_udas_paper() -> None:
    recipe = LABEL_RECIPE
    assert (recipe.model, recipe.temperature, recipe.confidence) == ("resnet50", 0.4, 0.5)
    assert (recipe.batch_size, recipe.unlabelled_batch, recipe.learning_rate) == (512, 15_360, 0.3)
    unlabelled = IMAGENET_TRAIN - label_count(0.1, IMAGENET_TRAIN)
    assert recipe.epochs * (unlabelled // recipe.unlabelled_batch) == pytest.approx(40_000, rel=1e-3)


def test_a_dry_run_of_the_paper(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert script.main(["--preset", "paper", "--labels", "0.1", "--micro-batch", "1", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("ResNet-50, 1 process\nMethods: supervised, augmented, uda, uda+dropout, uda+autodropout\n")
    assert "Parameters: 25,557,032\n" in text
    assert "(1 labelled and 30 unlabelled images of 224x224, 512 times a step; " in text
    assert "batch 512 labelled and 15,360 unlabelled images, learning rate to 0.3 in 5 epochs" in text
    assert "label smoothing" not in text
    assert "9 models to tune, UDA: 80,000 images, 8,000 of them with labels, 533 epochs, 2,132 steps" in text
    assert "6 models final, supervised: 1,281,167 images, 128,117 of them with labels, 533 epochs, 39,975 steps" in text
    assert list(tmp_path.iterdir()) == []


def test_help_states_the_cost_of_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help"])
    _, after = capsys.readouterr().out.split("with --labels:\n")
    expected = [[name, preset.cost] for name, preset in script.LABEL_PRESETS.items()]
    assert [line.split(maxsplit=1) for line in after.splitlines()] == expected


def test_data_too_small_for_a_step_are_refused_before_any_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the final models' images, too."""
    task = task_of("--labels", "0.1")
    settings = dataclasses.replace(task.settings, final_on_all=True)
    few = dataclasses.replace(task.data, pool=Few())
    with pytest.raises(
        ValueError,
        match="^--labels 0.1 of 30 training images: the 3 labelled images must be at least those of a step, 10$",
    ):
        ImageNetUdaTask(settings, few, 0.1)


class Few(Images):
    labels = torch.zeros(30, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "0"], "argument --labels: must be a share above 0 and below 1, such as 0.1, got '0'"),
        (["--labels", "1"], "argument --labels: must be a share above 0 and below 1, such as 0.1, got '1'"),
        (["--labels", "128000"], "argument --labels: must be a share above 0 and below 1, such as 0.1, got '128000'"),
        (["--labels", "nan"], "argument --labels: must be a share above 0 and below 1, such as 0.1, got 'nan'"),
        (["--labels", "a"], "argument --labels: must be a share above 0 and below 1, such as 0.1, got 'a'"),
        (["--labels", "0.01"], "--labels 0.01 of 500 training images: the 5 labelled images must be at least"),
        (["--labels", "0.95"], "--labels 0.95 of 500 training images: the 25 unlabelled images must be at least"),
        (["--labels", "0.1", "--methods", "none"], "unknown method 'none'; --methods takes supervised, augmented, uda"),
        (["--methods", "uda"], "unknown method 'uda'; --methods takes none, dropout"),
        (["--labels", "0.1", "--augment", "randaugment"], "--augment must be default with --labels"),
        (
            ["--labels", "0.1", "--model", "efficientnet_b0"],
            "--model must be resnet50 with --labels, got efficientnet",
        ),
        (["--labels", "0.1", "--micro-batch", "3"], "batch_size must be a multiple of micro_batch * ranks = 3 * 1"),
        (["--labels", "0.1", "--preset", "paper"], "preset paper needs ImageNet"),
        (["--labels", "0.1", "--policy", "hand-lm-v0"], "uda+autodropout at strength 0.5: model has no sites of place"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = script.main(arguments)
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    assert code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"table1_imagenet: error: {message}")
    assert line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
