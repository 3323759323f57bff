"""Sentences as numbers: byte-pair encoding (Sennrich et al. 2016) by `tokenizers`, learned from a corpus, kept nowhere.

It works on bytes, so that there are no unknown words, and decoding gives back every text to the letter that does not
begin with a blank. It never joins what a blank or punctuation separates. Source and target share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from itertools import chain
from itertools import islice

from tokenizers import Tokenizer
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

from .models.transformer import PAD
from .parallel_corpus import Pairs

START, END = 1, 2  # stand before the first word of a target and after the last word of every sentence
SPECIAL = 1 + max(PAD, START, END)
BYTES = 256
# Of `tokenizers`, at once: its results are Python objects, many times as large as the numbers in them.
CHUNK = 10_000


class Subwords:
    """The encoding of at most `size` words, specials and the 256 bytes included, learned from both sides of `pairs`.

    The same pairs give the same encoding. A merge needs two occurrences, so that a small text may give fewer words.

    Raises:
        ValueError: `size` below 259.
    """

    def __init__(self, pairs: Pairs, size: int) -> None:
        if size < SPECIAL + BYTES:
            raise ValueError(f"size must be at least {SPECIAL + BYTES}, got {size}")
        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        self.tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            # The specials are not the tokenizer's: it would read a "</s>" in a text as one.
            vocab_size=size - SPECIAL,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self.tokenizer.train_from_iterator(chain(pairs.source, pairs.target), trainer)

    def __len__(self) -> int:
        """Of the vocabulary."""
        return SPECIAL + int(self.tokenizer.get_vocab_size())

    def encode(self, sentences: Iterable[str]) -> Iterator[list[int]]:
        """Each with `END` after it."""
        left = iter(sentences)
        while chunk := list(islice(left, CHUNK)):
            for found in self.tokenizer.encode_batch_fast(chunk):
                yield [*(number + SPECIAL for number in found.ids), END]

    def decode(self, sentences: Sequence[Sequence[int]]) -> list[str]:
        """What was encoded, without the blank that the first word begins with; specials are left out."""
        plain = [[number - SPECIAL for number in sentence if number >= SPECIAL] for sentence in sentences]
        return [str(text).removeprefix(" ") for text in self.tokenizer.decode_batch(plain)]
