"""The same recipe with every searcher on every runner, through the driver; and the journal repeats each of them."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest
from search_toys import RATES
from search_toys import write_recipe

from autodropout.search.core import Search
from autodropout.search.driver import start_search
from autodropout.search.driver import trial_seed
from autodropout.search.journal import read_journal
from autodropout.search.recipe import load_recipe
from autodropout.search.replay import replay
from autodropout.search.runners.base import OnReport
from autodropout.search.runners.base import Outcome
from autodropout.search.runners.base import Runner
from autodropout.search.runners.base import Task
from autodropout.search.runners.in_process import InProcessRunner
from autodropout.search.runners.processes import ProcessRunner
from autodropout.search.runners.ray_cluster import RayRunner
from autodropout.search.searchers import SEARCHERS
from autodropout.search.searchers import make_searcher
from autodropout.search.testing import same

TRIALS = 40

RUNNERS: dict[str, Callable[[], Runner]] = {
    "in-process": InProcessRunner,
    "processes": lambda: ProcessRunner(2, timeout=120),
    "ray": lambda: RayRunner(2, timeout=120),
}


class Lent(Runner):
    """A runner for one search after the other: its workers take seconds to start. What a search leaves is ended."""

    def __init__(self, runner: Runner, recipe: Path) -> None:
        self.runner, self.slots, self.running = runner, runner.slots, 0
        self.on_report: OnReport | None = None
        runner.start(str(recipe), lambda *report: self.on_report(*report))

    def start(self, recipe: str, on_report: OnReport) -> None:
        self.on_report = on_report

    def submit(self, task: Task) -> None:
        self.running += 1
        self.runner.submit(task)

    def wait(self, timeout: float | None) -> list[Outcome]:
        outcomes = self.runner.wait(timeout)
        self.running -= len(outcomes)
        return outcomes

    def close(self) -> None:
        assert self.running == 0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports once, and raises for one trial in five."""
    body = "report(1, metric)\nif random.Random(seed).randrange(5) == 0:\n    raise RuntimeError('unlucky')"
    return write_recipe(tmp_path_factory.mktemp("recipe"), body, sites=3)


# Ray's own tests are in test_runners.py; here a second cluster has to be started.
@pytest.fixture(scope="module", params=["in-process", "processes", pytest.param("ray", marks=pytest.mark.slow)])
def runner(request: pytest.FixtureRequest, recipe: Path) -> Iterator[Lent]:
    if request.param == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    with RUNNERS[request.param]() as inner:
        yield Lent(inner, recipe)


def expected_metric(choices: list[int], seed: int) -> float | None:
    """What the recipe says of a trial, written out once more; None: it raises."""
    if random.Random(seed).randrange(5) == 0:
        return None
    rates = [RATES[choices[i + 1]] if choices[i] else 0 for i in range(0, len(choices), 2)]
    return 1 - sum(abs(rate - 0.3) for rate in rates) + random.Random(seed).gauss(0, 0.1)


@pytest.mark.parametrize("name", SEARCHERS)
def test_searcher_on_runner(name: str, runner: Lent, recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    searcher = make_searcher(name, loaded.space(), seed=3)
    result = start_search(tmp_path / "run", loaded, searcher, runner, trials=TRIALS, seed=11, retries=0)
    records = read_journal(tmp_path / "run")
    asked = {record["trial"]: record["choices"] for record in records if record["record"] == "ask"}
    metrics = {number: expected_metric(choices, trial_seed(11, number)) for number, choices in asked.items()}
    assert list(asked) == list(range(TRIALS))
    assert result.metrics == {number: metric for number, metric in metrics.items() if metric is not None}
    assert sorted(result.failed) == [number for number, metric in metrics.items() if metric is None]
    assert 0 < len(result.failed) < TRIALS / 2
    assert sum(record["record"] == "report" for record in records) == TRIALS

    # However the workers were scheduled: the journal alone repeats proposals, updates and state.
    again = Search(make_searcher(name, loaded.space(), seed=3))
    assert replay(records, again) is None
    assert again.updates == sum(record["record"] == "update" for record in records)
    assert again.updates == len(result.metrics) // searcher.batch_size
    assert same(again.searcher.state_dict(), searcher.state_dict())
