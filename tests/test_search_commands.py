"""The commands of a search as a user types them, on a recipe that trains in microseconds; and the page they write."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from search_toys import ToySearcher
from search_toys import ToySpace
from search_toys import write_recipe
from test_cli import fails

from autodropout import Policy
from autodropout import Site
from autodropout import load_policy
from autodropout.cli import main
from autodropout.search import report
from autodropout.search import run_folder
from autodropout.search.commands import _table
from autodropout.search.driver import start_search
from autodropout.search.export import Export
from autodropout.search.export import Finalist
from autodropout.search.history import TrialHistory
from autodropout.search.journal import read_journal
from autodropout.search.recipe import load_recipe
from autodropout.search.recipe import shipped_recipes
from autodropout.search.runners.base import Runner
from autodropout.search.runners.in_process import InProcessRunner

VOID = {"meta", "img", "link", "br", "hr", "input"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Drawing takes longer than all the rest.
    monkeypatch.setattr(report, "BEST", 1)


class Page(HTMLParser):
    """Checks that tags are closed in their order, and gathers text and what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def has(self, text: str) -> bool:
        return text in "\n".join(self.text)


def checked_page(folder: Path) -> Page:
    """The report of a run, which needs nothing but itself."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    for needle in ("http:", "https:", "url(", "@import", "<script", "javascript:", "NaN"):
        assert needle not in re.sub("base64,[^']*", "", text)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    return page


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_journal(folder) if record["record"] == kind]


def test_from_search_to_exported_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path)
    run = tmp_path / "run"
    words = ["search", "toy.py", "--trials", "40", "--run", "run", "--searcher", "evolution", "--seed", "5"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    tells = records(run, "tell")
    best = max(tells, key=lambda record: record["metric"])
    assert out.splitlines() == [
        f"40 trials: 40 finished, 0 failed; best metric {best['metric']:.5g} in trial {best['trial']}",
        "report: run/report.html",
        "next: autodropout export run",
    ]
    assert err.splitlines()[-1].startswith(f"40 of 40 trials: best {best['metric']:.5g} (trial {best['trial']})")
    (header,) = records(run, "run")
    assert header["command"] == ["autodropout", *words]
    assert header["searcher"]["name"] == "evolution"
    assert (header["seed"], header["searcher"]["seed"], header["trials"]) == (5, 5, 40)
    assert header["runner"] == {"kind": "in-process", "workers": 1}

    page = checked_page(run)
    assert page.has("autodropout search toy.py --trials 40 --run run --searcher evolution --seed 5")
    assert page.has(f"{best['metric']:.5g}")
    assert page.has("complete")
    assert not page.has("finalist-1")

    assert main(["export", "run", "--top", "3", "--seeds", "2"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["finalist-1", "finalist-2", "finalist-3", "nothing"]
    assert all(len(line) <= 80 for line in out.splitlines())
    assert err.splitlines()[-2:] == ["8 of 8 trainings are done", "wrote run/policies/best.json"]
    policy = load_policy(run / "policies/best.json")
    assert policy.provenance["commands"] == [
        ["autodropout", *words],
        ["autodropout", "export", "run", "--top", "3", "--seeds", "2"],
    ]
    assert main(["show", "run/policies/best.json", "-o", "p.png", "--map", "8"]) == 0

    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == "run/report.html\n"
    page = checked_page(run)
    assert page.has("finalist-3")
    assert page.has(f"{policy.provenance['retrained']['mean']:.4f}")


@pytest.mark.parametrize(
    ("sign", "metrics", "last"),
    [
        (1, (0.9, 0.9, 0.91), "nothing dropped"),  # gains of 0.1, 0.1 and 0.11
        (1, (0.9, 0.9, 0.8), "so few seeds do not show that the best is better than nothing dropped"),  # 0.1, 0.1, 0
        (1, (0.7, 0.7, 0.7), "no finalist is better than nothing dropped"),
        (1, (0.8, 0.8, 0.8), "no finalist is better than nothing dropped"),
        (-1, (0.7, 0.7, 0.71), "nothing dropped"),
        (-1, (0.9, 0.9, 0.91), "no finalist is better than nothing dropped"),
        (1, (0.9,), "so few seeds do not show that the best is better than nothing dropped"),
    ],
)
def test_an_export_says_whether_anything_was_gained(sign: int, metrics: tuple[float, ...], last: str) -> None:
    nothing, trial = Policy((Site("a", 0.0, pattern=None),)), TrialHistory(3, (), 0, metric=0.9)
    off = Finalist(None, nothing, (0.8,) * len(metrics))
    lines = _table(Export(tuple(range(len(metrics))), (Finalist(trial, nothing, metrics),), off, (), sign)).splitlines()
    assert lines[-1].startswith(last)
    assert len(lines) == 4 + (last != "nothing dropped")


def test_ctrl_c_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = "open(__file__ + '.once', 'x')"
    write_recipe(
        tmp_path,
        f"if policy.sites[0].pattern is None:\n    try:\n        {marker}\n    except FileExistsError:\n"
        "        pass\n    else:\n        raise KeyboardInterrupt",
    )
    search = ["search", "toy.py", "--trials", "20", "--searcher", "evolution", "--run"]
    assert main([*search, "a run"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "autodropout: interrupted; autodropout resume 'a run' goes on"
    assert len(records(tmp_path / "a run", "tell")) < 20
    assert main(["report", "a run"]) == 0
    assert checked_page(tmp_path / "a run").has("trials are over so far")
    assert main(["resume", "a run"]) == 0
    assert main([*search, "other"]) == 0
    for kind, fields in (("ask", ("trial", "choices")), ("tell", ("trial", "metric"))):
        one, two = ([[r[f] for f in fields] for r in records(tmp_path / run, kind)] for run in ("a run", "other"))
        assert one == two
        assert len(one) == 20
    capsys.readouterr()
    assert main(["resume", "a run", "--trials", "25"]) == 0
    assert capsys.readouterr().out.startswith("25 trials: 25 finished, 0 failed")
    page = checked_page(tmp_path / "a run")
    assert page.has("autodropout resume 'a run'\nautodropout resume 'a run' --trials 25")


def test_failures_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path, "if rates[0] == 0.4:\n    raise ValueError('<too much> & more')")
    assert main(["search", "toy.py", "--trials", "30", "--run", "run", "--searcher", "random", "--retries", "1"]) == 0
    out, err = capsys.readouterr()
    lost = [record for record in records(tmp_path / "run", "fail") if record["final"]]
    assert lost
    assert out.startswith(f"30 trials: {30 - len(lost)} finished, {len(lost)} failed; ")
    assert f"trial {lost[0]['trial']} failed (raised): ValueError: <too much> & more" in err
    page = checked_page(tmp_path / "run")
    assert page.has(f"{2 * len(lost)} failed attempts (raised: {2 * len(lost)})")
    assert page.has("ValueError: <too much> & more")


def test_a_search_whose_trials_all_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path, "raise ValueError('never')")
    assert main(["search", "toy.py", "--trials", "3", "--run", "run", "--searcher", "random", "--retries", "0"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("3 trials: 0 finished, 3 failed\n")
    assert "next:" not in out
    assert err.endswith("autodropout: error: no trial of run finished, all 3 failed: see above or the report\n")
    assert checked_page(tmp_path / "run").has("No trial is finished.")
    assert "has no finished trial to export" in fails(["export", "run"], capsys)


def test_the_report_of_a_search_that_has_hardly_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path)
    assert main(["search", "toy.py", "--trials", "5", "--run", "run", "--searcher", "random"]) == 0
    lines = (tmp_path / "run/journal.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (lines[:1], lines[:2], [*lines[:4], lines[4][:20]]):  # the last line is being written
        (tmp_path / "run/journal.jsonl").write_bytes(b"".join(kept))
        assert main(["report", "run"]) == 0
        checked_page(tmp_path / "run")


@pytest.mark.parametrize("settings", [{"kind": "mine"}, {}, {"workers": 3}])
def test_the_report_of_a_search_with_a_runner_of_ones_own(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, searcher = load_recipe(write_recipe(tmp_path)), ToySearcher(ToySpace())
    start_search(tmp_path / "run", recipe, searcher, InProcessRunner(), trials=2, runner_settings=settings)
    assert main(["report", "run"]) == 0
    workers = "3 workers" if "workers" in settings else "unknown number of workers"
    assert checked_page(tmp_path / "run").has(f"; {workers} ({settings.get('kind', 'unknown runner')}); ")
    capsys.readouterr()
    for command in (["resume", "run", "--trials", "3"], ["resume", "run", "--trials", "3", "--workers", "2"]):
        said = fails(command, capsys)
        assert f"runner.kind must be in-process, processes or ray, got {settings.get('kind')!r}" in said


def test_a_message_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a file whose name is not UTF-8."""
    recipe = load_recipe(write_recipe(tmp_path, "raise ValueError('caf\\udce9')"))
    start_search(tmp_path / "run", recipe, ToySearcher(ToySpace()), InProcessRunner(), trials=1, retries=0)
    assert main(["report", "run"]) == 0
    assert checked_page(tmp_path / "run").has("ValueError: caf\\udce9")


