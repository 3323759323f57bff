"""Searches on tasks whose answer is known: regrets by hand, stale samples, the tabular task on a table made here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from autodropout.reproduce import digits_table
from autodropout.reproduce.benchmark_task import BenchmarkTask
from autodropout.reproduce.benchmark_task import play
from autodropout.reproduce.digits_table import MAPS
from autodropout.reproduce.digits_table import DigitsNet
from autodropout.reproduce.digits_table import all_choices
from autodropout.reproduce.digits_table import noise
from autodropout.reproduce.digits_table import table_space
from autodropout.reproduce.digits_table import train
from autodropout.reproduce.tabular import TabularTask
from autodropout.search.random_search import RandomSearcher
from autodropout.search.reinforce import ControllerSearcher
from autodropout.search.space import Token
from autodropout.search.testing import PlaceholderSpace


class Sum(BenchmarkTask):
    """Two tokens of ten values; the value is their sum in hundredths, and the seed in thousandths is the noise."""

    name = "sum"
    space = PlaceholderSpace("sum", [Token(0, "a", tuple(range(10))), Token(0, "b", tuple(range(10)))])
    optimum = 0.18

    def value(self, choices: Sequence[int]) -> float:
        return sum(self.space.check(choices)) / 100

    def observe(self, choices: Sequence[int], seed: int) -> float:
        return self.value(choices) + seed % 2**20 / 1000


def test_regrets_by_hand() -> None:
    choices = [(1, 2), (9, 0), (4, 5), (0, 0)]
    # The earliest of the two best observations counts, whatever the others are worth.
    assert Sum().simple_regret(choices, [0.5, 0.7, 0.7, 0.1]) == pytest.approx(0.18 - 0.09, abs=1e-15)
    assert Sum().simple_regret(choices, [0.5, 0.1, 0.1, 0.9]) == pytest.approx(0.18, abs=1e-15)
    assert Sum().late_regret(choices) == pytest.approx(0.18 - (0.03 + 0.09 + 0.09 + 0) / 4, abs=1e-15)
    # The last 50 only: the first ten, the worst ones, do not count.
    assert Sum().late_regret([(0, 0)] * 10 + [(9, 8)] * 50) == pytest.approx(0.01, abs=1e-15)


def test_one_worker_sees_trials_in_order_and_nothing_stale() -> None:
    searcher = ControllerSearcher(Sum.space, 3, batch_size=4)
    choices, observed, ages = play(Sum(), searcher, 10, seed=7)
    assert len(choices) == 10
    assert observed == [Sum().value(each) + number / 1000 for number, each in enumerate(choices)]
    assert ages == [0] * 8
    again = play(Sum(), ControllerSearcher(Sum.space, 3, batch_size=4), 10, seed=7)
    assert again == (choices, observed, ages)


def test_many_workers_finish_as_many_trials_with_stale_samples() -> None:
    choices, observed, ages = play(Sum(), RandomSearcher(Sum.space, 0), 40, seed=1, workers=8)
    assert len(choices) == len(observed) == len(ages) == 40
    # Random search updates with every trial: on average seven others have finished since this one was proposed.
    assert statistics.fmean(ages) == pytest.approx(7, abs=1.5)
    assert max(ages) > 7


def test_the_table_holds_every_sequence_of_its_space_once() -> None:
    space = table_space()
    choices = all_choices()
    assert len(choices) == len(set(choices)) == 1000
    assert all(space.check(each) == each for each in choices)
    policies = {space.decode(each) for each in choices}
    assert len(policies) == 1000
    per_site = {tuple(each[i] for i, token in enumerate(space.tokens) if token.site == 0) for each in choices}
    assert len(per_site) ** len(MAPS) == 1000


def test_networks_side_by_side_do_not_meet() -> None:
    """Other images and weights for one network change neither scores nor gradients of the other, in any bit."""
    torch.manual_seed(0)
    model = DigitsNet(2)
    images = torch.randn(5, 2, 8, 8)
    halves = [(parameter, parameter.shape[0] // 2) for parameter in model.parameters()]

    def of_the_first() -> list[torch.Tensor]:
        model.zero_grad()
        scores = model(images)
        scores.square().sum().backward()  # the sum of both networks' losses
        gradients = [parameter.grad for parameter, _ in halves]
        assert all(
            gradient is not None and gradient[half:].any()
            for gradient, (_, half) in zip(gradients, halves, strict=True)
        )
        return [
            scores[:, 0].detach().clone(),
            *(g[:half].clone() for g, (_, half) in zip(gradients, halves, strict=True)),
        ]  # type: ignore[index]

    before = of_the_first()
    images[:, 1] = torch.randn(5, 8, 8)
    with torch.no_grad():
        for parameter, half in halves:
            parameter[half:] += 0.1 * torch.randn_like(parameter[half:])
    assert all(torch.equal(a, b) for a, b in zip(before, of_the_first(), strict=True))


def test_training_repeats_itself_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_table, "STEPS", 20)
    policy = table_space().decode(all_choices()[0])
    found = train(policy, seeds=2)
    assert found == train(policy, seeds=2)
    (valid, test) = found
    # Guessing gets a tenth; 99.9% of guesses stay below 0.1 + 3.1 * sqrt(0.1 * 0.9 / 500) = 0.142.
    assert min(valid) > 0.142 * 500
    assert min(test) > 0.142 * 797


def test_noise_by_hand() -> None:
    rows = [[[], [400, 410, 420], []], [[], [300, 300, 330], []]]
    found = noise(rows)
    # Variances in percent squared: 4 and 12, pooled 8; means 82 and 62, of seeds 70, 71 and 75; 72 of all.
    assert found["seed"] == pytest.approx(8**0.5, abs=1e-3)
    # What policy and seed leave: 0, 1, -1 and 0, -1, 1, on two degrees of freedom.
    assert found["residual"] == pytest.approx(2**0.5, abs=1e-3)
    assert found["mean"] == pytest.approx((2 / 3) ** 0.5, abs=1e-3)
    assert found["policies"] == pytest.approx(statistics.stdev((82, 62)), abs=1e-3)


def test_noise_a_lucky_seed_is_no_error_between_policies() -> None:
    rows = [[[], [400, 410, 423], []], [[], [300, 305, 331], []]]
    lucky = [[[], [first, second + 50, third], []] for _, (first, second, third), _ in rows]
    before, after = noise(rows), noise(lucky)
    assert after["seed"] > 2 * before["seed"]
    assert [after[name] for name in ("residual", "mean", "policies")] == [
        before[name] for name in ("residual", "mean", "policies")
    ]


def test_noise_of_the_committed_table() -> None:
    table = json.loads(digits_table.TABLE.read_text())
    assert table["noise"] == noise(table["rows"])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [[list(choices), [400 + i % 50, 410], [700, 700 - i % 7]] for i, choices in enumerate(all_choices())]
    path = tmp_path / "table.json"
    content = {"space": table_space().to_json(), "seeds": 2, "valid_images": 500, "test_images": 797, "rows": rows}
    path.write_text(json.dumps(content))
    return path


def test_tabular_task(table: Path) -> None:
    task = TabularTask(table)
    choices = all_choices()
    for i in (0, 1, 56, 999):
        expected = ((400 + i % 50 + 700) / 1297 + (410 + 700 - i % 7) / 1297) / 2
        assert task.value(choices[i]) == pytest.approx(expected, abs=1e-15)
        assert {task.observe(choices[i], seed) for seed in range(20)} == {(400 + i % 50) / 500, 0.82}
    assert task.optimum == pytest.approx((449 + 700 + 410 + 700) / 1297 / 2, abs=1e-15)
    assert task.observe(choices[3], 5) == task.observe(choices[3], 5)
    with pytest.raises(ValueError, match="must be 33, one a token"):
        task.value((0,))


def test_a_table_of_another_space_is_refused(table: Path) -> None:
    content = json.loads(table.read_text())
    content["space"]["kinds"] = ["off", "tiled"]
    table.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must be the table of digits_table.py's space"):
        TabularTask(table)
