"""The controller: a decoder-only Transformer that emits the tokens of a policy one by one, like a language model.

The distribution of token t has as its context every choice before it, and what token t is: its position, its site (an
embedding of its own, and a direction for the relative depth of sites) and its kind. Tokens of one kind share a
vocabulary, that of the largest value set among them; a token with fewer values never takes the others. A token that
is not asked takes choice 0 with probability 1: log-probability 0, entropy 0, no gradient.

The paper says "a Transformer" and leaves the rest open. Ours: two layers, width 64, four heads (0.1 million parameters;
a policy of 200 tokens takes milliseconds on one core), pre-norm, GELU, no dropout, no biases but those of the norms and
of the output. The output heads start at zero, so that a fresh controller is exactly uniform over the values of every
token: nothing is preferred before a reward has been seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel

from .space import Choices
from .space import SearchSpace

LAYERS = 2
WIDTH = 64
HEADS = 4


@contextmanager
def isolated() -> Iterator[None]:
    """Arithmetic whatever the process is set to: one CPU thread, full float32 products, one attention, no autocast.

    The order of a sum, and with it the last bit, depends on the number of threads; a search must be the same on every
    resume. The settings found are restored.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _full_products(), torch.autocast("cpu", enabled=False), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _full_products() -> Iterator[None]:
    """Products of float32 in float32 on the CPU.

    Where PyTorch has its newer settings, by those: the older function raises as soon as anyone has used them.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    else:
        before = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def uniforms(seed: int, numbers: Sequence[int], length: int) -> Tensor:
    """(len(numbers), length) float64 numbers in [0, 1): each depends on seed, number and column alone."""
    rows = []
    for number in numbers:
        generator = random.Random(f"{seed}/{number}")
        rows.append([generator.random() for _ in range(length)])
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


class Evaluation(NamedTuple):
    """Of B given sequences of T tokens, each (B, T): log-probabilities of the choices made, entropies (nats) of the
    conditional distributions that they were made from, and whether the token was asked."""

    log_probs: Tensor
    entropies: Tensor
    asked: Tensor


class _Block(nn.Module):
    """Causal attention and an MLP, each on the normalised residual stream."""

    def __init__(self, width: int, heads: int, layers: int, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, dtype=dtype, device="cpu")
        self.norm_mlp = nn.LayerNorm(width, dtype=dtype, device="cpu")
        inner = width**-0.5
        # What is added to the residual stream starts small, by the number of additions (GPT-2's initialisation).
        added = (2 * layers) ** -0.5
        self.qkv = _normal((3 * width, width), inner, generator, dtype)
        self.out = _normal((width, width), inner * added, generator, dtype)
        self.up = _normal((4 * width, width), inner, generator, dtype)
        self.down = _normal((width, 4 * width), 0.5 * inner * added, generator, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width), all tokens at once."""
        return self._rest(x, F.scaled_dot_product_attention(*self._heads(x), is_causal=True))

    def step(self, x: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """(B, 1, width), the token at `position`; its key and value go into caches (B, heads, T, width / heads)."""
        query, key, value = self._heads(x)
        keys[:, :, position : position + 1] = key
        values[:, :, position : position + 1] = value
        scores = query @ keys[:, :, : position + 1].transpose(-1, -2) * query.shape[-1] ** -0.5
        return self._rest(x, scores.softmax(-1) @ values[:, :, : position + 1])

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, width = x.shape
        qkv = F.linear(self.norm_attention(x), self.qkv).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + F.linear(attended.transpose(1, 2).reshape(x.shape), self.out)
        return x + F.linear(F.gelu(F.linear(self.norm_mlp(x), self.up)), self.down)


class Controller(nn.Module):
    """A distribution over the sequences of a space. On the CPU; neither reads nor changes PyTorch's generators.

    Args:
        space: whose sequences.
        seed: of the initial weights.
        layers, width, heads: of the Transformer; `heads` divides `width`.
        dtype: of weights and arithmetic; float64 is for tests.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        layers: int = LAYERS,
        width: int = WIDTH,
        heads: int = HEADS,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide width, got {heads} for width {width}")
        self.space = space
        tokens = space.tokens
        self.heads = heads
        self.length = len(tokens)
        self.kinds = tuple(dict.fromkeys(token.kind for token in tokens))
        sizes = [max(len(token.values) for token in tokens if token.kind == kind) for kind in self.kinds]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.vocabulary = sum(sizes)
        kind_of = [self.kinds.index(token.kind) for token in tokens]
        self._starts = [starts[kind] for kind in kind_of]
        self._counts = [len(token.values) for token in tokens]
        self._most = max(self._counts)
        sites = sorted({token.site for token in tokens})
        site_of = [sites.index(token.site) for token in tokens]

        # Not in the state: they follow from the space.
        self._kind_of = torch.tensor(kind_of, device="cpu")
        self._site_of = torch.tensor(site_of, device="cpu")
        self._depth = torch.tensor(site_of, dtype=dtype, device="cpu")[:, None] / max(1, len(sites) - 1)
        self._start = torch.tensor(self._starts, device="cpu")
        self._count = torch.tensor(self._counts, device="cpu")
        index = torch.arange(self._most, device="cpu")
        self._words = (self._start[:, None] + index).clamp_max(self.vocabulary - 1)
        self._index = index
        # Which choices of the token that `when` names let a token be asked.
        self._allowed = {
            position: torch.tensor([choice in token.when[1] for choice in range(self._most)], device="cpu")
            for position, token in enumerate(tokens)
            if token.when is not None
        }

        generator = torch.Generator("cpu").manual_seed(seed % 2**63)
        # The last row of `choice` is what stands before the first token.
        self.choice = _normal((self.vocabulary + 1, width), 0.5, generator, dtype)
        self.kind = _normal((len(self.kinds), width), 0.5, generator, dtype)
        self.site = _normal((len(sites), width), 0.5, generator, dtype)
        self.depth = _normal((1, width), 0.5, generator, dtype)
        self.position = _normal((self.length, width), 0.5, generator, dtype)
        self.blocks = nn.ModuleList(_Block(width, heads, layers, generator, dtype) for _ in range(layers))
        self.norm = nn.LayerNorm(width, dtype=dtype, device="cpu")
        self.head = nn.Parameter(torch.zeros(self.vocabulary, width, dtype=dtype, device="cpu"))
        self.bias = nn.Parameter(torch.zeros(self.vocabulary, dtype=dtype, device="cpu"))

    def evaluate(self, choices: Sequence[Choices]) -> Evaluation:
        """Log-probabilities and entropies of given sequences, with gradient, all tokens in one pass.

        Raises:
            ValueError: one of them is not a sequence of the space.
        """
        given = torch.tensor([self.space.check(sequence) for sequence in choices], device="cpu")
        asked = torch.tensor([self.space.asked(sequence) for sequence in choices], device="cpu")
        before = F.pad((self._start + given)[:, :-1], (1, 0), value=self.vocabulary)
        x = F.embedding(before, self.choice) + self._what()
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.head, self.bias)
        log_probs = self._log_probs(logits.gather(-1, self._words.expand(len(given), -1, -1)), asked, self._count)
        # An impossible choice has probability 0 and log-probability -inf; its share of the entropy is 0.
        entropies = -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)
        return Evaluation(log_probs.gather(-1, given[..., None])[..., 0], entropies, asked)

    def log_prob(self, choices: Sequence[Choices]) -> Tensor:
        """(B,) natural-log probabilities of the sequences, summed in float64."""
        return self.evaluate(choices).log_probs.double().sum(-1)

    def entropy(self, choices: Sequence[Choices]) -> Tensor:
        """(B, T) entropies, in nats, of the conditional distributions along the sequences."""
        return self.evaluate(choices).entropies

    @torch.no_grad()
    def sample(self, uniforms: Tensor) -> tuple[list[Choices], Tensor]:
        """Sequences, by the inverse of each token's distribution function, and their log-probabilities (B,) in float64.

        Args:
            uniforms: (B, T) in [0, 1); row i alone decides sequence i, up to the rounding of batched products.
        """
        batch = len(uniforms)
        width = self.head.shape[1]
        blocks = cast("list[_Block]", list(self.blocks))
        shape = (len(blocks), batch, self.heads, self.length, width // self.heads)
        keys, values = torch.empty((2, *shape), dtype=self.head.dtype, device="cpu")
        what = self._what()
        given = torch.zeros(batch, self.length, dtype=torch.long, device="cpu")
        asked = torch.ones(batch, self.length, dtype=torch.bool, device="cpu")
        total = torch.zeros(batch, dtype=torch.float64, device="cpu")
        before = torch.full((batch,), self.vocabulary, device="cpu")
        for position, token in enumerate(self.space.tokens):
            x = (F.embedding(before, self.choice) + what[position])[:, None]
            for layer, block in enumerate(blocks):
                x = block.step(x, keys[layer], values[layer], position)
            start, count = self._starts[position], self._counts[position]
            words = slice(start, start + count)
            logits = F.linear(self.norm(x[:, 0]), self.head[words], self.bias[words])
            if token.when is not None:
                earlier, _ = token.when
                asked[:, position] = asked[:, earlier] & self._allowed[position][given[:, earlier]]
            log_probs = self._log_probs(logits, asked[:, position], self._count[position])
            below = log_probs.double().exp().cumsum(-1)
            # The last value takes what rounding leaves, so that the sum of the probabilities need not be exactly 1.
            choice = (below[:, :-1] <= uniforms[:, position : position + 1] * below[:, -1:]).sum(-1)
            given[:, position] = choice.masked_fill(~asked[:, position], 0)
            total += log_probs.gather(-1, given[:, position : position + 1])[:, 0]
            before = start + given[:, position]
        return [tuple(row) for row in given.tolist()], total

    def _what(self) -> Tensor:
        """(T, width): what each token is."""
        return self.position + self.kind[self._kind_of] + self.site[self._site_of] + self._depth * self.depth

    def _log_probs(self, logits: Tensor, asked: Tensor, count: Tensor) -> Tensor:
        """Over the values of each token, -inf for those that it does not have or, not being asked, cannot take."""
        possible = torch.where(asked, count, 1)[..., None]
        index = self._index[: logits.shape[-1]]
        return logits.masked_fill(index >= possible, -torch.inf).log_softmax(-1)


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator, dtype: torch.dtype) -> nn.Parameter:
    """Drawn in float64, so that the weights of every dtype are roundings of the same numbers."""
    return nn.Parameter((torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * std).to(dtype))