def test_the_controller_with_early_stopping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path, "for step in (1, 4):\n    report(step, metric)", direction="min")
    words = ["search", "toy.py", "--trials", "36", "--run", "run", "--early-stopping", "1"]
    assert main(words) == 0
    assert "early stopping" not in capsys.readouterr().out
    stopped = [record for record in records(tmp_path / "run", "tell") if record["stopped"] is not None]
    assert stopped
    page = checked_page(tmp_path / "run")
    assert page.has(f"finished trials, {len(stopped)} of them early")
    assert page.has("Entropy of a token, by kind")
    assert page.has("Importance weights, before clipping")
    capsys.readouterr()
    assert main(["resume", "run", "--trials", "40"]) == 0
    best = min(record["metric"] for record in records(tmp_path / "run", "tell") if record["stopped"] is None)
    assert f"best metric {best:.5g} " in capsys.readouterr().out


def test_early_stopping_of_a_recipe_that_reports_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(tmp_path)
    words = ["search", "toy.py", "--trials", "2", "--run", "run", "--searcher", "random", "--early-stopping", "3"]
    assert main(words) == 0
    message = "early stopping had nothing to compare: the recipe reports nothing at step 3 or later\n"
    assert message in capsys.readouterr().out
    assert main(["resume", "run", "--trials", "4"]) == 0
    assert message in capsys.readouterr().out


