"""The training loop of language models: streams, perplexity by hand, and a continuation that ends in the same bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from autodropout import Policy
from autodropout import load_policy
from autodropout.reproduce.language_training import LanguageRecipe
from autodropout.reproduce.language_training import build_language_model
from autodropout.reproduce.language_training import perplexity
from autodropout.reproduce.language_training import put_policy
from autodropout.reproduce.language_training import segments
from autodropout.reproduce.language_training import streams
from autodropout.reproduce.language_training import train_language_model
from autodropout.reproduce.learning_rates import only_rises
from autodropout.reproduce.learning_rates import warmup_cosine
from autodropout.reproduce.models.transformer_xl import Size
from autodropout.reproduce.models.transformer_xl import TransformerXL
from autodropout.reproduce.transformer_methods import METHODS
from autodropout.reproduce.transformer_methods import STRENGTHS
from autodropout.reproduce.transformer_methods import Outside
from autodropout.reproduce.transformer_methods import method_policy

CPU = torch.device("cpu")
RECIPE = LanguageRecipe(Size(2, 12, 3, 16), 3, 2, 5, 5, 8, 1e-2, 4)
TEXT = torch.randint(9, (61,), generator=torch.Generator().manual_seed(0))
HAND = load_policy("hand-lm-v0")


def test_streams_and_segments() -> None:
    text = streams(torch.arange(7), start=99, count=2)
    assert text.tolist() == [[99, 0, 1, 2], [2, 3, 4, 5]]
    found = [(words.tolist(), targets.tolist()) for words, targets in segments(text, 2)]
    assert found == [([[99, 0], [2, 3]], [[0, 1], [3, 4]]), ([[1], [4]], [[2], [5]])]
    with pytest.raises(ValueError, match="batch_size must be at most 1, the tokens of the text, got 2"):
        streams(torch.arange(1), 0, 2)


def test_learning_rate_by_hand() -> None:
    assert [warmup_cosine(0.01, 4, step, 16) for step in (0, 3)] == [0.0025, 0.01]
    assert warmup_cosine(0.01, 4, 8, 16) == pytest.approx(0.005)
    assert 0 < warmup_cosine(0.01, 4, 15, 16) < 1e-4


def test_a_table_says_if_its_learning_rate_only_rose() -> None:
    assert only_rises(1999, 2000, "steps") == ""
    assert only_rises(2000, 2000, "steps").endswith("only rises: warm-up over 2,000 steps, training over 2,000)")


class Unigram(nn.Module):
    """Stands in for the network: the same probabilities for every word; remembers how much memory it was given."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, 1)
        self.losses = -torch.tensor(probabilities).log()
        self.memories: list[int] = []

    def forward(
        self, words: torch.Tensor, targets: torch.Tensor, memories: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = torch.zeros(1, 1, 0, 1) if memories is None else memories
        self.memories.append(before.shape[2])
        return self.losses[targets], torch.cat((before, torch.zeros(1, 1, words.shape[1], 1)), dim=2)


def test_perplexity_by_hand() -> None:
    """Twelve words of probability 1/2 and one of 1/8: the geometric mean of 1/p is 2^(15/13)."""
    model = Unigram([0.5, 0.125])
    tokens = torch.tensor([0] * 12 + [1])
    found = perplexity(model, RECIPE, tokens, start=1)  # type: ignore[arg-type]
    assert found == pytest.approx(2 ** (15 / 13), rel=1e-6)
    assert model.memories == [0, 5, 8]  # at most `evaluation_memory`


def test_perplexity_of_a_training_that_diverged_is_infinite() -> None:
    for probability in (0.0, math.nan):
        model = Unigram([0.5, probability])
        assert perplexity(model, RECIPE, torch.tensor([0, 1]), start=1) == math.inf  # type: ignore[arg-type]


def test_perplexity_counts_every_word_once_with_its_context() -> None:
    """With a memory as long as the text it is that of one pass."""
    model = build_language_model(RECIPE, 9, Outside(), seed=1)
    words = torch.cat((torch.tensor([3]), TEXT[:8]))[None]
    with torch.no_grad():
        losses, _ = model(words[:, :-1], words[:, 1:])
    assert perplexity(model, RECIPE, TEXT[:8], start=3) == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
    assert model.training


def train(policy: Policy, seed: int = 0, **options: object) -> TransformerXL:
    model, _ = train_language_model(RECIPE, policy, Outside(0.1), TEXT, 3, 9, seed, CPU, **options)  # type: ignore[arg-type]
    return model


def same(one: TransformerXL, two: TransformerXL) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


class KilledError(Exception):
    pass


def test_a_continuation_ends_in_the_same_weights(tmp_path: Path) -> None:
    whole = train(HAND)
    checkpoint = tmp_path / "state.pt"

    def kill(epoch: int, model: TransformerXL) -> None:
        if epoch == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train(HAND, checkpoint=checkpoint, on_model=kill)
    epochs: list[None] = []
    again = train(HAND, checkpoint=checkpoint, on_epoch=lambda: epochs.append(None))
    assert len(epochs) == RECIPE.epochs
    assert same(again, whole)
    assert not same(train(HAND, seed=1), whole)


def test_it_learns() -> None:
    recipe = LanguageRecipe(RECIPE.size, 30, 2, 5, 5, 8, 1e-2, 4)
    pattern = torch.arange(9).repeat(10)
    model, _ = train_language_model(recipe, Policy.uniform(None), Outside(), pattern, 8, 9, 0, CPU)
    assert perplexity(model, recipe, pattern, start=8) < 1.5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_on_the_network(method: str) -> None:
    for strength in STRENGTHS[method] or (None,):
        policy, outside = method_policy(method, strength, HAND)
        model = build_language_model(RECIPE, 9, outside, seed=0)
        keys = list(model.state_dict())
        put_policy(model, policy, RECIPE)
        assert list(model.state_dict()) == keys
        words = torch.randint(9, (2, 5))
        first, second = model(words, words)[0], model(words, words)[0]
        assert torch.equal(first, second) == (method == "none")


def test_methods_by_hand() -> None:
    policy, outside = method_policy("dropout", 0.2, HAND)
    assert [(site.place, site.pattern.expected_rate(50)) for site in policy.sites if site.pattern] == [
        (place, 0.2) for place in ("softmax", "output", "feed_forward", "residual")
    ]
    assert outside == Outside(0.2, False)
    policy, outside = method_policy("variational", 0.3, HAND)
    assert {site.place for site in policy.sites} == {"output", "feed_forward", "residual"}
    assert all(site.pattern.share_t and site.pattern.expected_rate(50) == 0.3 for site in policy.sites)  # type: ignore[union-attr, call-arg, attr-defined]
    assert outside == Outside(0.3, True)
    assert method_policy("autodropout", 0.5, HAND) == (HAND.scaled(0.5), Outside(0.1))
    with pytest.raises(ValueError, match="method must be one of none, dropout, variational, autodropout, got 'x'"):
        method_policy("x", 0.1, HAND)
    with pytest.raises(ValueError, match="strength must be a number"):
        method_policy("dropout", None, HAND)
