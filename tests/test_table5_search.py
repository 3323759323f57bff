"""The comparison of searchers: pairs and tables by hand, a small run to its files, and what the user can put right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autodropout.reproduce import table5_search
from autodropout.reproduce.table5_search import Job
from autodropout.reproduce.table5_search import main
from autodropout.reproduce.table5_search import paired
from autodropout.reproduce.table5_search import search
from autodropout.reproduce.table5_search import table


def record(searcher: str, seed: int, regret: float) -> dict[str, Any]:
    regrets = {"50": 2 * regret, "100": regret}
    fields = {"task": "kinds", "searcher": searcher, "seed": seed, "budget": 100, "workers": 1}
    return {**fields, "simple_regret": regrets, "late_regret": regrets}


RECORDS = [record("controller", s, r) for s, r in enumerate((1.0, 2.0, 3.0))] + [
    record("random", s, r) for s, r in enumerate((2.0, 4.0, 6.0))
]


def test_pairs_by_hand() -> None:
    mean, half, p = paired(RECORDS, "kinds", "simple_regret", "controller", "random", 100)
    # Differences -1, -2, -3: mean -2, standard error 1 / sqrt(3), t = -3.464 with 2 degrees of freedom.
    assert mean == pytest.approx(-2, abs=1e-12)
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert p == pytest.approx(0.0370899, rel=1e-5)
    assert paired(RECORDS, "kinds", "simple_regret", "random", "random", 100) == (0, 0, None)


def test_table_fits_a_terminal() -> None:
    lines = table("kinds", RECORDS).splitlines()
    assert max(map(len, lines)) <= 80
    assert "controller                4.00 +- 4.97  2.00 +- 2.48" in lines
    assert "controller minus random, simple regret: -2.00 +- 2.48 (p 0.037)" in lines


def test_a_search_repeats_itself_and_its_weights_can_be_off() -> None:
    job = Job("kinds", "controller", 1, 50, 64)
    found, again = search(job), search(job)
    assert found | {"seconds": 0} == again | {"seconds": 0}
    # 48 samples, of updates 0, 1 and 2; nearly all were proposed before the first.
    assert 0.5 < found["mean_age"] <= 1
    assert set(found["simple_regret"]) == {"50"}
    assert search(Job("kinds", table5_search.NO_WEIGHTS, 1, 50, 64))["settings"]["importance_weights"] is False


@pytest.mark.slow
def test_a_run_ends_in_its_table_and_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--tasks", "kinds", "--searchers", "evolution,random", "--repetitions", "2", "--processes", "1"]
    assert main(options) == 0
    first = capsys.readouterr().out
    assert "task kinds (planted): 2 searches each" in first
    (results,) = Path("results").glob("*.jsonl")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["searcher"], line["seed"]) for line in lines] == [
        ("evolution", 0), ("random", 0), ("evolution", 1), ("random", 1),
    ]  # fmt: skip
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # What is done is not repeated, also where the last line is torn; the files end up the same.
    (done,) = Path("runs").iterdir()
    done.write_text("".join(done.read_text().splitlines(keepends=True)[:3]) + '{"task": "ki')
    before = [line["seconds"] for line in lines]
    assert main(options) == 0
    assert capsys.readouterr().out == first
    after = [json.loads(line)["seconds"] for line in results.read_text().splitlines()]
    assert sum(a == b for a, b in zip(before, after, strict=True)) >= 3


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--tasks", "tiles,nonsense"], "must be some of digits, tiles, kinds, neighbours, got 'nonsense'"),
        (["--searchers", "grid"], "must be some of controller, random, evolution, tpe, got 'grid'"),
        (["--repetitions", "0"], "must be an integer of at least 1, got '0'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(options)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