def test_two_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path, "print('hello from', seed)")
    words = ["search", "toy.py", "--trials", "4", "--workers", "2", "--searcher", "random", "--timeout", "300"]
    assert main(words) == 0
    run = tmp_path / "runs/toy-random-0"
    assert capsys.readouterr().out.startswith("4 trials: 4 finished, 0 failed")
    (header,) = records(run, "run")
    assert header["runner"] == {"kind": "processes", "workers": 2, "timeout": 300.0, "memory_limit": None}
    assert "hello from" in (run / "logs/worker-0.log").read_text() + (run / "logs/worker-1.log").read_text()


def test_the_number_of_workers_is_that_of_the_last_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    def make(settings: dict[str, Any], folder: Path) -> Runner:
        made.append(settings)
        return InProcessRunner()

    monkeypatch.setattr(run_folder, "make_runner", make)
    write_recipe(tmp_path)
    words = ["search", "toy.py", "--trials", "2", "--run", "run", "--searcher", "random", "--timeout", "9"]
    for command in (
        words,
        ["resume", "run", "--trials", "3", "--workers", "4"],
        ["resume", "run", "--trials", "5"],
        ["export", "run", "--top", "1", "--seeds", "1"],
    ):
        assert main(command) == 0
    assert [settings["workers"] for settings in made] == [1, 4, 4, 4]
    assert [settings["timeout"] for settings in made] == [9.0] * 4
    assert main(["report", "run"]) == 0
    page = checked_page(tmp_path / "run")
    assert page.has("4 workers (processes)")
    assert page.has("kind processes, workers 4, timeout 9.0")


def test_an_existing_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path)
    assert main(["search", "toy.py", "--trials", "2", "--run", "run", "--searcher", "random"]) == 0
    before = (tmp_path / "run/journal.jsonl").read_bytes()
    capsys.readouterr()
    assert fails(["search", "toy.py", "--run", "run"], capsys) == (
        "autodropout: error: run holds a search already: go on with autodropout resume run"
    )
    assert (tmp_path / "run/journal.jsonl").read_bytes() == before


