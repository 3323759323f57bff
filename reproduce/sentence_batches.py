"""Batches of sentences of about one length, a function of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence

import torch
from torch import Tensor

from .augment import derive
from .models.transformer import PAD
from .subwords import END
from .subwords import START


def batches_of(order: Sequence[int], lengths: Sequence[int], words: int) -> list[list[int]]:
    """Cuts `order`, indices into `lengths`, into batches that padded have at most so many words, or one sentence."""
    batches: list[list[int]] = []
    longest = 0
    for number in order:
        longest = max(longest, lengths[number])
        if not batches or longest * (len(batches[-1]) + 1) > words:
            batches.append([])
            longest = lengths[number]
        batches[-1].append(number)
    return batches


def epoch_batches(lengths: Sequence[tuple[int, int]], words: int, seed: int, epoch: int) -> list[list[int]]:
    """Every pair of sentences once, in batches that padded have at most so many words on either side.

    Pairs of the same lengths meet others in every epoch, and the batches come in another order, but the number of
    batches is the same in all epochs and for all seeds.

    Args:
        lengths: of source and target of each pair.
        words: at most in a batch, on either side; a longer pair is a batch by itself.
        seed, epoch: what the order derives from.
    """
    generator = torch.Generator().manual_seed(derive(seed, epoch, "sentences"))
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    # Python's sort is stable: among equals the shuffled order stays.
    order = sorted(shuffled, key=lambda number: (max(lengths[number]), lengths[number]))
    batches = batches_of(order, [max(pair) for pair in lengths], words)
    return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]


def padded(sentences: Sequence[Sequence[int]]) -> Tensor:
    """(N, longest) int64, filled up with `PAD`."""
    rows = [torch.tensor(sentence, dtype=torch.long) for sentence in sentences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def training_batches(
    sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], words: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Source (N, S), the words that a decoder is given (N, T), and those that it should predict (N, T), all padded.

    `sources` and `targets` end with `END`; the rest as in `epoch_batches`.
    """
    lengths = [(len(source), len(target)) for source, target in zip(sources, targets, strict=True)]
    for batch in epoch_batches(lengths, words, seed, epoch):
        target = [targets[number] for number in batch]
        given = padded([[START, *sentence[:-1]] for sentence in target])
        assert all(sentence[-1] == END for sentence in target)
        yield padded([sources[number] for number in batch]), given, padded(target)
