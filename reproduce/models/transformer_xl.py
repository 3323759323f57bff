"""Transformer-XL, a language model with segment recurrence and relative positions (Dai et al. 2019, arXiv 1901.02860).

Each layer is attention and a feed-forward part, each followed by a sum with its input and a layer norm, as there. Its
places are `PatternSite`s, so that a policy finds them (Pham & Le 2021 name the first six; where exactly they are is
our reading):

    query, key, value   what the three projections give, by head; keys and values of the memory too
    softmax             the attention weights
    output              the output projection, before it is added to the layer's input
    residual            the output of the feed-forward part, before it is added: "residual dropout" of Vaswani et al.
                        2017, which in the attention part is the same as `output`
    feed_forward        the hidden layer of the feed-forward part; ours, off in the paper's setting
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn

from autodropout.nn import Dropout
from autodropout.nn import PatternSite
from autodropout.nn import SoftmaxSite
from autodropout.nn import VariationalDropout

INIT_STD = 0.02  # of all weights, as in the authors' code


@dataclass(frozen=True)
class Size:
    """`cutoffs`: of the vocabulary, for an adaptive softmax (words by falling frequency), those that it reaches; none:
    a full one, whose weights are those of the embedding."""

    layers: int
    width: int
    heads: int
    inner: int
    cutoffs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and divisible by heads ({self.heads}), got {self.width}")


# 24 million parameters with 10,000 words. The paper's own table says 24M and no more; depth, heads and the proportions
# are those of the authors' WikiText-103 model.
PENN_TREEBANK = Size(layers=16, width=360, heads=10, inner=900)


class RelativeAttention(nn.Module):
    """Causal attention with a memory, over relative positions (section 3.3 of the paper).

    The score of a query at position i and a key at position j <= i is

        ((q_i + u) . k_j + (q_i + v) . r_{i-j}) / sqrt(width / heads),

    r_d = W_r s_d with the sinusoids s_d of the distance d. u and v are of each layer.

    x is (N, T, C), memory (N, M, C); the result is (N, T, C).
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.to_query = nn.Linear(size.width, size.width, bias=False)
        self.to_key = nn.Linear(size.width, size.width, bias=False)
        self.to_value = nn.Linear(size.width, size.width, bias=False)
        self.to_position = nn.Linear(size.width, size.width, bias=False)
        self.to_output = nn.Linear(size.width, size.width, bias=False)
        self.u = nn.Parameter(torch.zeros(size.heads, 1, size.width // size.heads))
        self.v = nn.Parameter(torch.zeros(size.heads, 1, size.width // size.heads))
        self.query = PatternSite("query", "NHTD")
        self.key = PatternSite("key", "NHTD")
        self.value = PatternSite("value", "NHTD")
        self.softmax = SoftmaxSite()
        self.output = PatternSite("output", "NTC")

    def forward(self, x: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        """`positions`: (M + T, C), the sinusoids of the distances M + T - 1, ..., 0."""
        seen = torch.cat((memory, x), dim=1)
        query = self.query(self._heads(self.to_query(x)))
        key = self.key(self._heads(self.to_key(seen)))
        value = self.value(self._heads(self.to_value(seen)))
        position = self._heads(self.to_position(positions)[None])
        by_content = (query + self.u) @ key.transpose(-1, -2)
        by_distance = shifted((query + self.v) @ position.transpose(-1, -2))
        scores = (by_content + by_distance) * query.shape[-1] ** -0.5
        later = torch.ones(x.shape[1], seen.shape[1], dtype=torch.bool, device=x.device).triu(memory.shape[1] + 1)
        weights = self.softmax(scores.masked_fill(later, -torch.inf))
        attended = (weights @ value).transpose(1, 2).flatten(2)
        y: Tensor = self.output(self.to_output(attended))
        return y

    def _heads(self, x: Tensor) -> Tensor:
        y: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return y


def shifted(scores: Tensor) -> Tensor:
    """From columns by falling distance, K - 1, ..., 0, to columns by key: `[t, j]` becomes `scores[t, j + T - 1 - t]`.

    scores is (..., T, K); queries are the last T of the K positions. What lies after a query is meaningless. (Appendix
    B of the paper: with a column of padding in front, row t of the result begins T - 1 - t columns further on.)
    """
    queries, keys = scores.shape[-2:]
    padded = F.pad(scores, (1, 0)).flatten(-2)
    by_key: Tensor = padded[..., queries:].unflatten(-1, (queries, keys))
    return by_key


class Layer(nn.Module):
    """Attention and the feed-forward part."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention = RelativeAttention(size)
        self.norm_attention = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, size.inner)
        self.feed_forward = PatternSite("feed_forward", "NTC")
        self.down = nn.Linear(size.inner, size.width)
        self.residual = PatternSite("residual", "NTC")
        self.norm_feed_forward = nn.LayerNorm(size.width)

    def forward(self, x: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        x = self.norm_attention(x + self.attention(x, memory, positions))
        hidden = self.feed_forward(F.relu(self.up(x)))
        y: Tensor = self.norm_feed_forward(x + self.residual(self.down(hidden)))
        return y


class TransformerXL(nn.Module):
    """The language model. Weights come from PyTorch's default generator.

    Args:
        vocabulary: how many words.
        size: of the network.
        dropout: rate on the embedded words and on what the last layer gives, which are no places of a policy.
        variational: whether one decision there holds for all words of a segment (Gal & Ghahramani 2016).

    Raises:
        ValueError: `vocabulary` below 2; as `Size`.
    """

    def __init__(self, vocabulary: int, size: Size, dropout: float = 0.0, variational: bool = False) -> None:
        super().__init__()
        if vocabulary < 2:
            raise ValueError(f"vocabulary must be at least 2, got {vocabulary}")
        self.size = size
        kind = VariationalDropout if variational else Dropout
        self.embedding = nn.Embedding(vocabulary, size.width)
        self.dropout_in = kind(dropout)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.dropout_out = kind(dropout)
        cutoffs = [cutoff for cutoff in size.cutoffs if cutoff < vocabulary]
        self.adaptive = (
            nn.AdaptiveLogSoftmaxWithLoss(size.width, vocabulary, cutoffs, div_value=4.0) if cutoffs else None
        )
        self.bias = None if cutoffs else nn.Parameter(torch.zeros(vocabulary))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, words: Tensor, targets: Tensor, memories: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Negative log-likelihoods of the targets, in nats, and what each layer was given: the memory of later calls.

        Args:
            words: (N, T) int64.
            targets: (N, T) int64, the word after each.
            memories: (layers, N, M, C), the latest words last; None: M = 0.

        Returns:
            (N, T), and (layers, N, M + T, C) without gradient.
        """
        if memories is None:
            memories = self.embedding.weight.new_zeros(self.size.layers, len(words), 0, self.size.width)
        x = self.dropout_in(self.embedding(words) * self.size.width**0.5)
        positions = sinusoids(memories.shape[2] + words.shape[1], self.size.width, x.device).to(x.dtype)
        kept = []
        for layer, memory in zip(self.layers, memories, strict=True):
            kept.append(torch.cat((memory, x.detach()), dim=1))
            x = layer(x, memory, positions)
        return self._losses(self.dropout_out(x), targets), torch.stack(kept)

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        if self.adaptive is not None:
            log_probs: Tensor = self.adaptive(x.flatten(0, 1), targets.flatten()).output
            return -log_probs.view_as(targets)
        logits = F.linear(x, self.embedding.weight, self.bias)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def sinusoids(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """(length, width) float32: sines, then cosines, of the distances length - 1, ..., 0 at falling frequencies."""
    distances = torch.arange(length - 1, -1, -1.0, device=device)
    frequencies = 10_000.0 ** -(torch.arange(0, width, 2.0, device=device) / width)
    angles = distances[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
