"""A small space, a searcher with real state and a recipe that trains in microseconds: shared by tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autodropout import BernoulliPattern
from autodropout import Policy
from autodropout.policy import Site
from autodropout.search.searcher import Proposal
from autodropout.search.searcher import Sample
from autodropout.search.searcher import Searcher
from autodropout.search.space import Choices
from autodropout.search.space import SearchSpace
from autodropout.search.space import Token

RATES = (0.1, 0.2, 0.3, 0.4)


class ToySpace(SearchSpace):
    """Dropout or nothing at each site: a token "on", and a token "rate" that is asked where it is on."""

    def __init__(self, sites: int = 2) -> None:
        self.sites = sites
        tokens = []
        for site in range(sites):
            tokens.append(Token(site, "on", (False, True)))
            tokens.append(Token(site, "rate", RATES, when=(2 * site, (1,))))
        super().__init__(tokens)

    def decode(self, choices: Sequence[int]) -> Policy:
        choices = self.check(choices)
        depths = [site / max(1, self.sites - 1) for site in range(self.sites)]
        patterns = [
            BernoulliPattern(RATES[choices[2 * site + 1]]) if choices[2 * site] else None for site in range(self.sites)
        ]
        sites = zip(depths, patterns, strict=True)
        return Policy(tuple(Site(f"s{i}", depth, pattern=pattern) for i, (depth, pattern) in enumerate(sites)))

    def encode(self, policy: Policy) -> Choices:
        choices: list[int] = []
        for site in policy.sites:
            on = isinstance(site.pattern, BernoulliPattern)
            choices += [int(on), RATES.index(site.pattern.rate) if isinstance(site.pattern, BernoulliPattern) else 0]
        return self.check(choices)

    def to_json(self) -> dict[str, Any]:
        return {"name": "toy", "sites": self.sites}


class ToySearcher(Searcher):
    """Keeps a mean reward for each choice of each token, and prefers the better ones: state, floats, random numbers."""

    def __init__(self, space: SearchSpace, seed: int = 0, batch_size: int = 2) -> None:
        super().__init__(space, seed)
        self.batch_size = batch_size
        self.means = [[0.0] * len(token.values) for token in space.tokens]
        self.lost = 0

    def propose(self, number: int) -> Proposal:
        generator = random.Random(f"{self.seed}/{number}")
        candidates = [self.space.sample(generator) for _ in range(3)]
        best = max(candidates, key=self._score)
        return Proposal(best, -self._score(best))

    def _score(self, choices: Choices) -> float:
        return sum(means[choice] for means, choice in zip(self.means, choices, strict=True)) + 0.001 * self.lost

    def update(self, samples: Sequence[Sample]) -> dict[str, Any]:
        for sample in samples:
            for means, choice in zip(self.means, sample.choices, strict=True):
                means[choice] = 0.7 * means[choice] + 0.3 * sample.reward / (1 + sample.age)
        return {"reward": [sample.reward for sample in samples]}

    def failed(self, number: int) -> None:
        self.lost += 1

    def state_dict(self) -> dict[str, Any]:
        return {"means": [list(means) for means in self.means], "lost": self.lost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = [list(means) for means in state["means"]]
        self.lost = state["lost"]

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "batch_size": self.batch_size}


RECIPE = """
import os
import random
import signal
import sys
import time

sys.path.insert(0, {tests!r})
from search_toys import ToySpace

DIRECTION = {direction!r}


def space():
    return ToySpace({sites})


def train(policy, seed, report):
    noise = random.Random(seed).gauss(0, 0.1)
    rates = [site.pattern.rate if site.pattern else 0 for site in policy.sites]
    metric = 1 - sum(abs(rate - 0.3) for rate in rates) + noise
{body}
    return metric
"""


def write_recipe(folder: Path, body: str = "", sites: int = 2, direction: str = "max", name: str = "toy") -> Path:
    """Writes a recipe whose metric is a function of policy and seed: best where all rates are 0.3, with noise of 0.1.

    `body`: statements of `train` that run before it returns `metric` (names: policy, seed, report, metric;
    modules: os, random, signal, time).
    """
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    path = folder / f"{name}.py"
    path.write_text(RECIPE.format(tests=str(Path(__file__).parent), direction=direction, sites=sites, body=lines))
    return path
