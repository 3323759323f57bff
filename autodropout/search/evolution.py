"""Regularised evolution (Real et al., 2019): the population is the youngest finished trials; nobody stays for merit."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..patterns.checks import integer
from .searcher import Proposal
from .searcher import Sample
from .searcher import Searcher
from .space import Choices
from .space import SearchSpace


class EvolutionSearcher(Searcher):
    """Mutates one token of the best of a few sequences, drawn from the last ones that finished.

    Trial `number` is uniform while `number < population`, and afterwards a child of what has finished by then. What is
    random derives from the seed and the number of the trial.

    Args:
        space, seed: as for every searcher.
        population: how many of the youngest finished trials can have children.
        tournament: how many of them, drawn without replacement, compete for each child.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: `population` below 1, or `tournament` outside [1, population].
    """

    def __init__(self, space: SearchSpace, seed: int = 0, *, population: int = 50, tournament: int = 10) -> None:
        super().__init__(space, integer("seed", seed, -(2**63), 2**64 - 1))
        self.population = integer("population", population, 1, 2**20)
        self.tournament = integer("tournament", tournament, 1, self.population)
        self._alive: deque[tuple[float, Choices]] = deque(maxlen=self.population)  # the oldest first

    def propose(self, number: int) -> Proposal:
        generator = random.Random(f"evolution/{self.seed}/{number}")
        if number < self.population or not self._alive:
            return Proposal(self.space.sample(generator))
        candidates = generator.sample(range(len(self._alive)), min(self.tournament, len(self._alive)))
        # Of equal rewards the younger one wins: a parent that its child equals has had its turn.
        _, _, parent = max((self._alive[i][0], i, self._alive[i][1]) for i in candidates)
        return Proposal(mutated(self.space, parent, generator))

    def update(self, samples: Sequence[Sample]) -> dict[str, Any]:
        self._alive.extend((sample.reward, sample.choices) for sample in samples)
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"alive": [[reward, list(choices)] for reward, choices in self._alive]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        alive = ((float(reward), self.space.check(choices)) for reward, choices in state["alive"])
        self._alive = deque(alive, maxlen=self.population)

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "population": self.population, "tournament": self.tournament}


def mutated(space: SearchSpace, choices: Choices, generator: random.Random) -> Choices:
    """A neighbour of a sequence: one asked token takes another of its values; tokens and values are equally likely.

    Tokens that are asked only now are uniform over their values, tokens that are asked no longer become 0. A space of a
    single sequence has no neighbours: it is returned.
    """
    before = space.asked(choices)
    free = [i for i, token in enumerate(space.tokens) if before[i] and len(token.values) > 1]
    if not free:
        return choices
    changed = generator.choice(free)
    result: list[int] = []
    asked: list[bool] = []
    for i, token in enumerate(space.tokens):
        when = token.when
        asked.append(when is None or (asked[when[0]] and result[when[0]] in when[1]))
        if i == changed:
            other = generator.randrange(len(token.values) - 1)
            result.append(other + (other >= choices[i]))
        elif not asked[i]:
            result.append(0)
        else:
            result.append(choices[i] if before[i] else generator.randrange(len(token.values)))
    return tuple(result)
