"""What table 4 trains: encoder-decoder Transformers on a parallel corpus, with the policies of the compared methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .experiment import Job
from .experiment import Settings
from .experiment import Task
from .experiment import Trained
from .parallel_corpus import Pairs
from .parallel_corpus import ParallelCorpus
from .transformer_methods import STRENGTHS
from .transformer_methods import method_policy
from .translation_training import Prepared
from .translation_training import TranslationRecipe
from .translation_training import bleu
from .translation_training import build_translator
from .translation_training import put_policy
from .translation_training import signature
from .translation_training import train_translator
from .translation_training import translated
from .translation_training import untouched_bleu


class TranslationTask(Task):
    """`settings.recipe`: a `TranslationRecipe`. The metric is the BLEU of the final model, in percent, on the test
    part, with that on the validation part beside it."""

    metric = "bleu"
    larger_is_better = True
    strengths = STRENGTHS

    def __init__(self, settings: Settings, corpus: ParallelCorpus) -> None:
        self.settings, self.corpus = settings, corpus
        self.title, self.fingerprint = corpus.title, corpus.fingerprint
        self.prepared = Prepared(settings.recipe, corpus)

    def applied(self, job: Job) -> object:
        policy, outside = method_policy(job.method, job.strength, self.settings.policy)
        return {"policy": policy.to_json(), "outside": outside.rate, "variational": outside.variational}

    def train(self, job: Job, device: torch.device, checkpoint: Path, on_epoch: Callable[[], None]) -> Trained:
        recipe: TranslationRecipe = self.settings.recipe
        prepared = self.prepared
        policy, outside = method_policy(job.method, job.strength, self.settings.policy)
        model, seconds = train_translator(recipe, policy, outside, prepared, job.seed, device, checkpoint, on_epoch)

        def score(pairs: Pairs) -> float:
            return bleu(translated(model, recipe, prepared.subwords, pairs.source, device), pairs.target)

        evaluated = self.corpus.valid if job.phase == "tune" else self.corpus.test
        value = score(evaluated)
        figures: dict[str, float] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        if job.phase == "final":
            figures["valid_bleu"] = score(self.corpus.valid)
        arguments = {
            "train_pairs": len(prepared.train),
            "left_out_pairs": prepared.left_out,
            "evaluation_pairs": len(evaluated),
            "subwords": len(prepared.subwords),
            "untouched_bleu": untouched_bleu(evaluated),
            "signature": signature(),
        }
        return Trained(value, seconds, arguments, figures)

    def try_policy(self, method: str, strength: float | None) -> None:
        policy, outside = method_policy(method, strength, self.settings.policy)
        with torch.device("meta"):  # the sizes are all that matters, and the paper's network is large
            model = build_translator(self.settings.recipe, len(self.prepared.subwords), outside, seed=0)
            put_policy(model, policy, self.settings.recipe)
