"""The encoder-decoder Transformer for translation (Vaswani et al. 2017, arXiv 1706.03762).

Post-norm as there: each part of a layer is followed by a sum with its input and a layer norm. One matrix is the
embedding of source and target words and the weights of the softmax (section 3.4). Every attention and every
feed-forward part has the `PatternSite`s of `transformer_xl`, so that policies for language models fit:

    query, key, value   what the three projections give, by head
    softmax             the attention weights
    output              the output projection, before it is added to the layer's input
    feed_forward        the hidden layer of the feed-forward part
    residual            the output of the feed-forward part, before it is added

A decoder's layer has the first five twice: `self_attention` over the words before, `cross_attention` over the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn

from autodropout.nn import Dropout
from autodropout.nn import PatternSite
from autodropout.nn import SoftmaxSite
from autodropout.nn import VariationalDropout

from .transformer_xl import sinusoids

PAD = 0  # the word that fills up the shorter sentences of a batch, at their ends


@dataclass(frozen=True)
class Size:
    """`layers`: of the encoder, and as many of the decoder."""

    layers: int
    width: int
    heads: int
    inner: int

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and divisible by heads ({self.heads}), got {self.width}")


BASE = Size(layers=6, width=512, heads=8, inner=2048)  # the "base" model of table 3 of the paper


class KeysValues(NamedTuple):
    """Both (N, heads, K, C / heads)."""

    keys: Tensor
    values: Tensor


class Past(NamedTuple):
    """What a decoder's layer keeps for the words to come: `own` of the words so far, `source` of the source's words."""

    own: KeysValues
    source: KeysValues


class Encoded(NamedTuple):
    """`states` (N, S, C) of the encoder's last layer; `hidden` (N, 1, 1, S) bool, True where there is no word."""

    states: Tensor
    hidden: Tensor


class Attention(nn.Module):
    """softmax(q k / sqrt(C / heads)) v by head (section 3.2), x being (N, T, C)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.to_query = nn.Linear(size.width, size.width, bias=False)
        self.to_key = nn.Linear(size.width, size.width, bias=False)
        self.to_value = nn.Linear(size.width, size.width, bias=False)
        self.to_output = nn.Linear(size.width, size.width, bias=False)
        self.query = PatternSite("query", "NHTD")
        self.key = PatternSite("key", "NHTD")
        self.value = PatternSite("value", "NHTD")
        self.softmax = SoftmaxSite()
        self.output = PatternSite("output", "NTC")

    def keys_values(self, x: Tensor) -> KeysValues:
        """Of the words that may be looked at."""
        return KeysValues(self.key(self._heads(self.to_key(x))), self.value(self._heads(self.to_value(x))))

    def forward(self, x: Tensor, seen: KeysValues, hidden: Tensor) -> Tensor:
        """`hidden`: bool, broadcast to (N, heads, T, K), True where a word must not be looked at. Each sees some."""
        query = self.query(self._heads(self.to_query(x)))
        scores = query @ seen.keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = self.softmax(scores.masked_fill(hidden, -torch.inf))
        attended = (weights @ seen.values).transpose(1, 2).flatten(2)
        y: Tensor = self.output(self.to_output(attended))
        return y

    def _heads(self, x: Tensor) -> Tensor:
        y: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return y


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, word by word (section 3.3)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.up = nn.Linear(size.width, size.inner)
        self.feed_forward = PatternSite("feed_forward", "NTC")
        self.down = nn.Linear(size.inner, size.width)
        self.residual = PatternSite("residual", "NTC")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.residual(self.down(self.feed_forward(F.relu(self.up(x)))))
        return y


class EncoderLayer(nn.Module):
    """Attention over the whole sentence, and the feed-forward part."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.self_attention = Attention(size)
        self.norm_self = nn.LayerNorm(size.width)
        self.feed_forward = FeedForward(size)
        self.norm_feed_forward = nn.LayerNorm(size.width)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        x = self.norm_self(x + self.self_attention(x, self.self_attention.keys_values(x), hidden))
        y: Tensor = self.norm_feed_forward(x + self.feed_forward(x))
        return y


