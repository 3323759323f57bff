"""The recipe for language models: its space fits its network, and a trial is a training of table 3's demo."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator

import pytest
import torch

from autodropout import Policy
from autodropout import apply_policy
from autodropout.policy import TOKEN_PLACES
from autodropout.reproduce.corpus import Corpus
from autodropout.reproduce.language_training import build_language_model
from autodropout.reproduce.language_training import example_input
from autodropout.reproduce.language_training import perplexity
from autodropout.reproduce.language_training import train_language_model
from autodropout.reproduce.models.transformer_xl import Size
from autodropout.reproduce.proxy import one_thread
from autodropout.reproduce.recipes import language_model
from autodropout.reproduce.table3_language_model import PRESETS
from autodropout.reproduce.transformer_methods import method_policy
from autodropout.search.token_space import TokenSpace

CPU = torch.device("cpu")
OFF = Policy.uniform(None)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[Corpus]:
    """A made-up text and a small network for it, trained for 5 epochs, with reports every 2."""
    draws = torch.Generator().manual_seed(0)
    parts = [torch.randint(11, (length,), generator=draws) for length in (90, 40, 30)]
    words = ("<eos>", *"abcdefghij")
    corpus = Corpus("made up", words, *parts, fingerprint="0")
    recipe = dataclasses.replace(language_model.RECIPE, size=Size(2, 8, 2, 8), epochs=5, batch_size=3, segment=4)
    monkeypatch.setattr(language_model, "RECIPE", recipe)
    monkeypatch.setattr(language_model, "REPORT_EVERY", 2)
    monkeypatch.setattr(language_model, "open_corpus", lambda source: corpus)
    language_model._corpus.cache_clear()
    yield corpus
    language_model._corpus.cache_clear()


def test_it_is_the_demo_of_table_3() -> None:
    assert PRESETS["demo"].recipe == language_model.RECIPE
    assert method_policy("autodropout", 1.0, OFF)[1] == language_model.OUTSIDE


def test_the_space_has_every_place_of_every_layer_and_fits_the_network() -> None:
    before = torch.get_rng_state()
    space = language_model.space()
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(space, TokenSpace)
    recipe = language_model.RECIPE
    places = [(site.depth, site.place) for site in space.token_sites]
    assert places == [(depth, place) for depth in (0.0, 1.0) for place in TOKEN_PLACES], "layer by layer"
    seen = dict.fromkeys(TOKEN_PLACES, recipe.segment)
    seen |= dict.fromkeys(("key", "value", "softmax"), recipe.segment + recipe.memory)
    assert all(site.length == seen[site.place] for site in space.token_sites)
    for seed in range(3):
        choices = space.sample(random.Random(seed))
        policy = space.decode(choices)
        assert space.encode(policy) == choices
        model = build_language_model(recipe, 50, language_model.OUTSIDE, seed=0)
        applied = apply_policy(model, policy, example_input(recipe))
        assert {site.name: site.pattern for site in applied} == {s.name: s.pattern for s in policy.sites if s.pattern}


def test_a_trial_is_the_validation_loss_of_that_training(tiny: Corpus) -> None:
    policy = language_model.space().decode(language_model.space().sample(random.Random(1)))
    reports: list[tuple[int, float]] = []
    threads = torch.get_num_threads()
    metric = language_model.train(policy, 3, lambda step, value: reports.append((step, value)))
    assert torch.get_num_threads() == threads
    recipe = language_model.RECIPE
    with one_thread():
        model, _ = train_language_model(recipe, policy, language_model.OUTSIDE, tiny.train, tiny.start, 11, 3, CPU)
        expected = perplexity(model, recipe, tiny.valid, tiny.start)
    assert metric == math.log(expected)
    assert [step for step, _ in reports] == [2, 4]
    assert language_model.train(policy, 4, lambda step, value: None) != metric  # the seed counts


@pytest.mark.usefixtures("tiny")
def test_a_report_can_end_a_training() -> None:
    class Stop(BaseException):
        pass

    def stop(step: int, value: float) -> None:
        raise Stop

    with pytest.raises(Stop):
        language_model.train(OFF, 0, stop)
