"""The script of table 4: offline to its table, the same command again trains nothing, and refusals of one line."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scripts import check_kills

from autodropout.reproduce import table4_translation as script
from autodropout.reproduce.models.transformer import BASE
from autodropout.reproduce.parallel_corpus import open_parallel_corpus

SENTENCES = [f"{a} {b} {c}" for a in "abcd" for b in "efgh" for c in "abcd"]


def write(folder: Path, copies: int) -> None:
    """A small parallel corpus: the words in capitals."""
    for split, sentences in {"train": SENTENCES * copies, "valid": SENTENCES[:4], "test": SENTENCES[4:8]}.items():
        (folder / f"{split}.de").write_text("\n".join(sentences) + "\n")
        (folder / f"{split}.en").write_text("\n".join(sentences).upper() + "\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small corpus, and a small network for it, in the working directory."""
    write(tmp_path, copies=1)
    monkeypatch.chdir(tmp_path)
    demo = script.PRESETS["demo"]
    size = dataclasses.replace(demo.recipe.size, layers=1, width=8, heads=2, inner=8)
    recipe = dataclasses.replace(demo.recipe, size=size, epochs=2, warmup=5, vocabulary=300)
    monkeypatch.setitem(script.PRESETS, "demo", dataclasses.replace(demo, recipe=recipe))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_to_the_table_and_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--data", "."]) == 0
    first = capsys.readouterr().out
    lines = first.splitlines()
    assert max(map(len, lines)) <= 80
    names = ["none", "Dropout", "Variational", "AutoDropout"]
    assert [name for line in lines for name in names if line.startswith(name)][:4] == names
    for split in ("validation", "test"):
        assert sum(line.startswith(f"Table 4 (the numbering is ours): {split} BLEU") for line in lines) == 1
    assert "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in first
    (results,) = (folder / "results").glob("*.jsonl")
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(records) == 3 * 3 + 4 * 2
    final = [record for record in records if record["phase"] == "final"]
    assert {record["metric"] for record in records} == {"bleu"}
    assert all(0 <= record["bleu"] <= 100 and 0 <= record["valid_bleu"] <= 100 for record in final)
    assert all("signature" in record["arguments"] for record in records)
    assert results.with_suffix(".png").stat().st_size > 10_000
    before = results.read_bytes()
    assert script.main(["--data", "."]) == 0
    assert capsys.readouterr().out == first
    assert results.read_bytes() == before


@pytest.mark.slow
def test_kill_9_and_the_same_command_end_in_the_same_table(tmp_path: Path) -> None:
    write(tmp_path, copies=4)
    tiny = ["--data", str(tmp_path), "--epochs", "2", "--seeds", "1", "--methods", "none,autodropout"]
    table = check_kills(Path(script.__file__), tmp_path, tiny, models=3 + 2)
    assert "test BLEU" in table


@pytest.mark.parametrize("preset", script.PRESETS)
def test_a_dry_run_trains_nothing(preset: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--preset", preset, "--data", ".", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "9 models to tune: 64 pairs, " in text
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


def test_a_dry_run_counts_the_operations_of_a_full_batch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--data", ".", "--dry-run"]) == 0
    text = capsys.readouterr().out
    number, length = map(int, re.findall(r"\(([\d,]+) pairs of (\d+) subwords on either side", text)[0])
    assert number * length <= script.PRESETS["demo"].recipe.batch_words < (number + 1) * length
    (subwords,) = (int(n) for n in re.findall(r"(\d+) subwords$", text.splitlines()[1]))
    # Width 8, inner 8: multiplications of a word in an attention's four projections and two products, and in a
    # feed-forward part; one encoder's layer, and one decoder's with two attentions; then the softmax over subwords.
    attention, feed_forward = 4 * 8 * 8 + 2 * length * 8, 2 * 8 * 8
    multiplications = number * length * (3 * attention + 2 * feed_forward + 8 * subwords)
    operations = float(re.findall(r"Operations: ([\d.e+]+) ", text)[0])
    # Forward and two gradients, rounded to three digits.
    assert operations == pytest.approx(3 * 2 * multiplications, rel=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "small"], "preset small needs a parallel corpus: give --data"),
        (["--preset", "paper"], "preset paper needs a parallel corpus: give --data"),
        (["--data", "missing"], "data must be 'bible', 'iwslt14', 'wmt14' or a folder with train.de"),
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
    assert error.startswith(f"table4_translation: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("name", "epochs", "words"), [("wmt14", 2, 25_000), ("iwslt14", 50, 4096)])
def test_the_papers_preset_knows_how_large_its_corpora_are(
    name: str, epochs: int, words: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_parallel_corpus(".")
    monkeypatch.setattr(script, "open_parallel_corpus", lambda source: corpus)
    arguments = script._parser().parse_args(["--preset", "paper", "--data", name])
    recipe = script._task(arguments, script.PRESETS["paper"]).settings.recipe
    assert (recipe.epochs, recipe.batch_words, recipe.size) == (epochs, words, BASE)


def test_the_help_says_what_every_preset_costs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for preset in script.PRESETS.values():
        assert preset.cost
        assert preset.cost in text
