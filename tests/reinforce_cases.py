"""What tests of searchers that learn have in common: rewards without noise, samples by hand, whole searches."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from autodropout.search.core import Search
from autodropout.search.searcher import Sample
from autodropout.search.space import Choices


def reward_of(sequence: Choices) -> float:
    return math.sin(sum((7 * position + 3) * choice for position, choice in enumerate(sequence)))


def samples_of(
    sequences: Sequence[Choices], rewards: Sequence[float], ages: Sequence[int], log_probs: Sequence[float]
) -> list[Sample]:
    fields = zip(sequences, log_probs, rewards, ages, strict=True)
    return [Sample(number, *of_one) for number, of_one in enumerate(fields)]


def play(
    search: Search, reward: Callable[[Choices], float], trials: int, out_of_order: int = 1
) -> list[tuple[Any, ...]]:
    """Asks and tells, with `out_of_order` trials unfinished at a time, told at random; returns all that is seen."""
    order = random.Random(0)
    seen: list[tuple[Any, ...]] = []
    while search.asked < trials or search.unfinished:
        while search.asked < trials and len(search.unfinished) < out_of_order:
            trial = search.ask()
            seen.append((trial.number, trial.choices, trial.log_prob))
        trial = search.unfinished[order.choice(sorted(search.unfinished))]
        seen.append((search.tell(trial.number, reward(trial.choices)),))
    return seen
