"""Trains one Transformer-XL, whose memory is empty at the beginning of an epoch; see epochs.py for checkpoints and for
exact continuation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autodropout import Policy
from autodropout import apply_policy

from .augment import derive
from .epochs import Part
from .epochs import run_epochs
from .learning_rates import warmup_cosine
from .models.transformer_xl import Size
from .models.transformer_xl import TransformerXL
from .transformer_methods import Outside

LARGEST = 700.0  # of a mean loss whose exp is a number
CLIP = 0.25  # norm of the gradient, as in the authors' code


@dataclass(frozen=True)
class LanguageRecipe:
    """What determines a training besides corpus, policy and seed.

    Adam, learning rate up to `learning_rate` along a line over `warmup` steps, then as in `warmup_cosine`; gradients
    clipped to a norm of 0.25. In evaluation the memory has `evaluation_memory` words, in training `memory`.
    """

    size: Size
    epochs: int
    batch_size: int
    segment: int
    memory: int
    evaluation_memory: int
    learning_rate: float
    warmup: int


def build_language_model(recipe: LanguageRecipe, vocabulary: int, outside: Outside, seed: int) -> TransformerXL:
    """The network of the recipe, its weights a function of `seed` alone."""
    torch.manual_seed(derive(seed, "weights"))
    return TransformerXL(vocabulary, recipe.size, outside.rate, outside.variational)


def put_policy(model: TransformerXL, policy: Policy, recipe: LanguageRecipe) -> None:
    """Puts a policy on a model that has none; its rates are checked on a segment with its memory."""
    if any(site.pattern is not None for site in policy.sites):
        apply_policy(model, policy, example=example_input(recipe))


def example_input(recipe: LanguageRecipe) -> tuple[Tensor, Tensor, Tensor]:
    """A segment with its memory, from which `find_sites` and `apply_policy` learn the lengths."""
    words = torch.zeros(1, recipe.segment, dtype=torch.long)
    return words, words, torch.zeros(recipe.size.layers, 1, recipe.memory, recipe.size.width)


def train_language_model(
    recipe: LanguageRecipe,
    policy: Policy,
    outside: Outside,
    train: Tensor,
    start: int,
    vocabulary: int,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    on_epoch: Callable[[], None] = lambda: None,
    on_model: Callable[[int, TransformerXL], None] = lambda epoch, model: None,
) -> tuple[TransformerXL, float]:
    """Trains from scratch, or on from `checkpoint` if that file exists.

    Args:
        recipe, policy, outside, seed: what is trained.
        train: (tokens,) int64.
        start: the token before the first one.
        vocabulary: how many words.
        device: where.
        checkpoint: written after every epoch and left where it is.
        on_epoch: called after every epoch of the recipe, and once for each that the checkpoint has already behind it.
        on_model: called with (epochs, model) after every epoch but the last; what it raises ends the training.

    Returns:
        The model, and the seconds of training in all sittings.

    Raises:
        ValueError: the text is too short for the batch.
    """
    model = build_language_model(recipe, vocabulary, outside, seed)
    put_policy(model, policy, recipe)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    text = streams(train, start, recipe.batch_size).to(device)
    steps = -(-(text.shape[1] - 1) // recipe.segment)

    def train_epoch(epoch: int) -> None:
        model.train()
        memories = None
        for step, (words, targets) in enumerate(segments(text, recipe.segment)):
            optimizer.param_groups[0]["lr"] = warmup_cosine(
                recipe.learning_rate, recipe.warmup, epoch * steps + step, recipe.epochs * steps
            )
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                losses, memories = model(words, targets, memories)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            memories = latest(memories, recipe.memory)

    def after_epoch(done: int) -> None:
        if done < recipe.epochs:
            on_model(done, model)

    parts: dict[str, Part] = {"model": model, "optimizer": optimizer}
    seconds = run_epochs(recipe.epochs, train_epoch, parts, seed, device, checkpoint, on_epoch, after_epoch)
    return model, seconds


def streams(tokens: Tensor, start: int, count: int) -> Tensor:
    """(count, L + 1): the text cut into equal parts, each after the token before it; what is left over is not used.

    Raises:
        ValueError: fewer tokens than parts.
    """
    length = len(tokens) // count
    if length < 1:
        raise ValueError(f"batch_size must be at most {len(tokens)}, the tokens of the text, got {count}")
    text = torch.cat((torch.tensor([start], dtype=tokens.dtype), tokens))
    return torch.stack([text[part * length : (part + 1) * length + 1] for part in range(count)])


def segments(text: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Words and the words after them, (N, at most `length`) each, along the streams (N, L + 1)."""
    for begin in range(0, text.shape[1] - 1, length):
        end = min(begin + length, text.shape[1] - 1)
        yield text[:, begin:end], text[:, begin + 1 : end + 1]


def latest(memories: Tensor, length: int) -> Tensor:
    """The last `length` words of the memories (layers, N, M, C)."""
    return memories[:, :, max(0, memories.shape[2] - length) :]


@torch.inference_mode()
def perplexity(model: TransformerXL, recipe: LanguageRecipe, tokens: Tensor, start: int) -> float:
    """exp of the mean negative log-likelihood over all tokens, in evaluation mode and full precision; inf if that is
    no number, as after a training that diverged.

    The text is one stream; each token is predicted once, from all before it or at least `evaluation_memory` of them.
    """
    training = model.training
    model.eval()
    total, memories = 0.0, None
    for words, targets in segments(streams(tokens, start, 1).to(model.embedding.weight.device), recipe.segment):
        losses, memories = model(words, targets, memories)
        total += float(losses.double().sum())
        memories = latest(memories, recipe.evaluation_memory)
    model.train(training)
    mean = total / len(tokens)
    return math.exp(mean) if mean < LARGEST else math.inf
