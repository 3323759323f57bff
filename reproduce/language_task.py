"""What table 3 trains: Transformer-XL on a corpus, with the policies of the compared methods.

All methods act in the layers by a policy, put there by the same `apply_policy`, and outside them (on the embedded words
and on what the last layer gives, which are no places of a policy) by dropout of the model's own. Which places, and the
strengths that are tried, are our choice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from autodropout import Policy
from autodropout import Site
from autodropout import TokenPattern
from autodropout.patterns.token import MAX_SPAN

from .corpus import Corpus
from .experiment import Job
from .experiment import Settings
from .experiment import Task
from .experiment import Trained
from .language_training import LanguageRecipe
from .language_training import Outside
from .language_training import build_language_model
from .language_training import perplexity
from .language_training import put_policy
from .language_training import train_language_model

# Rates for the classical methods; for autodropout one factor on the rates of its policy's patterns.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "none": (),
    "dropout": (0.1, 0.2, 0.3),
    "variational": (0.1, 0.2, 0.3),
    "autodropout": (0.5, 1.0, 1.5),
}
METHODS = tuple(STRENGTHS)
OFF = Policy.uniform(None)
# Of AutoDropout at strength 1.
OUTSIDE_RATE = 0.2


def method_policy(method: str, strength: float | None, learned: Policy) -> tuple[Policy, Outside]:
    """The policy of a method at a strength, and the dropout outside the layers.

    - `"dropout"`: at the weights of attention, the two outputs and the hidden layer of the feed-forward part, and
      outside, at the same rate: where Transformer-XL's own code has it.
    - `"variational"`: one decision a channel for all words of a segment (Gal & Ghahramani 2016), at the same places but
      the weights of attention, where it would drop a query's whole row.
    - `"autodropout"`: the learned policy, its rates times strength; outside, dropout at 0.2 times strength.

    Args:
        method: one of METHODS.
        strength: None for "none", else a rate or the factor.
        learned: the policy of "autodropout" at strength 1.

    Raises:
        ValueError: an unknown method, or a strength out of range.
    """
    if method not in STRENGTHS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if (strength is None) != (method == "none"):
        raise ValueError(f"strength must be a number, and None for the method none; got {strength} for {method}")
    if strength is None:
        return OFF, Outside()
    if method == "autodropout":
        return learned.scaled(strength), Outside(OUTSIDE_RATE * strength)
    outputs = ("output", "feed_forward", "residual")
    if method == "variational":
        return _everywhere(outputs, TokenPattern(MAX_SPAN, rate=strength, share_t=True)), Outside(strength, True)
    return _everywhere(("softmax", *outputs), TokenPattern(1, rate=strength)), Outside(strength)


def _everywhere(places: tuple[str, ...], pattern: TokenPattern) -> Policy:
    return Policy(tuple(Site(place, 0.0, place, pattern) for place in places))


class LanguageTask(Task):
    """`settings.recipe`: a `LanguageRecipe`. The metric is the perplexity of the final model; on the test text, with
    that on the validation text beside it."""

    metric = "perplexity"
    larger_is_better = False
    strengths = STRENGTHS

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        self.settings, self.corpus = settings, corpus
        self.title, self.fingerprint = corpus.title, corpus.fingerprint

    def applied(self, job: Job) -> object:
        policy, outside = method_policy(job.method, job.strength, self.settings.policy)
        return {"policy": policy.to_json(), "outside": outside.rate, "variational": outside.variational}

    def train(self, job: Job, device: torch.device, checkpoint: Path, on_epoch: Callable[[], None]) -> Trained:
        recipe: LanguageRecipe = self.settings.recipe
        corpus = self.corpus
        policy, outside = method_policy(job.method, job.strength, self.settings.policy)
        model, seconds = train_language_model(
            recipe,
            policy,
            outside,
            corpus.train,
            corpus.start,
            len(corpus.words),
            job.seed,
            device,
            checkpoint,
            on_epoch,
        )
        evaluated = corpus.valid if job.phase == "tune" else corpus.test
        value = perplexity(model, recipe, evaluated, corpus.start)
        figures: dict[str, float] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        if job.phase == "final":
            figures["valid_perplexity"] = perplexity(model, recipe, corpus.valid, corpus.start)
        return Trained(
            value, seconds, {"train_tokens": len(corpus.train), "evaluation_tokens": len(evaluated)}, figures
        )

    def try_policy(self, method: str, strength: float | None) -> None:
        policy, outside = method_policy(method, strength, self.settings.policy)
        model = build_language_model(self.settings.recipe, len(self.corpus.words), outside, seed=0)
        put_policy(model, policy, self.settings.recipe)
