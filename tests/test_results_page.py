"""The page of results: what it computes from known lines, and that the committed page is the one that is generated."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest

from autodropout.reproduce.results_page import page
from autodropout.reproduce.results_page import section

ROOT = Path(__file__).parent.parent


def line(method: str, seed: int, accuracy: float, phase: str = "final") -> str:
    arguments = {"depth": 10, "width": 1, "train_images": 100, "evaluation_images": 797, "epochs": 3, "augment": "none"}
    record = {
        "experiment": "table2_cifar",
        "preset": "demo",
        "phase": phase,
        "method": method,
        "policy": None,
        "strength": None if method == "none" else 0.1,
        "seed": seed,
        "accuracy": accuracy,
        "arguments": arguments,
        "data": {"title": "digits", "fingerprint": "0123456789abcdef"},
        "seconds": 1.5,
        "versions": {"torch": "2"},
        "device": "cpu",
        "threads": 1,
        "commit": None,
    }
    return json.dumps(record)


def test_section_pairs_by_seed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = [line("dropout", 1000, 0.1, "tune"), line("none", 0, 0.5), line("none", 1, 0.6)]
    lines += [line("dropout", 1, 0.64), line("dropout", 0, 0.52)]
    path.write_text("\n".join(lines) + "\n")
    text = section(path)
    # t(0.975, 1 degree of freedom) = 12.7062; none: sd 7.0711, so 12.7062 * 7.0711 / sqrt(2) = 63.53
    assert "| none | – | 2 | 55.00 ± 63.53 | – |" in text
    # Dropout: 52 and 64, sd 8.4853; differences 2 and 4, sd 1.4142
    assert "| Dropout | 0.1 | 2 | 58.00 ± 76.24 | +3.00 ± 12.71 |" in text
    assert "5 models in 8 s on cpu, 1 thread(s); commit unknown; data fingerprint 0123456789ab" in text


@pytest.mark.parametrize(("changed", "shown"), [("", "0123456789ab;"), ("+dirty", "0123456789ab+dirty;")])
def test_section_says_if_the_tree_had_changes(tmp_path: Path, changed: str, shown: str) -> None:
    path = tmp_path / "run.jsonl"
    record = json.loads(line("none", 0, 0.5)) | {"commit": "0123456789abcdef0123456789abcdef01234567" + changed}
    path.write_text(json.dumps(record) + "\n")
    assert f"; commit {shown} data fingerprint" in section(path)


def test_section_of_a_network_for_imagenet(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record = json.loads(line("none", 0, 0.75)) | {"experiment": "table1_imagenet", "preset": "paper"}
    del record["arguments"]["depth"], record["arguments"]["width"]
    record["arguments"]["model"] = "efficientnet_b0"
    path.write_text(json.dumps(record) + "\n")
    assert section(path).startswith("## table1_imagenet, preset paper: digits, EfficientNet-B0\n")


def language_line(method: str, seed: int, perplexity: float) -> str:
    size = {"layers": 2, "width": 64, "heads": 4, "inner": 128, "cutoffs": []}
    record = json.loads(line(method, seed, 0.0)) | {
        "experiment": "table3_language_model",
        "perplexity": perplexity,
        "valid_perplexity": perplexity + 2,
        "parameters": 123456,
        "arguments": {
            "size": size,
            "epochs": 16,
            "evaluation_memory": 64,
            "train_tokens": 9000,
            "evaluation_tokens": 1234,
        },
    }
    del record["accuracy"]
    return json.dumps(record)


def test_section_of_language_models_has_both_texts(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = [language_line("none", 0, 50.0), language_line("none", 1, 51.0)]
    lines += [language_line("variational", 1, 48.0), language_line("variational", 0, 45.0)]
    path.write_text("\n".join(lines) + "\n")
    text = section(path)
    assert "preset demo: digits, Transformer-XL of 2 layers of width 64" in text
    assert "123,456 parameters, 9,000 training words, 16 epochs; 1,234 test words, each from at least 64" in text
    assert "| method | tuned strength | seeds | validation perplexity | test perplexity | difference to none |" in text
    # Two values 1 apart: 12.7062 * 0.7071 / sqrt(2) = 6.35; 3 apart: 19.06; differences -5 and -3.
    assert "| none | – | 2 | 52.50 ± 6.35 | 50.50 ± 6.35 | – |" in text
    assert "| Variational dropout | 0.1 | 2 | 48.50 ± 19.06 | 46.50 ± 19.06 | -4.00 ± 12.71 |" in text


def test_section_of_translations_says_what_the_source_has(tmp_path: Path) -> None:
    arguments = {
        "size": {"layers": 2, "width": 64, "heads": 4, "inner": 128},
        "epochs": 7,
        "beam": 4,
        "train_pairs": 9000,
        "evaluation_pairs": 400,
        "untouched_bleu": 53.017,
        "signature": "nrefs:1|version:2",
    }
    changes = {"experiment": "table4_translation", "arguments": arguments, "parameters": 123456}
    lines = []
    for method, seed, bleu in (("none", 0, 30.0), ("none", 1, 31.0), ("dropout", 0, 32.0), ("dropout", 1, 35.0)):
        record = json.loads(line(method, seed, 0.0)) | changes | {"bleu": bleu, "valid_bleu": bleu - 1}
        lines.append(json.dumps(record))
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(lines) + "\n")
    text = section(path)
    assert "preset demo: digits, Transformer of 2 + 2 layers of width 64" in text
    assert "123,456 parameters, 9,000 training pairs, 7 epochs, beam 4; 400 test pairs" in text
    assert "untouched, has a BLEU of 53.02. sacrebleu nrefs:1|version:2." in text
    assert "| method | tuned strength | seeds | validation BLEU | test BLEU | difference to none |" in text
    # Two values 1 apart: 12.7062 * 0.7071 / sqrt(2) = 6.35; 3 apart: 19.06; differences 2 and 4.
    assert "| none | – | 2 | 29.50 ± 6.35 | 30.50 ± 6.35 | – |" in text
    assert "| Dropout | 0.1 | 2 | 32.50 ± 19.06 | 33.50 ± 19.06 | +3.00 ± 12.71 |" in text


def test_section_of_searches_says_if_the_controller_learned_by_reinforce_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    shared = {"experiment": "table5_search", "versions": {"torch": "2"}, "commit": None, "task": "kinds", "workers": 1}
    shared |= {"seconds": 1.0, "simple_regret": {"50": 1.0}, "late_regret": {"50": 2.0}}
    found = {}
    for name, settings in (("first", {}), ("off", {"elite_coefficient": 0.0}), ("on", {"elite_coefficient": 1.0})):
        of = {"controller": settings, "random": {}}
        lines = [shared | {"searcher": each, "seed": seed, "settings": of[each]} for seed in (0, 1) for each in of]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[name] = "by REINFORCE alone" in section(path)
    assert found == {"first": True, "off": True, "on": False}


def test_the_committed_page_is_generated() -> None:
    """From the runs that are published: those of whoever tries the scripts in this checkout lie beside them."""
    committed = (ROOT / "docs/results.md").read_text()
    names = re.findall(r"\(\.\./results/(\S+\.jsonl)\)", committed)
    assert committed == page(ROOT / "results" / name for name in names)
    assert names == sorted(names)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="which runs are published is asked of git")
def test_the_committed_page_has_every_committed_run() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "results/*.jsonl"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    committed = (ROOT / "docs/results.md").read_text()
    assert listed.stdout.split()
    assert [path for path in listed.stdout.split() if f"(../{path})" not in committed] == []


@pytest.mark.parametrize("written", [math.inf, "inf"])
def test_section_of_a_training_that_diverged(written: float | str, tmp_path: Path) -> None:
    """As lines have it now, and had it once."""
    values = {("none", 0): written, ("none", 1): 51.0, ("dropout", 0): written, ("dropout", 1): 48.0}
    values |= {("variational", 0): 45.0, ("variational", 1): written}
    records = [
        json.loads(language_line(method, seed, 0.0)) | {"perplexity": value} for (method, seed), value in values.items()
    ]
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = section(path)
    assert "| none | – | 2 | 2.00 ± 0.00 | inf ± – | – |" in text
    assert "| Dropout | 0.1 | 2 | 2.00 ± 0.00 | inf ± – | – |" in text  # inf - inf
    assert "| Variational dropout | 0.1 | 2 | 2.00 ± 0.00 | inf ± – | – |" in text  # 45 - inf and inf - 51
