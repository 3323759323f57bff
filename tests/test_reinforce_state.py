"""The same calls give the same bits, from any state, and wrong arguments are refused."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import torch
from reinforce_cases import play
from reinforce_cases import reward_of
from reinforce_cases import samples_of
from small_spaces import arms
from small_spaces import sites

from autodropout.search.core import Search
from autodropout.search.reinforce import BLOCK
from autodropout.search.reinforce import ControllerSearcher
from autodropout.search.searcher import Sample


def test_a_proposal_depends_on_state_and_number_alone() -> None:
    one, two = ControllerSearcher(sites(2), seed=4), ControllerSearcher(sites(2), seed=4)
    numbers = [*range(BLOCK + 5)]
    forward = {number: one.propose(number) for number in numbers}
    backward = {number: two.propose(number) for number in reversed(numbers)}
    assert forward == backward
    # Off is a third of each site, so some sequences come twice.
    assert len({proposal.choices for proposal in forward.values()}) > 15


@pytest.mark.parametrize("stop", [3, 16, 37])
def test_going_on_from_a_state_gives_the_same_bits(stop: int) -> None:
    """In the middle of a block, of a batch, with trials unfinished; PyTorch's generator and threads differ, too."""

    def fresh() -> Search:
        return Search(ControllerSearcher(sites(2), seed=2, batch_size=4, epochs=2))

    def told(search: Search, tells: int) -> list[Any]:
        seen: list[Any] = []
        for _ in range(tells):
            while len(search.unfinished) < 6:
                seen.append(search.ask())
            number = sorted(search.unfinished)[search.asked * 7 % 6]
            seen.append(search.tell(number, reward_of(search.unfinished[number].choices)))
        return seen

    uninterrupted = fresh()
    told(uninterrupted, stop)
    uninterrupted.ask()
    file = io.BytesIO()
    torch.save(uninterrupted.state_dict(), file)
    expected = told(uninterrupted, 30)

    threads = torch.get_num_threads()
    torch.manual_seed(99)
    generator = torch.get_rng_state()
    torch.set_num_threads(threads % 2 + 1)
    try:
        file.seek(0)
        resumed = fresh()
        told(resumed, 5)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert told(resumed, 30) == expected
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same(resumed.state_dict(), uninterrupted.state_dict())


def assert_same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        for left, right in zip(one, two, strict=True):
            assert_same(left, right)
    else:
        assert one == two


def test_a_state_is_a_copy() -> None:
    searcher = ControllerSearcher(sites(1), batch_size=4)
    play(Search(searcher), reward_of, trials=4)
    state = searcher.state_dict()
    head = state["controller"]["head"].clone()
    moment = state["optimizer"]["state"][0]["exp_avg"].clone()
    play(Search(searcher), reward_of, trials=8)
    assert torch.equal(state["controller"]["head"], head)
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], moment)


def test_settings_make_the_same_searcher() -> None:
    one = ControllerSearcher(sites(1), seed=3, batch_size=4, learning_rate=1, entropy_half_life=9, epochs=2)
    settings = json.loads(json.dumps(one.settings()))
    two = ControllerSearcher(sites(1), **settings)
    assert two.settings() == one.settings() == settings
    assert play(Search(one), reward_of, trials=8) == play(Search(two), reward_of, trials=8)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("entropy_coefficient", -0.1),
        ("entropy_half_life", 0.0),
        ("baseline_decay", 1.5),
        ("weight_clip", 0.5),
        ("gradient_clip", math.nan),
        ("epochs", 0),
        ("ratio_clip", -1.0),
        ("elites", 0),
        ("elite_coefficient", -1.0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be"):
        ControllerSearcher(arms(2), **{setting: value})


def test_wrong_samples_are_refused() -> None:
    searcher = ControllerSearcher(arms(2), batch_size=2)
    with pytest.raises(ValueError, match="samples must be 2, the batch size, got 1"):
        searcher.update(samples_of([(0,)], (1.0,), (0,), (0.0,)))
    stale = [Sample(0, (0,), None, 1.0, 0), Sample(8, (1,), None, 1.0, 1)]
    before = searcher.state_dict()
    with pytest.raises(ValueError, match="log_prob, got None for trial 8 of age 1"):
        searcher.update(stale)
    assert_same(searcher.state_dict(), before)
    with pytest.raises(ValueError, match="choices"):
        searcher.update(samples_of([(0,), (2,)], (1.0, 0.0), (0, 0), (0.0, 0.0)))
    assert_same(searcher.state_dict(), before)