def test_a_file_is_no_folder_for_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path)
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for run in ("taken", "taken/below"):
        assert fails(["search", "toy.py", "--run", run], capsys) == (
            f"autodropout: error: --run must be a folder, or a path for one, got {run}: taken is a file"
        )
    (tmp_path / "runs").write_text("mine")  # where the default is
    assert fails(["search", "toy.py"], capsys) == (
        "autodropout: error: --run must be a folder, or a path for one, got runs/toy-controller-0: runs is a file"
    )
    assert taken.read_text() == "mine"


def test_errors_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path)
    shipped = ", ".join(shipped_recipes())
    assert fails(["search", "nothing.py"], capsys) == (
        f"autodropout: error: recipe must be a file or one of the shipped recipes ({shipped}), got 'nothing.py'"
    )
    (tmp_path / "bad.py").write_text("def space(:\n")
    assert "the recipe" in fails(["search", "bad.py"], capsys)
    (tmp_path / "raises.py").write_text("1 / 0\n")
    line = fails(["search", "raises.py"], capsys)
    assert line.endswith("raises.py fails with ZeroDivisionError: division by zero")
    header = "DIRECTION = 'max'\ndef train(policy, seed, report): pass\n"
    for name, source, message in (
        ("value", "raise ValueError('boom')", "ValueError: boom"),
        ("file", "open('nowhere.txt')", "FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.txt'"),
        ("inner", header + "def space(): raise ValueError('boom')", "ValueError: boom"),
        ("none", "\0", "source code string cannot contain null bytes"),
    ):
        (tmp_path / f"{name}.py").write_text(source)
        line = fails(["search", f"{name}.py"], capsys)
        assert line.startswith(f"autodropout: error: the recipe {tmp_path / name}.py fails with ")
        assert line.endswith(message)
    # What is checked names the file once.
    (tmp_path / "empty.py").write_text("")
    assert fails(["search", "empty.py"], capsys) == (
        f"autodropout: error: recipe {tmp_path / 'empty.py'} must define a function space"
    )
    (tmp_path / "toy").write_text("")
    assert fails(["search", "toy"], capsys) == (
        f"autodropout: error: recipe must be a Python file, got {tmp_path / 'toy'}"
    )
    (tmp_path / "none.py").write_text("DIRECTION = 'max'\ndef space(): pass\ndef train(policy, seed, report): pass\n")
    assert "must return a SearchSpace, got None" in fails(["search", "none.py"], capsys)
    for words, message in (
        (["--trials", "0"], "argument --trials: must be an integer of at least 1, got '0'"),
        (["--workers", "x"], "argument --workers: must be an integer of at least 1, got 'x'"),
        (["--timeout", "-1"], "argument --timeout: must be a number above 0, got '-1'"),
        (["--memory-limit", "nan"], "argument --memory-limit: must be a number above 0, got 'nan'"),
        (["--memory-limit", "1e300"], f"--memory-limit must be 1 to {2**63 - 1} bytes, got 1e+300 GiB"),
        (["--memory-limit", "1e12"], f"--memory-limit must be 1 to {2**63 - 1} bytes, got 1e+12 GiB"),
        (["--memory-limit", str(2**33)], f"--memory-limit must be 1 to {2**63 - 1} bytes, got 8.58993e+09 GiB"),
        (["--memory-limit", "1e-12"], f"--memory-limit must be 1 to {2**63 - 1} bytes, got 1e-12 GiB"),
        (["--searcher", "grid"], "argument --searcher: invalid choice: 'grid'"),
        (["--gpus-per-trial", "1"], "--gpus-per-trial needs --ray"),
        (["--ray", "local", "--memory-limit", "1"], "--memory-limit is for processes of this machine, not for --ray"),
    ):
        assert message in fails(["search", "toy.py", *words], capsys)
    for command in ("resume", "report", "export"):
        assert "holds no search: there is no journal.jsonl in it" in fails([command, "nowhere"], capsys)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["search", "toy.py", "--trials", "2", "--run", "run", "--searcher", "random"]) == 0
    capsys.readouterr()
    recipe.write_text(recipe.read_text() + "# edited\n")
    assert "the recipe's file has changed" in fails(["resume", "run", "--trials", "3"], capsys)
    assert main(["report", "run"]) == 0  # the space is the same
    capsys.readouterr()
    recipe.unlink()
    for command in ("resume", "report", "export"):
        assert fails([command, "run"], capsys).endswith(f"{recipe} is gone")
