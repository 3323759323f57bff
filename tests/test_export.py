"""Export chooses by retraining with new seeds, keeps what is retrained, and says where its policies come from."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from search_toys import ToySearcher
from search_toys import ToySpace
from search_toys import write_recipe

from autodropout import Policy
from autodropout import load_policy
from autodropout.search.driver import start_search
from autodropout.search.driver import trial_seed
from autodropout.search.export import Export
from autodropout.search.export import difference
from autodropout.search.export import export_policies
from autodropout.search.export import exported
from autodropout.search.history import read_history
from autodropout.search.journal import JournalError
from autodropout.search.recipe import load_recipe
from autodropout.search.retraining import fresh_seeds
from autodropout.search.runners.in_process import InProcessRunner
from autodropout.search.statistics import mean_and_half_width

TRIALS = 12
# Each training leaves a line: its seed.
LOG = """
with open(__file__ + ".log", "a") as file:
    file.write(str(seed) + "\\n")
"""


def search(folder: Path, body: str = "", direction: str = "max", seed: int = 0) -> Path:
    """A finished search over the toy space, whose metric has noise of 0.1; returns the folder of the run."""
    recipe = load_recipe(write_recipe(folder, LOG + body, direction=direction))
    searcher, runner = ToySearcher(ToySpace()), InProcessRunner()
    start_search(folder / "run", recipe, searcher, runner, trials=TRIALS, seed=seed, retries=0, command=["s"])
    return folder / "run"


def export(folder: Path, top: int = 3, seeds: int = 2) -> Export:
    return export_policies(folder, InProcessRunner(), top, seeds, ["e"])


def finalists(folder: Path) -> list[Policy]:
    """Those that belong to the search which is in the folder."""
    return exported(folder, read_history(folder), ToySpace())


def trainings(folder: Path) -> list[int]:
    """Seeds of all trainings since the search."""
    return [int(line) for line in (folder.parent / "toy.py.log").read_text().splitlines()[TRIALS:]]


def quality(policy: Policy) -> float:
    """The metric without its noise."""
    return 1 - sum(abs((site.pattern.rate if site.pattern else 0) - 0.3) for site in policy.sites)  # type: ignore[union-attr]


def test_a_lucky_trial_is_not_chosen(tmp_path: Path) -> None:
    # The seed of trial 4 is worth more than any policy.
    folder = search(tmp_path, f"if seed == {trial_seed(0, 4)}:\n    metric += 10")
    space, history = ToySpace(), read_history(folder)
    assert history.best is not None
    assert history.best.number == 4
    result = export(folder)
    # The noise is the seed's alone, so that with paired seeds the order is that of the true qualities.
    leaders = history.leaders(3)
    assert leaders[0].number == 4
    expected = sorted(leaders, key=lambda trial: -quality(space.decode(trial.choices)))
    assert quality(space.decode(expected[0].choices)) > quality(space.decode(leaders[0].choices))
    assert [finalist.trial for finalist in result.finalists] == expected
    best = load_policy(folder / "policies/best.json")
    assert best.sites == space.decode(expected[0].choices).sites
    assert [policy.provenance["retrained"]["rank"] for policy in finalists(folder)] == [1, 2, 3]
    assert finalists(folder)[0] == best


def test_seeds_are_new_and_paired(tmp_path: Path) -> None:
    folder = search(tmp_path)
    result = export(folder, top=3, seeds=4)
    assert not set(result.seeds) & {trial_seed(0, number) for number in range(TRIALS)}
    assert Counter(trainings(folder)) == dict.fromkeys(result.seeds, 4)  # three candidates, and "off"
    for finalist in (*result.finalists, result.off):
        noise = [metric - quality(finalist.policy) for metric in finalist.metrics]
        assert noise == pytest.approx([metric - quality(result.off.policy) for metric in result.off.metrics])
        gain, half_width = difference(finalist, result.off)
        assert gain == pytest.approx(quality(finalist.policy) - quality(result.off.policy))
        assert half_width == pytest.approx(0, abs=1e-9)


def test_used_seeds_are_left_out() -> None:
    seeds = fresh_seeds(7, set(), 5)
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert fresh_seeds(7, {seeds[1]}, 4) == [seeds[0], *seeds[2:]]
    assert not set(seeds) & set(fresh_seeds(8, set(), 5))


def test_what_is_retrained_is_not_trained_again(tmp_path: Path) -> None:
    folder = search(tmp_path)
    first = export(folder, top=3, seeds=2)
    assert len(trainings(folder)) == 8
    files = {path.name: path.read_bytes() for path in (folder / "policies").iterdir()}
    assert export(folder, top=3, seeds=2) == first
    assert len(trainings(folder)) == 8
    assert {path.name: path.read_bytes() for path in (folder / "policies").iterdir()} == files
    export(folder, top=4, seeds=3)
    assert len(trainings(folder)) == 15
    export(folder, top=2, seeds=1)
    assert len(trainings(folder)) == 15
    assert {path.name for path in (folder / "policies").iterdir()} == {
        "best.json",
        "finalist-1.json",
        "finalist-2.json",
    }


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = search(tmp_path)
    export(folder, top=3, seeds=2)
    names = {"best.json", "finalist-1.json", "finalist-2.json", "finalist-3.json"}
    files = {path.name: path.read_bytes() for path in (folder / "policies").iterdir()}
    assert set(files) == names

    def broken(*_: object) -> None:
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr("autodropout.search.export.difference", broken)
        with pytest.raises(ValueError, match="^no$"):
            export(folder, top=2, seeds=3)
    assert {path.name: path.read_bytes() for path in (folder / "policies").iterdir()} == files
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save", broken)
        with pytest.raises(ValueError, match="^no$"):
            export(folder, top=2, seeds=3)
    assert {path.name: path.read_bytes() for path in (folder / "policies").iterdir()} == files
    export(folder, top=2, seeds=3)
    assert {path.name for path in (folder / "policies").iterdir()} == names - {"finalist-3.json"}
    assert [len(policy.provenance["retrained"]["seeds"]) for policy in finalists(folder)] == [3, 3]


def test_what_another_recipe_retrained_is_not_taken(tmp_path: Path) -> None:
    """The folder of a search whose journal was deleted, to begin again with an edited recipe."""
    folder = search(tmp_path)
    export(folder)
    (folder / "journal.jsonl").unlink()
    search(tmp_path, "metric += 100")
    assert finalists(folder) == []
    message = r"retraining/journal.jsonl is of another recipe than the search: .*; move it away, then export again$"
    kept = []  # with what their tracebacks refer to: the lock is free all the same
    for _ in range(2):
        with pytest.raises(JournalError, match=message) as caught:
            export(folder)
        kept.append(caught.value)
    shutil.rmtree(folder / "retraining")
    assert all(metric > 90 for finalist in export(folder).finalists for metric in finalist.metrics)
    assert len(finalists(folder)) == 3


def test_finalists_of_another_search_are_left_out(tmp_path: Path) -> None:
    folder = search(tmp_path)
    export(folder)
    assert len(finalists(folder)) == 3
    (folder / "journal.jsonl").unlink()
    search(tmp_path, seed=1)
    assert finalists(folder) == []
    export(folder)
    history = read_history(folder)
    assert len(finalists(folder)) == 3
    by_hand = Policy(finalists(folder)[0].sites)
    by_hand.save(folder / "policies/finalist-2.json")
    assert len(finalists(folder)) == 2
    for name, value in (("direction", "min"), ("searcher", {"name": "other"}), ("seed", 2), ("recipe", {"sha256": ""})):
        other = read_history(folder)
        other.header = {**history.header, name: value if name != "recipe" else {**history.recipe, "sha256": ""}}
        assert exported(folder, other, ToySpace()) == []
    assert exported(folder, history, ToySpace(3)) == []
    # The same search begun again, which has not come to those trials.
    history.told.clear()
    assert exported(folder, history, ToySpace()) == []


def test_files_with_other_names_are_the_users(tmp_path: Path) -> None:
    folder = search(tmp_path)
    export(folder, top=3, seeds=1)
    copies = ["finalist-1-mine.json", "finalist-01.json", "finalist-0.json", "finalist-.json", "finalist-\u0663.json"]
    for name in copies:
        shutil.copy(folder / "policies/finalist-1.json", folder / "policies" / name)
    assert len(finalists(folder)) == 3
    export(folder, top=2, seeds=1)
    names = {path.name for path in (folder / "policies").iterdir()}
    assert names == {"best.json", "finalist-1.json", "finalist-2.json", *copies}


def test_intervals_without_scipy_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = search(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", None)  # importing it raises ImportError
    with pytest.raises(ImportError, match=r"^intervals need SciPy: pip install 'autodropout\[search\]'$") as caught:
        export(folder, seeds=2)
    assert caught.value.name == "scipy"
    assert trainings(folder) == []
    assert export(folder, seeds=1).finalists  # one value has no interval


def test_an_interrupted_export_goes_on(tmp_path: Path) -> None:
    whole = search(tmp_path / "a") if (tmp_path / "a").mkdir() is None else tmp_path
    body = f"if not sum(1 for _ in open(__file__ + '.log')) - {TRIALS} - 5:\n    raise KeyboardInterrupt"
    (tmp_path / "b").mkdir()
    folder = search(tmp_path / "b", body)
    with pytest.raises(KeyboardInterrupt):
        export(folder)
    result = export(folder)
    assert len(trainings(folder)) == 9  # eight, and the one that was cut off
    assert [f.metrics for f in result.finalists] == [f.metrics for f in export(whole).finalists]


def test_the_smaller_metric_wins_where_the_recipe_says_so(tmp_path: Path) -> None:
    folder = search(tmp_path, direction="min")
    result = export(folder)
    means = [sum(finalist.metrics) for finalist in result.finalists]
    assert means == sorted(means)
    assert len(set(means)) == 3


def test_a_candidate_that_fails_is_out(tmp_path: Path) -> None:
    used = [trial_seed(0, number) for number in range(TRIALS)]
    rates = "[site.pattern.rate if site.pattern else 0 for site in policy.sites]"
    folder = search(tmp_path)
    best = read_history(folder).leaders(1)[0]
    bad = [site.pattern.rate if site.pattern else 0 for site in ToySpace().decode(best.choices).sites]  # type: ignore[union-attr]
    shutil.rmtree(folder)
    (tmp_path / "toy.py.log").unlink()
    folder = search(tmp_path, f"if {rates} == {bad} and seed not in {used}:\n    raise ValueError('no')")
    result = export(folder)
    assert [trial.number for trial in result.lost] == [best.number]
    assert len(result.finalists) == 2
    assert best not in [finalist.trial for finalist in result.finalists]


def test_off_is_a_reference_and_no_candidate(tmp_path: Path) -> None:
    # Nothing dropped is best by far.
    folder = search(tmp_path, "metric += 5 * (rates == [0, 0])")
    space, history = ToySpace(), read_history(folder)
    off = Policy(tuple(space.decode((0, 0, 0, 0)).sites))
    assert any(space.decode(trial.choices) == off for trial in history.leaders(2)), "the case that is tested"
    result = export(folder, top=4)
    assert len(result.finalists) == 4
    assert result.off.policy == off
    assert all(finalist.policy != off for finalist in result.finalists)


def test_provenance(tmp_path: Path) -> None:
    folder = search(tmp_path)
    result = export(folder, top=2, seeds=3)
    found: dict[str, Any] = dict(load_policy(folder / "policies/best.json").provenance)
    assert found["kind"] == "searched"
    assert found["recipe"] == {"name": "toy", "sha256": load_recipe(tmp_path / "toy.py").sha256}
    assert found["trials"] == {"proposed": TRIALS, "finished": TRIALS, "failed": 0}
    assert found["searcher"] == {"name": "ToySearcher", "seed": 0, "batch_size": 2}
    assert found["commands"] == [["s"], ["e"]]
    assert found["retrained"]["seeds"] == list(result.seeds)
    mean, half_width = mean_and_half_width(result.finalists[0].metrics)
    assert (found["retrained"]["mean"], found["retrained"]["half_width_95"]) == (mean, half_width)
    assert found["off"]["metrics"] == list(result.off.metrics)
    assert {"torch", "autodropout"} <= found["versions"].keys()
    assert "commit" in found


def test_intervals() -> None:
    # t(0.975, 2 degrees of freedom) = 4.302653; the standard deviation of 1, 2, 3 is 1.
    mean, half_width = mean_and_half_width([1, 2, 3])
    assert (mean, half_width) == (2, pytest.approx(4.302653 / 3**0.5))
    assert mean_and_half_width([5.0]) == (5.0, None)


def test_refusals(tmp_path: Path) -> None:
    folder = search(tmp_path)
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        export(folder, top=0)
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        export(folder, seeds=0)
    recipe = tmp_path / "toy.py"
    source = recipe.read_text()
    recipe.write_text(source + "\n")
    with pytest.raises(ValueError, match=r"the recipe must be what the search was made with, but .*toy.py has changed"):
        export(folder)
    write_recipe(tmp_path, sites=3)
    with pytest.raises(ValueError, match="the recipe's space must be that of the search"):
        export(folder)
    recipe.unlink()
    with pytest.raises(ValueError, match=r"toy.py is gone"):
        export(folder)
    assert not (folder / "policies").exists()
    recipe.write_text(source)
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    asked = [line for line in lines if json.loads(line)["record"] in ("run", "ask")][:2]
    (folder / "journal.jsonl").write_bytes(b"".join(asked))
    with pytest.raises(ValueError, match="has no finished trial to export"):
        export(folder)
