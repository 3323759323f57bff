"""Transformer-XL on the Python language reference: offline, a search over token patterns.

Network, text and training are those of table3_language_model's demo, with the dropout outside the layers that a policy
has there at strength 1. The metric is the logarithm of the perplexity on the validation text; the test text takes no
part. One trial took 15 to 28 s of one core's time, measured on a busy machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch

from autodropout import Policy
from autodropout.policy import TOKEN_PLACES
from autodropout.reproduce.corpus import PYDOC
from autodropout.reproduce.corpus import Corpus
from autodropout.reproduce.corpus import open_corpus
from autodropout.reproduce.language_training import LanguageRecipe
from autodropout.reproduce.language_training import build_language_model
from autodropout.reproduce.language_training import example_input
from autodropout.reproduce.language_training import perplexity
from autodropout.reproduce.language_training import train_language_model
from autodropout.reproduce.models.transformer_xl import Size
from autodropout.reproduce.models.transformer_xl import TransformerXL
from autodropout.reproduce.proxy import one_thread
from autodropout.reproduce.transformer_methods import OUTSIDE_RATE
from autodropout.reproduce.transformer_methods import Outside
from autodropout.search.space import SearchSpace
from autodropout.search.token_space import TokenSite
from autodropout.search.token_space import TokenSpace
from autodropout.sites import find_sites

DIRECTION = "min"
RECIPE = LanguageRecipe(
    Size(layers=2, width=64, heads=4, inner=128),
    epochs=16,
    batch_size=20,
    segment=32,
    memory=32,
    evaluation_memory=64,
    learning_rate=4e-3,
    warmup=50,
)
OUTSIDE = Outside(OUTSIDE_RATE)
REPORT_EVERY = 4  # epochs


def space() -> SearchSpace:
    """The paper's four tokens and a rate for each of the paper's six places of every layer."""
    with torch.random.fork_rng(devices=[]):  # the weights are of no interest here, and drawing them must change nothing
        model = build_language_model(RECIPE, vocabulary=2, outside=OUTSIDE, seed=0)
    sites = [site for place in TOKEN_PLACES for site in find_sites(model, example_input(RECIPE), place)]
    sites.sort(key=lambda site: site.depth)  # layer by layer
    return TokenSpace([TokenSite(site.name, site.depth, site.place, site.lengths[0]) for site in sites])


def train(policy: Policy, seed: int, report: Callable[[int, float], None]) -> float:
    """The logarithm of the validation perplexity after the last epoch."""
    corpus = _corpus()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def measured(model: TransformerXL) -> float:
        return math.log(perplexity(model, RECIPE, corpus.valid, corpus.start))

    def after(epoch: int, model: TransformerXL) -> None:
        if epoch % REPORT_EVERY == 0:
            report(epoch, measured(model))

    with one_thread():
        model, _ = train_language_model(
            RECIPE, policy, OUTSIDE, corpus.train, corpus.start, len(corpus.words), seed, device, on_model=after
        )
        return measured(model)


@cache
def _corpus() -> Corpus:
    return open_corpus(PYDOC)
