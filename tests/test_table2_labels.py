"""Table 2 with few labels, as a user runs it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scripts import records

from autodropout import Policy
from autodropout import load_policy
from autodropout.reproduce import results_page
from autodropout.reproduce.augment import AUGMENTS
from autodropout.reproduce.data import open_data
from autodropout.reproduce.experiment import Experiment
from autodropout.reproduce.experiment import Job
from autodropout.reproduce.experiment import Result
from autodropout.reproduce.experiment import Settings
from autodropout.reproduce.methods import OFF
from autodropout.reproduce.table2_cifar import LABEL_PRESETS
from autodropout.reproduce.table2_cifar import main
from autodropout.reproduce.uda_report import uda_report
from autodropout.reproduce.uda_task import METHODS
from autodropout.reproduce.uda_task import STRENGTHS
from autodropout.reproduce.uda_task import STRONG_AUGMENT
from autodropout.reproduce.uda_task import UdaTask
from autodropout.reproduce.uda_task import method_recipe
from autodropout.reproduce.uda_training import FewLabels
from autodropout.reproduce.uda_training import UdaRecipe

TINY = ["--labels", "30", "--train-images", "90", "--epochs", "1"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTODROPOUT_DATA", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(preset: str = "demo", final_on_all: bool = False) -> Settings:
    recipe = dataclasses.replace(LABEL_PRESETS[preset].recipe, augment="none", strong_augment="affine+cutout")
    return Settings("t", preset, recipe, METHODS, 1, 1, final_on_all, "hand-v0", load_policy("hand-v0"))


def test_to_the_table_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--seeds", "2"]) == 0
    first = capsys.readouterr().out
    lines = first.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(first.split())
    assert "test accuracy in %, 30 labels, WRN-10-1, 1 epochs, augmentation: none; strong: affine, cutout" in text
    assert "30 labelled, 60 unlabelled training images, 200 validation, 797 test images" in text
    labels = [
        "supervised ",
        "supervised, strongly augmented ",
        "UDA ",
        "UDA + Dropout ",
        "UDA + AutoDropout (digits-v1",
    ]
    starts = [next(i for i, line in enumerate(lines) if line.startswith(label)) for label in labels]
    assert starts == sorted(starts)
    for pair in ("UDA minus supervised: ", "UDA + Dropout minus UDA: ", "UDA + AutoDropout minus UDA: "):
        assert f"Paired by seed: {pair}" in text

    found = records(tmp_path)
    final = [record for record in found if record["phase"] == "final"]
    assert len(found) == 5 * 3 * LABEL_PRESETS["demo"].tuning_seeds + 5 * 2
    assert [record["method"] for record in final] == list(METHODS) * 2
    for record in found:
        used = record["arguments"]
        assert isinstance(used, dict)
        assert (used["labels"], used["train_images"]) == (30, 90)
        assert (record["policy"] == "digits-v1") == (record["method"] == "uda+autodropout")
        assert used["weight"] == {"supervised": 0, "augmented": 0, "uda": record["strength"]}.get(record["method"], 1.0)
    # Tuning never sees the test images, the final models are measured on nothing else.
    assert {record["arguments"]["evaluation_images"] for record in final} == {797}
    assert {r["arguments"]["evaluation_images"] for r in found if r["phase"] == "tune"} == {200}
    of = {m: [100 * float(str(r["accuracy"])) for r in final if r["method"] == m] for m in METHODS}
    differences = [a - b for a, b in zip(of["uda"], of["supervised"], strict=True)]
    assert f"UDA minus supervised: {sum(differences) / 2:+.2f} +- " in text

    assert main([*TINY, "--seeds", "2"]) == 0
    assert capsys.readouterr().out == first
    assert records(tmp_path) == found

    (results,) = (tmp_path / "results").glob("*.jsonl")
    page = results_page.page([results])
    assert "30 labels, 60 unlabelled training images" in page
    assert "| supervised | " in page
    assert f"| UDA | {next(r['strength'] for r in final if r['method'] == 'uda'):g} | 2 | " in page
    assert "difference to supervised |" in page
    assert "| UDA + AutoDropout (digits-v1, searched with the recipe digits, 320 trials) | " in page


def test_one_seed_has_neither_interval_nor_p(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--seeds", "1", "--methods", "supervised,uda"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "UDA minus supervised: " in text
    assert "+- -, p = -" in text
    assert "strongly augmented" not in text


def test_recipes_of_the_methods() -> None:
    recipe = settings().recipe
    supervised, augmented = (method_recipe(m, 0.3, recipe) for m in ("supervised", "augmented"))
    assert (supervised.weight, supervised.augment, supervised.learning_rate) == (0, "none", pytest.approx(0.03))
    assert augmented == dataclasses.replace(supervised, augment="affine+cutout")
    assert method_recipe("uda", 2.0, recipe) == dataclasses.replace(recipe, weight=2.0)
    assert method_recipe("uda+dropout", 0.2, recipe) == method_recipe("uda+autodropout", 1.5, recipe) == recipe
    with pytest.raises(ValueError, match="method must be one of supervised, .*, got 'mixmatch'"):
        method_recipe("mixmatch", 1.0, recipe)


def test_runs_with_other_labels_are_apart(tmp_path: Path) -> None:
    data = open_data("digits", 60, 20)
    folders = {Experiment(UdaTask(settings(), data, labels), torch.device("cpu"), tmp_path).runs for labels in (10, 20)}
    assert len(folders) == 2


def test_what_determines_a_model_is_in_its_key() -> None:
    data = open_data("digits", 60, 20)
    tasks = {labels: UdaTask(settings(), data, labels) for labels in (10, 20)}
    keys = [
        json.dumps(task.applied(Job("final", method, strength, 0)), sort_keys=True)
        for task in tasks.values()
        for method in METHODS
        for strength in STRENGTHS[method]
    ]
    assert len(set(keys)) == 2 * 5 * 3
    assert {len(STRENGTHS[method]) for method in METHODS} == {3}, "the same budget for all"
    assert tasks[10].policy("uda", 1.0) == tasks[10].policy("supervised", 1.0) == OFF
    assert tasks[10].policy("uda+autodropout", 1.5) == load_policy("hand-v0").scaled(1.5)


def test_validation_images_are_given_back_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data("digits", 60, 20)
    given: list[int] = []

    def stop(recipe: UdaRecipe, policy: Policy, few: FewLabels, *_: object) -> None:
        given.append(len(few.unlabelled))
        raise InterruptedError

    monkeypatch.setattr("autodropout.reproduce.uda_task.train_uda", stop)
    for final_on_all in (False, True):
        task = UdaTask(settings(final_on_all=final_on_all), data, 10)
        for phase in ("tune", "final"):
            with pytest.raises(InterruptedError):
                task.train(Job(phase, "uda", 1.0, 0), torch.device("cpu"), Path("c.pt"), lambda: None)
    assert given == [50, 50, 50, 70]


def test_the_papers_number_stands_beside_its_own_experiment_alone() -> None:
    digits = open_data("digits", 60, 20)
    cifar = dataclasses.replace(digits, title="CIFAR-10 (local parquet, PNG images)")
    whole = dataclasses.replace(
        cifar,
        train=dataclasses.replace(cifar.train, labels=torch.zeros(45_000, dtype=torch.int64)),
        valid=dataclasses.replace(cifar.valid, labels=torch.zeros(5_000, dtype=torch.int64)),
    )
    results = [Result(method, 1.0, (0.9, 0.8)) for method in ("uda", "uda+autodropout")]

    def shown(data: object, preset: str, labels: int) -> list[str | None]:
        task = UdaTask(settings(preset), whole, 4000)
        task.data, task.labels = data, labels  # type: ignore[assignment]
        return [row.paper for row in uda_report(task, results)[1]]

    assert shown(whole, "paper", 4000) == [None, "95.8"]
    assert shown(whole, "demo", 4000) == [None, None]
    assert shown(whole, "paper", 1000) == [None, None]
    assert shown(cifar, "paper", 50) == [None, None]
    assert shown(dataclasses.replace(whole, title=digits.title), "paper", 4000) == [None, None]


def test_presets() -> None:
    for name, preset in LABEL_PRESETS.items():
        assert isinstance(preset.recipe, UdaRecipe)
        # The paper's network for this row is WRN-28-2, also where table 2 otherwise has WRN-28-10.
        assert (preset.recipe.depth, preset.recipe.width) == ((10, 1) if name == "demo" else (28, 2))
    assert set(STRONG_AUGMENT.values()) < set(AUGMENTS)
    paper = LABEL_PRESETS["paper"].recipe
    # 200,000 steps: 50,000 images without 4,000 labelled ones in batches of 160.
    assert paper.epochs * (46_000 // paper.unlabelled_batch) == pytest.approx(200_000, rel=1e-3)
    assert (LABEL_PRESETS["demo"].train_images, LABEL_PRESETS["demo"].valid_images) == (800, 200)


def test_help_states_the_cost_of_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    _, after = capsys.readouterr().out.split("with --labels:\n")
    assert [line.split(maxsplit=1) for line in after.splitlines()] == [[n, p.cost] for n, p in LABEL_PRESETS.items()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "800"], "--labels must be below the 800 training images, got 800"),
        (["--labels", "0"], "argument --labels: must be an integer of at least 1, got '0'"),
        (["--labels", "10", "--methods", "none"], "unknown method 'none'; --methods takes supervised, augmented, uda"),
        (["--methods", "uda"], "unknown method 'uda'; --methods takes none, dropout"),
        (["--labels", "10", "--augment", "randaugment"], "--augment must be default with --labels"),
        (["--labels", "4000", "--preset", "paper"], "preset paper needs CIFAR-10"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    assert code == 2
    error_line = capsys.readouterr().err
    assert error_line.startswith(f"table2_cifar: error: {message}")
    assert error_line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_real_cifar10(data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's network on real photographs: RandAugment and cutout for the student."""
    monkeypatch.setenv("HF_DATASETS_CACHE", "cache")
    arguments = [*TINY, "--train-images", "130", "--seeds", "1", "--methods", "uda", "--data", str(data_dir)]
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "augmentation: flip and crop; strong: flip and crop, randaugment, cutout Data: CIFAR-10 (local" in text
