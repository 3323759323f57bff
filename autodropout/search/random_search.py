"""Random search: the baseline of every comparison."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ..patterns.checks import integer
from .searcher import Proposal
from .searcher import Sample
from .searcher import Searcher
from .space import SearchSpace


class RandomSearcher(Searcher):
    """Every asked token uniform over its values, by a generator made from the seed and the number of the trial."""

    def __init__(self, space: SearchSpace, seed: int = 0) -> None:
        super().__init__(space, integer("seed", seed, -(2**63), 2**64 - 1))

    def propose(self, number: int) -> Proposal:
        return Proposal(self.space.sample(random.Random(f"random/{self.seed}/{number}")))

    def update(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"state must be empty, got {sorted(state)}")

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed}
