"""The contract finds what is wrong: searchers that break one promise each, and the test that says so."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from search_toys import ToySearcher

from autodropout.search.searcher import Proposal
from autodropout.search.searcher import Searcher
from autodropout.search.space import SearchSpace
from autodropout.search.testing import SearcherContract
from autodropout.search.testing import same


class Sound(ToySearcher):
    """Keeps every promise."""

    def propose(self, number: int) -> Proposal:
        return Proposal(super().propose(number).choices)


class Uncanonical(Sound):
    def propose(self, number: int) -> Proposal:
        return Proposal(tuple(random.Random(number).randrange(len(token.values)) for token in self.space.tokens))


class NumpyInts(Sound):
    def propose(self, number: int) -> Proposal:
        return Proposal(tuple(np.int64(choice) for choice in super().propose(number).choices))


class PositiveLogProb(Sound):
    def propose(self, number: int) -> Proposal:
        return Proposal(super().propose(number).choices, 0.5)


class SharedStream(Sound):
    generator = random.Random(0)

    def propose(self, number: int) -> Proposal:
        return Proposal(self.space.sample(self.generator))


class Seedless(Sound):
    def propose(self, number: int) -> Proposal:
        return Proposal(self.space.sample(random.Random(number)))


class GlobalPython(Sound):
    def propose(self, number: int) -> Proposal:
        random.random()
        return super().propose(number)


class GlobalNumpy(Sound):
    def propose(self, number: int) -> Proposal:
        np.random.rand()
        return super().propose(number)


class GlobalTorch(Sound):
    def propose(self, number: int) -> Proposal:
        torch.rand(1)
        return super().propose(number)


class Forgetful(Sound):
    def state_dict(self) -> dict[str, Any]:
        return {"means": [[0.0] * len(means) for means in self.means], "lost": self.lost}


class Aliased(Sound):
    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means, "lost": self.lost}


class Unfileable(Sound):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": random.Random(0)}


class ShortFigures(Sound):
    def update(self, samples: Any) -> dict[str, Any]:
        super().update(samples)
        return {"weights": [1.0]}


class NeedsResults(Sound):
    def propose(self, number: int) -> Proposal:
        if number > 20 and not any(map(any, self.means)):
            raise RuntimeError("nothing to learn from")
        return super().propose(number)


class NeedsDifferentRewards(Sound):
    def update(self, samples: Any) -> dict[str, Any]:
        rewards = [sample.reward for sample in samples]
        1 / (max(rewards) - min(rewards))
        return super().update(samples)


class SettingsWithoutSeed(Sound):
    def settings(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size}


BROKEN = [
    (Uncanonical, "test_proposes_sequences_of_the_space"),
    (NumpyInts, "test_proposes_sequences_of_the_space"),
    (PositiveLogProb, "test_log_probs_are_probabilities_or_none"),
    (SharedStream, "test_same_calls_give_same_proposals_and_state"),
    (Seedless, "test_seeds_differ"),
    (GlobalPython, "test_global_random_numbers_are_left_alone"),
    (GlobalNumpy, "test_global_random_numbers_are_left_alone"),
    (GlobalTorch, "test_global_random_numbers_are_left_alone"),
    (Forgetful, "test_state_goes_on_bit_for_bit"),
    (Aliased, "test_state_goes_on_bit_for_bit"),
    (Unfileable, "test_state_goes_on_bit_for_bit"),
    (ShortFigures, "test_updates_take_batches_of_any_age"),
    (NeedsResults, "test_nothing_but_failures"),
    (NeedsDifferentRewards, "test_any_finite_reward"),
    (SettingsWithoutSeed, "test_settings_make_it_again"),
]


def contract_of(searcher: type[Searcher]) -> SearcherContract:
    class Contract(SearcherContract):
        def make(self, space: SearchSpace, seed: int) -> Searcher:
            return searcher(space, seed)

    return Contract()


class TestSound(SearcherContract):
    def make(self, space: SearchSpace, seed: int) -> Searcher:
        return Sound(space, seed)


@pytest.mark.parametrize(("searcher", "test"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_promises_are_found(searcher: type[Searcher], test: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011  # most are AssertionError, some the searcher's own
        getattr(contract_of(searcher), test)()


def test_every_promise_is_broken_by_somebody() -> None:
    assert {test for _, test in BROKEN} == {name for name in dir(SearcherContract) if name.startswith("test_")}


def test_states_are_compared_bit_for_bit() -> None:
    states: list[Any] = [
        {"x": [1, 2.0]},
        {"x": (1, 2.0)},
        {"x": [1.0, 2.0]},
        {"x": [True, 2.0]},
        {"x": [1, 2.0], "y": None},
        {"x": [1, float("nan")]},
        {"x": 0.0},
        {"x": -0.0},
        {"x": torch.tensor([1.0, float("nan")])},
        {"x": torch.tensor([1.0, float("nan")], dtype=torch.float64)},
        {"x": torch.tensor([[1.0, float("nan")]])},
        {"x": torch.tensor([-0.0])},
        {"x": torch.tensor([0.0])},
        {"x": "a"},
    ]
    for (i, a), (j, b) in itertools.product(enumerate(states), enumerate(states)):
        assert same(a, b) == (i == j)
