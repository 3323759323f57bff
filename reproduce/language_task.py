"""What table 3 trains: Transformer-XL on a corpus, with the policies of the compared methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .corpus import Corpus
from .experiment import Job
from .experiment import Settings
from .experiment import Task
from .experiment import Trained
from .language_training import LanguageRecipe
from .language_training import build_language_model
from .language_training import perplexity
from .language_training import put_policy
from .language_training import train_language_model
from .transformer_methods import STRENGTHS
from .transformer_methods import method_policy


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
