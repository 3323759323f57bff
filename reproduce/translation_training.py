"""Trains one translation model; see epochs.py for checkpoints and exact continuation."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU
from torch import Tensor

from autodropout import Policy
from autodropout import apply_policy

from .augment import derive
from .beam_search import translate
from .epochs import Part
from .epochs import run_epochs
from .learning_rates import warmup_cosine
from .models.transformer import PAD
from .models.transformer import Size
from .models.transformer import Transformer
from .parallel_corpus import Pairs
from .parallel_corpus import ParallelCorpus
from .sentence_batches import epoch_batches
from .sentence_batches import training_batches
from .subwords import Subwords
from .transformer_methods import Outside

# Of Vaswani et al. 2017, section 5: label smoothing, and what they give Adam.
SMOOTHING = 0.1
BETAS = (0.9, 0.98)
EPSILON = 1e-9


@dataclass(frozen=True)
class TranslationRecipe:
    """What determines a training besides corpus, policy and seed.

    Adam, learning rate up to `learning_rate` along a line over `warmup` steps, then as in `warmup_cosine` (ours, as in
    table 3; Vaswani et al. have the inverse square root of the step). Cross-entropy with label smoothing of 0.1.

    `vocabulary` is what byte-pair encoding may have at most, `batch_words` the words of a padded batch on either side.
    Pairs of which a side has more than `longest` words take no part in the training. Translations are found by beam
    search with `beam` beginnings and the exponent `penalty` of the length.
    """

    size: Size
    vocabulary: int
    epochs: int
    batch_words: int
    longest: int
    learning_rate: float
    warmup: int
    beam: int
    penalty: float


@dataclass(frozen=True)
class EncodedPairs:
    """Sentences as numbers, each with `END` after it; in arrays, because lists of integers are nine times as large."""

    source: list[array[int]]
    target: list[array[int]]

    def __len__(self) -> int:
        return len(self.source)


class Prepared:
    """A corpus in the numbers of a recipe.

    Attributes:
        corpus, subwords: the sentences, and what encodes them, learned from the training part.
        train: the pairs to train on.
        left_out: pairs of the training part that are too long for the recipe.

    Raises:
        ValueError: no pair is short enough.
    """

    def __init__(self, recipe: TranslationRecipe, corpus: ParallelCorpus) -> None:
        self.corpus = corpus
        self.subwords = Subwords(corpus.train, recipe.vocabulary)
        both = zip(self.subwords.encode(corpus.train.source), self.subwords.encode(corpus.train.target), strict=True)
        self.train = EncodedPairs([], [])
        for source, target in both:
            if max(len(source), len(target)) <= recipe.longest:
                self.train.source.append(array("i", source))
                self.train.target.append(array("i", target))
        self.left_out = len(corpus.train) - len(self.train)
        if not len(self.train):
            raise ValueError(f"longest must leave some of the {self.left_out} training pairs, got {recipe.longest}")

    def steps(self, recipe: TranslationRecipe) -> int:
        """Of an epoch."""
        lengths = [(len(a), len(b)) for a, b in zip(self.train.source, self.train.target, strict=True)]
        return len(epoch_batches(lengths, recipe.batch_words, seed=0, epoch=0))


def build_translator(recipe: TranslationRecipe, vocabulary: int, outside: Outside, seed: int) -> Transformer:
    """The network of the recipe, its weights a function of `seed` alone."""
    torch.manual_seed(derive(seed, "weights"))
    return Transformer(vocabulary, recipe.size, outside.rate, outside.variational)


def put_policy(model: Transformer, policy: Policy, recipe: TranslationRecipe) -> None:
    """Puts a policy on a model that has none; its rates are checked on the longest sentences of the training."""
    if any(site.pattern is not None for site in policy.sites):
        apply_policy(model, policy, example=example_input(recipe))


def example_input(recipe: TranslationRecipe) -> tuple[Tensor, Tensor]:
    """Source and target, from which `find_sites` and `apply_policy` learn the lengths."""
    words = torch.full((1, recipe.longest), PAD + 1)
    return words, words


def train_translator(
    recipe: TranslationRecipe,
    policy: Policy,
    outside: Outside,
    prepared: Prepared,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    on_epoch: Callable[[], None] = lambda: None,
    on_model: Callable[[int, Transformer], None] = lambda epoch, model: None,
) -> tuple[Transformer, float]:
    """Trains from scratch, or on from `checkpoint` if that file exists.

    Args:
        recipe, policy, outside, seed: what is trained.
        prepared: the corpus, of the same recipe.
        device: where.
        checkpoint: written after every epoch and left where it is.
        on_epoch: called after every epoch of the recipe, and once for each that the checkpoint has already behind it.
        on_model: called with (epochs, model) after every epoch but the last; what it raises ends the training.

    Returns:
        The model, and the seconds of training in all sittings.
    """
    model = build_translator(recipe, len(prepared.subwords), outside, seed)
    put_policy(model, policy, recipe)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate, BETAS, EPSILON)
    train, steps = prepared.train, prepared.steps(recipe)

    def train_epoch(epoch: int) -> None:
        model.train()
        batches = training_batches(train.source, train.target, recipe.batch_words, seed, epoch)
        for step, (source, words, targets) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = warmup_cosine(
                recipe.learning_rate, recipe.warmup, epoch * steps + step, recipe.epochs * steps
            )
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(source.to(device), words.to(device))
            smoothed_loss(logits, targets.to(device)).backward()
            optimizer.step()

    def after_epoch(done: int) -> None:
        if done < recipe.epochs:
            on_model(done, model)

    parts: dict[str, Part] = {"model": model, "optimizer": optimizer}
    seconds = run_epochs(recipe.epochs, train_epoch, parts, seed, device, checkpoint, on_epoch, after_epoch)
    return model, seconds


def smoothed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the words that are no padding, with the share `SMOOTHING` of each target spread over all words."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=PAD, label_smoothing=SMOOTHING)


def translated(
    model: Transformer, recipe: TranslationRecipe, subwords: Subwords, sentences: Sequence[str], device: torch.device
) -> list[str]:
    """Translations as text."""
    sources = list(subwords.encode(sentences))
    return subwords.decode(translate(model, sources, recipe.batch_words, recipe.beam, recipe.penalty, device))


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """Of the corpus, in percent, as `sacrebleu` has it with `signature()`."""
    return float(BLEU().corpus_score(list(translations), [list(references)]).score)


def untouched_bleu(pairs: Pairs) -> float:
    """Of the source sentences as they are: what a model that has learned nothing but to copy gets."""
    return bleu(pairs.source, pairs.target)


def signature() -> str:
    """What determines the BLEU of `bleu`, in the words of `sacrebleu`."""
    metric = BLEU()
    metric.corpus_score(["a"], [["a"]])  # which tells it the number of references
    return str(metric.get_signature())
