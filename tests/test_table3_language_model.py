"""The script of table 3: offline to its table, the same command again trains nothing, and refusals of one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from scripts import check_kills

from autodropout.reproduce import table3_language_model as script
from autodropout.reproduce.corpus import open_corpus
from autodropout.reproduce.language_task import LanguageTask

TEXT = {"train": "a b c d e f\n" * 60, "valid": "a b c\n" * 10, "test": "d e f\n" * 10}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small text, and a small network for it, in the working directory."""
    for split, text in TEXT.items():
        (tmp_path / f"{split}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    demo = script.PRESETS["demo"]
    size = dataclasses.replace(demo.recipe.size, width=8, heads=2, inner=8)
    recipe = dataclasses.replace(demo.recipe, size=size, epochs=2, segment=8, memory=8, warmup=5)
    monkeypatch.setitem(script.PRESETS, "demo", dataclasses.replace(demo, recipe=recipe))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def test_to_the_table_and_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--data", "."]) == 0
    first = capsys.readouterr().out
    lines = first.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.startswith(("none", "Dropout", "Variational", "AutoDropout"))][:3] == [
        line for line in lines if line.startswith(("none", "Dropout", "Variational"))
    ][:3]
    for split in ("validation", "test"):
        assert sum(line.startswith(f"Table 3 (the numbering is ours): {split} perplexity") for line in lines) == 1
    (results,) = (folder / "results").glob("*.jsonl")
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(records) == 3 * 3 + 4 * 2
    final = [record for record in records if record["phase"] == "final"]
    assert {record["metric"] for record in records} == {"perplexity"}
    assert all(record["perplexity"] > 1 and record["valid_perplexity"] > 1 for record in final)
    assert results.with_suffix(".png").stat().st_size > 10_000
    before = results.read_bytes()
    assert script.main(["--data", "."]) == 0
    assert capsys.readouterr().out == first
    assert results.read_bytes() == before


@pytest.mark.slow
def test_kill_9_and_the_same_command_end_in_the_same_table(tmp_path: Path) -> None:
    for split, text in TEXT.items():
        (tmp_path / f"{split}.txt").write_text(text * (8 if split == "train" else 1))
    tiny = ["--data", str(tmp_path), "--epochs", "2", "--seeds", "1", "--methods", "none,autodropout"]
    table = check_kills(Path(script.__file__), tmp_path, tiny, models=3 + 2)
    assert "test perplexity" in table


@pytest.mark.parametrize("preset", script.PRESETS)
def test_a_dry_run_trains_nothing(preset: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--preset", preset, "--data", ".", "--dry-run"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert not (folder / "runs").exists()


def test_a_warm_up_longer_than_the_training_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = script.PRESETS["demo"]
    longer = dataclasses.replace(demo, recipe=dataclasses.replace(demo.recipe, warmup=1000))
    monkeypatch.setitem(script.PRESETS, "demo", longer)
    assert script.main(["--data", ".", "--epochs", "1", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 epochs (the learning rate only rises: warm-up over 1,000 steps, training over " in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "small"], "preset small needs a text: give --data DIR"),
        (["--data", "missing"], "data must be 'pydoc', 'hub' or a folder with train.txt"),
        (["--policy", "hand-v0"], "autodropout at strength 0.5: model has no sites of place 'batch_norm'"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(script.DATA_VARIABLE, raising=False)
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"table3_language_model: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_text_shorter_than_a_batch_is_refused_before_any_training(
    more: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = script.PRESETS["demo"].recipe.batch_size
    (folder / "train.txt").write_text("a " * (batch - 2) + "\n")
    assert script.main(["--data", ".", *more]) == 2
    assert capsys.readouterr().err == (
        f"table3_language_model: error: train.txt must have at least {batch} words, ends of lines included, for a "
        f"batch, got {batch - 1}\n"
    )
    assert not (folder / "runs").exists()
    (folder / "train.txt").write_text("a " * (batch - 1) + "\n")
    assert script.main(["--data", ".", "--dry-run"]) == 0


def test_the_papers_numbers_stand_beside_its_own_data_and_network_alone(folder: Path) -> None:
    arguments = script._parser().parse_args(["--data", "."])
    task = script._task(arguments, script.PRESETS["paper"])
    assert isinstance(task, LanguageTask)
    assert script._name(task) == folder.name
    treebank = dataclasses.replace(open_corpus("."), fingerprint=script.PENN_TREEBANK_TEXT + "0" * 52)
    known = LanguageTask(task.settings, treebank)
    assert script._name(known) == "Penn Treebank"
    record = {"perplexity": 60.0, "valid_perplexity": 61.0}
    results = [script.Result("autodropout", 1.0, (60.0,), (record,))]
    assert [script._rows(known, results, metric)[0].paper for metric in script.SPLITS] == ["58.1", "54.9"]
    assert [script._rows(task, results, metric)[0].paper for metric in script.SPLITS] == [None, None]