class DecoderLayer(nn.Module):
    """Attention over the words so far, attention over the source, and the feed-forward part."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.self_attention = Attention(size)
        self.norm_self = nn.LayerNorm(size.width)
        self.cross_attention = Attention(size)
        self.norm_cross = nn.LayerNorm(size.width)
        self.feed_forward = FeedForward(size)
        self.norm_feed_forward = nn.LayerNorm(size.width)

    def forward(self, x: Tensor, encoded: Encoded, later: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """`later` (T, P + T) bool: True where a word comes after the query; P words are in the past."""
        own = self.self_attention.keys_values(x)
        if past is not None:
            own = KeysValues(*(torch.cat(pair, dim=2) for pair in zip(past.own, own, strict=True)))
        x = self.norm_self(x + self.self_attention(x, own, later))
        source = self.cross_attention.keys_values(encoded.states) if past is None else past.source
        x = self.norm_cross(x + self.cross_attention(x, source, encoded.hidden))
        return self.norm_feed_forward(x + self.feed_forward(x)), Past(own, source)


class Stack(nn.Module):
    """Only a name: the paths of its layers begin with that of the encoder or the decoder."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Transformer(nn.Module):
    """The translation model. Weights come from PyTorch's default generator.

    Linear layers are initialised as Glorot and Bengio have it, embeddings with a variance of 1 / width, so that scaled
    by the square root of the width, as in the paper, they are as large as the sinusoids of the positions.

    Args:
        vocabulary: how many words source and target have together, `PAD` included.
        size: of the network.
        dropout: rate on the embedded words, positions added, of both sides: no place of a policy.
        variational: whether one decision there holds for all words of a sentence (Gal & Ghahramani 2016).

    Raises:
        ValueError: `vocabulary` below 2; as `Size`.
    """

    def __init__(self, vocabulary: int, size: Size, dropout: float = 0.0, variational: bool = False) -> None:
        super().__init__()
        if vocabulary < 2:
            raise ValueError(f"vocabulary must be at least 2, got {vocabulary}")
        self.size = size
        self.embedding = nn.Embedding(vocabulary, size.width)
        self.dropout = (VariationalDropout if variational else Dropout)(dropout)
        self.encoder = Stack([EncoderLayer(size) for _ in range(size.layers)])
        self.decoder = Stack([DecoderLayer(size) for _ in range(size.layers)])
        nn.init.normal_(self.embedding.weight, std=size.width**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, source: Tensor, words: Tensor) -> Tensor:
        """Logits of the words that follow.

        Args:
            source: (N, S) int64, each sentence padded at its end, none empty.
            words: (N, T) int64, likewise. What stands after a word has no influence on what is predicted there.

        Returns:
            (N, T, vocabulary).
        """
        return self.decode(words, self.encode(source))[0]

    def encode(self, source: Tensor) -> Encoded:
        """`source` as in `forward`."""
        hidden = (source == PAD)[:, None, None]
        x = self._embedded(source, first=0)
        for layer in self.encoder.layers:
            x = layer(x, hidden)
        return Encoded(x, hidden)

    def decode(self, words: Tensor, encoded: Encoded, past: list[Past] | None = None) -> tuple[Tensor, list[Past]]:
        """Logits (N, T, vocabulary) of what follows each of `words` (N, T), and the past with them in it.

        `past`: of the words before, layer by layer, as the call with these returned it; None at the beginning.
        """
        before = 0 if past is None else past[0].own.keys.shape[2]
        length = words.shape[1]
        later = torch.ones(length, before + length, dtype=torch.bool, device=words.device).triu(before + 1)
        x = self._embedded(words, before)
        passed = []
        for number, layer in enumerate(self.decoder.layers):
            x, kept = layer(x, encoded, later, None if past is None else past[number])
            passed.append(kept)
        return F.linear(x, self.embedding.weight), passed

    def _embedded(self, words: Tensor, first: int) -> Tensor:
        """Words at the positions `first`, `first` + 1, ..."""
        embedded: Tensor = self.embedding(words) * self.size.width**0.5
        positions = sinusoids(first + words.shape[1], self.size.width, words.device).flip(0)[first:]
        y: Tensor = self.dropout(embedded + positions.to(embedded.dtype))
        return y
