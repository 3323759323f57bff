"""Beam search against all translations there are, against greedy search, and by hand with stated probabilities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch import nn

from autodropout.reproduce.beam_search import LONGER
from autodropout.reproduce.beam_search import beam_search
from autodropout.reproduce.beam_search import divisor
from autodropout.reproduce.beam_search import translate
from autodropout.reproduce.models.transformer import Encoded
from autodropout.reproduce.models.transformer import KeysValues
from autodropout.reproduce.models.transformer import Past
from autodropout.reproduce.models.transformer import Size
from autodropout.reproduce.models.transformer import Transformer
from autodropout.reproduce.sentence_batches import padded
from autodropout.reproduce.subwords import END
from autodropout.reproduce.subwords import START

CPU = torch.device("cpu")
VOCABULARY = 6
WORDS = range(3, VOCABULARY)
SOURCES = [[3, 5, 4, END], [4, END], [5, 5, END]]


def a_model(seed: int) -> Transformer:
    """With weights so large that it prefers something."""
    torch.manual_seed(seed)
    model = Transformer(VOCABULARY, Size(layers=1, width=8, heads=2, inner=8)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


@torch.no_grad()
def log_probability(model: Transformer, source: list[int], words: list[int]) -> float:
    """Of a translation with its `END`, from one pass; padding and the start are nothing that a search says."""
    logits = model(torch.tensor([source]), torch.tensor([[START, *words]]))[0]
    chances = logits.log_softmax(-1)
    return sum(float(chances[place, word]) for place, word in enumerate([*words, END]))


def score(model: Transformer, source: list[int], words: list[int], penalty: float) -> float:
    return log_probability(model, source, words) / ((5 + len(words) + 1) / 6) ** penalty


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_best_of_all(seed: int, penalty: float) -> None:
    """Of all of at most 4 words, of which there are 1 + 3 + 9 + 27, the beam being as wide."""
    model = a_model(seed)
    limits = torch.tensor([4, 3, 4])
    found = beam_search(model, padded(SOURCES), limits, beam=40, penalty=penalty)
    for source, limit, words in zip(SOURCES, limits.tolist(), found, strict=True):
        candidates = [list(c) for length in range(limit) for c in itertools.product(WORDS, repeat=length)]
        scores = {tuple(words): score(model, source, words, penalty) for words in candidates}
        best = max(scores.values())
        # The search has log-probabilities in float32: four of a size below 2^4.
        assert scores[tuple(words)] >= best - 2.0**-17


@pytest.mark.parametrize("seed", range(6))
def test_a_beam_of_one_is_greedy(seed: int) -> None:
    model = a_model(seed)
    found = beam_search(model, padded(SOURCES), torch.tensor([9, 9, 9]), beam=1, penalty=0.6)
    for source, words in zip(SOURCES, found, strict=True):
        expected: list[int] = []
        while len(expected) < 8:
            with torch.no_grad():
                last = model(torch.tensor([source]), torch.tensor([[START, *expected]]))[0, -1]
            chosen = max((END, *WORDS), key=lambda word: float(last[word]))
            if chosen == END:
                break
            expected.append(chosen)
        assert words == expected


@pytest.mark.parametrize("beam", [2, 3, 5])
def test_a_batch_is_its_sentences_and_no_beam_is_better_than_all(beam: int) -> None:
    for seed in range(4):
        model = a_model(seed)
        found = beam_search(model, padded(SOURCES), torch.tensor([5, 5, 5]), beam, 0.6)
        for source, words in zip(SOURCES, found, strict=True):
            assert beam_search(model, torch.tensor([source]), torch.tensor([5]), beam, 0.6) == [words]
            assert len(words) <= 4


class Chances(nn.Module):
    """Stands in for the network: the probability of a word depends on the one before."""

    def __init__(self, table: dict[int, dict[int, float]]) -> None:
        super().__init__()
        self.rows = torch.zeros(VOCABULARY, VOCABULARY)
        for before, chances in table.items():
            self.rows[before] = -torch.inf
            for word, chance in chances.items():
                self.rows[before, word] = math.log(chance)
        self.steps = 0

    def encode(self, source: Tensor) -> Encoded:
        return Encoded(torch.zeros(len(source), 1, 1), torch.zeros(len(source), 1, 1, 1, dtype=torch.bool))

    def decode(self, words: Tensor, encoded: Encoded, past: list[Past] | None) -> tuple[Tensor, list[Past]]:
        self.steps += 1
        nothing = KeysValues(torch.zeros(len(words), 1), torch.zeros(len(words), 1))
        return self.rows[words], [Past(nothing, nothing)]


# Greedy goes along 3, which then is spread thin; 4 is followed by 5 for sure.
GARDEN = Chances(
    {
        START: {3: 0.55, 4: 0.44, 5: 0.01},
        3: {3: 0.3, 4: 0.3, 5: 0.3, END: 0.1},
        4: {5: 1.0},
        5: {END: 0.9, 3: 0.1},
    }
)


def searched(beam: int, penalty: float = 0.0, limit: int = 10) -> list[int]:
    (found,) = beam_search(GARDEN, torch.tensor([[3]]), torch.tensor([limit]), beam, penalty)  # type: ignore[arg-type]
    return found


def test_two_beginnings_by_hand() -> None:
    """Along 4, 5: 0.44 * 1 * 0.9 = 0.396. Along 3, 3: 0.55 * 0.3 and less. Greedy takes the first of equals and ends
    where its limit is."""
    assert searched(beam=2) == [4, 5]
    assert searched(beam=1)[0] == 3


def test_the_limit_forces_the_end() -> None:
    """With one word, `END` at once has no chance at all; with two, 3 then `END` has 0.055, 5 then `END` 0.009."""
    assert searched(beam=3, limit=1) == []
    assert searched(beam=3, limit=2) == [3]
    assert searched(beam=3, limit=3) == [4, 5]


def test_it_stops_when_nothing_can_become_better() -> None:
    GARDEN.steps = 0
    assert searched(beam=2, limit=100) == [4, 5]
    # 0.396 after three words; what is left has at most 0.55 * 0.3 = 0.165.
    assert GARDEN.steps == 3


def test_the_length_penalty_by_hand() -> None:
    assert divisor(1, 0.6) == 1
    assert divisor(7, 1.0) == pytest.approx(2)
    assert divisor(19, 0.5) == pytest.approx(2)
    # 3 and `END`: log 0.4 = -0.916, by (7/6)^2 -0.673. 4, 5 and `END`: log 0.3 = -1.204, by (8/6)^2 -0.677. 4, 5, 3 and
    # `END`: the same, by (9/6)^2 -0.535.
    table = {START: {3: 0.4, 4: 0.6}, 3: {END: 1.0}, 4: {5: 1.0}, 5: {END: 0.5, 3: 0.5}}
    long = Chances(table)
    (short,) = beam_search(long, torch.tensor([[3]]), torch.tensor([9]), 4, 0.0)  # type: ignore[arg-type]
    (longer,) = beam_search(long, torch.tensor([[3]]), torch.tensor([9]), 4, 2.0)  # type: ignore[arg-type]
    assert short == [3]
    assert longer == [4, 5, 3]


def test_translations_come_in_the_order_of_their_sources() -> None:
    model = a_model(1).train()
    found = translate(model, SOURCES, batch_words=4, beam=2, penalty=0.6, device=CPU)
    assert model.training
    model.eval()
    for source, words in zip(SOURCES, found, strict=True):
        assert beam_search(model, torch.tensor([source]), torch.tensor([len(source) + LONGER]), 2, 0.6) == [words]


@pytest.mark.parametrize(("beam", "limit", "message"), [(0, 3, "beam must be at least 1, got 0"), (1, 0, "limits")])
def test_bad_arguments_are_named(beam: int, limit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        beam_search(a_model(0), torch.tensor([[3, END]]), torch.tensor([limit]), beam, 0.6)
