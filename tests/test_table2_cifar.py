"""The main job as a user runs it: its table, kill -9 in the middle, and one clear line for each mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scripts import check_kills
from scripts import records
from scripts import start
from scripts import wait_for

from autodropout import Policy
from autodropout import Site
from autodropout import TiledPattern
from autodropout import load_policy
from autodropout.reproduce import table2_cifar
from autodropout.reproduce.data import ImageData
from autodropout.reproduce.data import open_data
from autodropout.reproduce.experiment import Result
from autodropout.reproduce.experiment import Settings
from autodropout.reproduce.recipes import digits as digits_recipe
from autodropout.reproduce.table2_cifar import PRESETS
from autodropout.reproduce.table2_cifar import main

SCRIPT = Path(table2_cifar.__file__)
TINY = ["--epochs", "2", "--train-images", "20", "--seeds", "2", "--methods", "none,dropout"]
TINY_MODELS = 3 * PRESETS["demo"].tuning_seeds + 2 * 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Such small networks only lose by more, and what a script sets must not reach other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTODROPOUT_DATA", raising=False)


@pytest.mark.slow
def test_kill_9_and_the_same_command_end_in_the_same_table(tmp_path: Path) -> None:
    check_kills(SCRIPT, tmp_path, TINY, TINY_MODELS)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    process = start(SCRIPT, folder, *TINY)
    wait_for(folder, process, 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "interrupted; the same command goes on from runs/table2_cifar-" in err
    assert "Traceback" not in err


def test_table_of_a_tiny_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--epochs", "1", "--train-images", "10", "--seeds", "2"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(out.split())
    assert "Table 2 (the numbering is ours): test accuracy in %, WRN-10-1, 1 epoch" in text
    assert "scikit-learn digits (8x8), fingerprint " in text
    assert "10 training, 500 validation, 797 test images" in text
    labels = ("none", "Dropout", "SpatialDropout", "DropBlock", "Stochastic depth")
    labels += ("AutoDropout (digits-v1, searched with the recipe digits, 320 trials)",)
    for label in labels:
        *above, last = textwrap.wrap(label, 46, break_on_hyphens=False)
        assert set(above) <= set(lines)
        (row,) = [line.split() for line in lines if line.startswith(last + " ")]
        n, mean, plus, half, paper = row[-5:]
        assert (n, plus, paper) == ("2", "+-", "-")
        strength = row[len(last.split())]
        finals = [r for r in records(tmp_path) if r["phase"] == "final" and method_of(label) == r["method"]]
        assert [r["strength"] for r in finals] == [None if strength == "-" else float(strength)] * 2
        first, second = (100 * float(str(r["accuracy"])) for r in finals)
        assert float(mean) == pytest.approx((first + second) / 2, abs=0.005001)
        # t(0.975, 1) = 12.7062, and the standard error of two values is half their distance.
        assert float(half) == pytest.approx(12.7062 * abs(first - second) / 2, abs=0.006)
    assert len(records(tmp_path)) == 5 * 3 * PRESETS["demo"].tuning_seeds + 6 * 2
    (picture,) = (tmp_path / "results").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture.relative_to(tmp_path)) in err


def method_of(label: str) -> str:
    return label.split(" (")[0].replace("Stochastic depth", "stochasticdepth").lower()


@pytest.mark.parametrize("augment", ["default", "randaugment"])
def test_real_cifar10(
    data_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = ["--epochs", "1", "--train-images", "60", "--seeds", "1", "--methods", "none"]
    assert main([*arguments, "--data", str(data_dir), "--augment", augment]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Data: CIFAR-10 (local parquet, " in text
    expected = "flip and crop, randaugment" if augment == "randaugment" else "flip and crop"
    assert f"augmentation: {expected} Data" in text
    (record,) = records(tmp_path)
    assert record["arguments"]["augment"].split("+")[0] == "flip_crop"  # type: ignore[index]
    assert 0.05 < float(str(record["accuracy"])) < 0.5, "1 epoch of 60 images: near chance, on 10,000 test images"


def test_a_policy_that_a_search_has_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = digits_recipe.space()
    found = {"kind": "searched", "recipe": {"name": "digits"}, "trials": {"proposed": 200}}
    policy = dataclasses.replace(space.decode(space.sample(random.Random(0))), provenance=found)
    policy.save(tmp_path / "best.json")
    tiny = ["--epochs", "1", "--train-images", "20", "--seeds", "1", "--methods", "autodropout"]
    assert main([*tiny, "--policy", "best.json"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "AutoDropout (best, searched with the recipe digits, 200 trials)" in text
    lines = records(tmp_path)
    # As many trials as for every other method: three strengths, two seeds each.
    assert [line["phase"] for line in lines] == ["tune"] * 6 + ["final"]
    assert {line["strength"] for line in lines[:6]} == {0.5, 1.0, 1.5}
    assert {line["policy_origin"] for line in lines} == {"searched with the recipe digits, 200 trials"}


def test_paper_numbers_only_beside_the_papers_experiment() -> None:
    digits = open_data("digits", 10, 10)
    few = dataclasses.replace(digits, title="CIFAR-10 (local parquet, PNG images)")
    cifar = dataclasses.replace(
        few,
        train=dataclasses.replace(few.train, labels=torch.zeros(45_000, dtype=torch.int64)),
        valid=dataclasses.replace(few.valid, labels=torch.zeros(5_000, dtype=torch.int64)),
    )
    results = [Result("none", None, (0.9,)), Result("autodropout", 1.0, (0.9,))]

    def shown(preset: str, augment: str, data: ImageData) -> list[str | None]:
        recipe = dataclasses.replace(PRESETS[preset].recipe, augment=augment)
        settings = Settings("t", preset, recipe, ("none", "autodropout"), 1, 1, True, "hand-v0", load_policy("hand-v0"))
        return [row.paper for row in table2_cifar._report(settings, data, results)[1]]

    assert shown("paper", "flip_crop", cifar) == [None, "96.8"]
    assert shown("paper", "flip_crop+randaugment", cifar) == [None, "97.9"]
    assert shown("paper", "none", cifar) == [None, None]
    assert shown("paper", "flip_crop", digits) == [None, None]
    assert shown("small", "flip_crop", cifar) == [None, None]
    assert shown("paper", "flip_crop", few) == [None, None]


def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    """The one line of an error; nothing else is printed, nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("table2_cifar: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
    return err


def test_presets_with_cifar10_say_how_to_give_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for preset in ("small", "paper"):
        line = refusal(capsys, tmp_path, "--preset", preset)
        assert f"preset {preset} needs CIFAR-10: give --data DIR" in line
        assert "AUTODROPOUT_DATA" in line
        assert "--data hub" in line


def test_wrong_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown method 'cutout'; --methods takes none, dropout" in refusal(capsys, tmp_path, "--methods", "cutout")
    for option, value in (("--seeds", "0"), ("--epochs", "-3"), ("--seeds", "many")):
        line = refusal(capsys, tmp_path, option, value)
        assert f"argument {option}: must be an integer of at least 1, got {value!r}" in line
    for more in ([], ["--dry-run"]):
        line = refusal(capsys, tmp_path, "--train-images", "1", *more)
        assert "--train-images must be at least 2, got 1" in line
        line = refusal(capsys, tmp_path, "--train-images", "0", *more)
        assert "argument --train-images: must be an integer of at least 1, got '0'" in line
    assert "fewer than the 900 + 500 asked for" in refusal(capsys, tmp_path, "--train-images", "900")
    assert "invalid choice: 'huge'" in refusal(capsys, tmp_path, "--preset", "huge")
    monkeypatch.setenv("AUTODROPOUT_DATA", str(tmp_path / "gone"))
    assert f"the data folder {tmp_path / 'gone'} does not exist" in refusal(capsys, tmp_path, "--preset", "small")


def test_missing_and_damaged_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "does not exist" in refusal(capsys, tmp_path, "--data", "nowhere")
    (tmp_path / "data").mkdir()
    assert "has neither train.parquet nor cifar10/train.parquet" in refusal(capsys, tmp_path, "--data", "data")
    for part in ("train", "test"):
        (tmp_path / "data" / f"{part}.parquet").write_bytes(b"PAR1 and then nothing")
    assert "cannot read CIFAR-10 from data: " in refusal(capsys, tmp_path, "--data", "data")


def test_wrong_policies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "got 'hand-v9'" in refusal(capsys, tmp_path, "--policy", "hand-v9")
    path = tmp_path / "policy.json"
    content = Policy((Site("a", 0.0, pattern=TiledPattern(0.2)), Site("b", 1.0, pattern=TiledPattern(0.2)))).to_json()
    content["sites"][1]["pattern"]["size"] = 3.5
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "sites[1].pattern.size: must be in [0, 2], got 3.5" in refusal(capsys, tmp_path, "--policy", str(path))
    content["sites"][1]["pattern"] = {"op": "tiled", "size": 0.2, "colour": 1}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "sites[1].pattern.colour" in refusal(capsys, tmp_path, "--policy", str(path))
    path.write_text("{", encoding="utf-8")
    assert str(path) in refusal(capsys, tmp_path, "--policy", str(path))


def test_site_that_would_be_dropped_entirely(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Policy.uniform(TiledPattern(1.9)).save(tmp_path / "all.json")
    line = refusal(capsys, tmp_path, "--policy", "all.json")
    assert "autodropout at strength " in line
    assert "expected rate of at most 0.95" in line


def test_help_states_the_cost_of_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert preset.cost
        assert re.search(rf"^  {name} +{re.escape(preset.cost)}$", text, re.MULTILINE)


def test_demo_is_what_was_promised() -> None:
    demo = PRESETS["demo"]
    assert demo.recipe.depth >= 10
    assert demo.seeds >= 5
    assert (PRESETS["small"].recipe.depth, PRESETS["small"].recipe.width) == (28, 2)
    assert (PRESETS["paper"].recipe.depth, PRESETS["paper"].recipe.width) == (28, 10)


@pytest.mark.skipif(
    not os.environ.get("AUTODROPOUT_HUB"), reason="downloads CIFAR-10: set AUTODROPOUT_HUB=1 to allow it"
)
def test_hub(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--epochs", "1", "--train-images", "60", "--seeds", "1", "--methods", "none", "--data", "hub"]
    assert main(arguments) == 0
    assert "CIFAR-10 (hub uoft-cs/cifar10" in capsys.readouterr().out
