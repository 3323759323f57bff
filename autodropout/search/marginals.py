"""How often each value of a kind of token was proposed: over windows of trials, and site by site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .space import Choices
from .space import SearchSpace
from .space import Value


@dataclass(frozen=True)
class Marginals:
    """Of one kind of token.

    Args:
        kind: of the tokens.
        values: that any of them can take; numbers in ascending order.
        windows: for each window the shares of the values among the tokens that were asked; all 0 if none was.
        sites: for each site that has the token, the shares of its values in the last trials, None for values that the
            site does not have; and how often it was asked.
    """

    kind: str
    values: tuple[Value, ...]
    windows: tuple[tuple[float, ...], ...]
    sites: dict[int, tuple[tuple[float | None, ...], int]]

    @property
    def ordered(self) -> bool:
        """Whether the values are numbers."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)


def window_edges(trials: int, windows: int) -> list[int]:
    """Edges of at most so many windows, each of at least one trial and as equal as can be."""
    count = max(1, min(windows, trials))
    return [trials * i // count for i in range(count + 1)]


def marginals(space: SearchSpace, proposals: Sequence[Choices], edges: Sequence[int], last: int) -> list[Marginals]:
    """For each kind of token with more than one value, in the order of their first tokens.

    Args:
        space: of the proposals.
        proposals: in the order of the trials.
        edges: of the windows, indices into the proposals.
        last: how many of the last proposals the shares by site are of.
    """
    asked = [space.asked(choices) for choices in proposals]
    result = []
    for kind in dict.fromkeys(token.kind for token in space.tokens):
        positions = [i for i, token in enumerate(space.tokens) if token.kind == kind]
        values = _ordered(dict.fromkeys(value for i in positions for value in space.tokens[i].values))
        if len(values) < 2:
            continue

        def count(which: Sequence[int], begin: int, end: int) -> Counter[Value]:
            return Counter(
                space.tokens[i].values[proposals[n][i]] for n in range(begin, end) for i in which if asked[n][i]
            )

        windows = tuple(_shares(count(positions, a, b), values) for a, b in pairwise(edges))
        sites: dict[int, tuple[tuple[float | None, ...], int]] = {}
        for i in positions:
            token = space.tokens[i]
            seen = count([i], max(0, len(proposals) - last), len(proposals))
            shares = zip(values, _shares(seen, values), strict=True)
            sites[token.site] = tuple(share if value in token.values else None for value, share in shares), seen.total()
        result.append(Marginals(kind, values, windows, sites))
    return result


def _shares(counted: Counter[Value], values: Sequence[Value]) -> tuple[float, ...]:
    total = counted.total()
    return tuple(counted[value] / total if total else 0.0 for value in values)


def _ordered(values: dict[Value, None]) -> tuple[Value, ...]:
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return tuple(sorted(values))
    return tuple(values)
