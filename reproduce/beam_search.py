"""Beam search: the translation that a model finds best, among the few beginnings that it keeps.

A translation y of a sentence is scored as by Wu et al. 2016 (arXiv 1609.08144, section 7), without their coverage:

    log P(y) / ((5 + |y|) / 6) ** penalty,

|y| counting `END`. In every step the `beam` best continuations are kept; those that end are finished and no longer
extended, and continuations of the others fill their places in the next step, so that the beam does not narrow as that
of Sutskever et al. 2014 does. A search ends when nothing is left to extend or no extension can score better than what
is finished, which is exact: log P only falls, and the divisor only grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .models.transformer import Encoded
from .models.transformer import KeysValues
from .models.transformer import Past
from .models.transformer import Transformer
from .sentence_batches import batches_of
from .sentence_batches import padded
from .subwords import END
from .subwords import SPECIAL
from .subwords import START

LONGER = 50  # words that a translation may have more than its source, as in Vaswani et al. 2017, section 6.1


@torch.inference_mode()
def beam_search(model: Transformer, source: Tensor, limits: Tensor, beam: int, penalty: float) -> list[list[int]]:
    """Translations, without `END`.

    Args:
        model: in evaluation mode.
        source: (N, S) int64, padded.
        limits: (N,) int64: words that each translation may have at most, with `END`, which is forced there; at least 1.
        beam: kept beginnings, at least 1. With 1 it is greedy search.
        penalty: exponent of the length; 0: plain log-probability.

    Raises:
        ValueError: `beam` or a limit below 1.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    if int(limits.min()) < 1:
        raise ValueError(f"limits must be at least 1, got {int(limits.min())}")
    count, device = len(source), source.device
    encoded = model.encode(source.repeat_interleave(beam, 0))
    # Of the sentences still searched: which they are, the log-probabilities of their beginnings (N, beam; at first all
    # are the same, and one of them counts), the beginnings (N, beam, words), and the best finished score of each.
    left = torch.arange(count, device=device)
    scores = torch.full((count, beam), -torch.inf, device=device)
    scores[:, 0] = 0
    words = torch.full((count, beam, 1), START, device=device)
    finished = torch.full((count,), -torch.inf, device=device)
    past: list[Past] | None = None
    found: list[list[int]] = [[] for _ in range(count)]
    while len(left):
        logits, past = model.decode(words[:, :, -1:].flatten(0, 1), encoded, past)
        nexts = logits[:, 0].float().log_softmax(-1).unflatten(0, (-1, beam))
        nexts[:, :, [word for word in range(SPECIAL) if word != END]] = -torch.inf
        length = words.shape[2]  # of the translations with the word to come
        forced = limits[left] == length
        nexts[forced, :, :END] = -torch.inf
        nexts[forced, :, END + 1 :] = -torch.inf
        scores, chosen = (scores[:, :, None] + nexts).flatten(1).topk(beam)
        origin, word = chosen // nexts.shape[2], chosen % nexts.shape[2]
        words = torch.cat((words.gather(1, origin[:, :, None].expand(-1, -1, length)), word[:, :, None]), dim=2)

        ended = word == END
        best, place = torch.where(ended, scores / divisor(length, penalty), -torch.inf).max(1)
        for row in (best > finished).nonzero()[:, 0].tolist():
            found[int(left[row])] = words[row, int(place[row]), 1:-1].tolist()
        finished = torch.maximum(finished, best)
        scores = scores.masked_fill(ended, -torch.inf)
        searched = scores.max(1).values / divisor(limits[left], penalty) > finished

        rows = (origin + beam * torch.arange(len(left), device=device)[:, None])[searched].flatten()
        left, scores, words, finished = left[searched], scores[searched], words[searched], finished[searched]
        past = [Past(*(KeysValues(*(t[rows] for t in pair)) for pair in layer)) for layer in past]
        encoded = Encoded(*(t[rows] for t in encoded))
    return found


def divisor(length: int | Tensor, penalty: float) -> float | Tensor:
    """Of the log-probability of a translation with so many words."""
    quotient: float | Tensor = ((5 + length) / 6) ** penalty
    return quotient


def translate(
    model: Transformer, sources: list[list[int]], batch_words: int, beam: int, penalty: float, device: torch.device
) -> list[list[int]]:
    """The translations of encoded sentences, in their order; like ones together, at most `batch_words` with padding
    (one sentence at least). In evaluation mode and full precision."""
    training = model.training
    model.eval()
    order = sorted(range(len(sources)), key=lambda number: len(sources[number]))
    results: list[list[int]] = [[] for _ in sources]
    for batch in batches_of(order, [len(source) for source in sources], batch_words):
        lengths = torch.tensor([len(sources[number]) for number in batch], device=device)
        source = padded([sources[number] for number in batch]).to(device)
        for number, words in zip(batch, beam_search(model, source, lengths + LONGER, beam, penalty), strict=True):
            results[number] = words
    model.train(training)
    return results
