"""Planted tasks: made-up trainings whose best policy is known exactly, to compare searchers on in milliseconds.

A task is a space and a function from its sequences to an accuracy. It resembles digits on a small network: without any
pattern the accuracy is 0.92, and off is neutral; most policies are harmful, and the harm grows with the square of the
dropped share; what helps is a mild share of the right kind and shape at the right sites, about one per cent of accuracy
a site; the tokens of a site act on each other, and so do neighbouring sites. An observation adds noise with a standard
deviation of 1.5% accuracy, that of one seed against another.

    accuracy = 0.92 + squash(sum of effect(site) + sum of link(site, next site))

An effect depends on the choices of its site; a link on the labels of two neighbours, a label being a coarse view of the
choices of a site. So the best sequence follows exactly by dynamic programming over the sites. All numbers below were
fixed before any searcher was run on them; they were chosen for the accuracies of random policies, not for a searcher.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from autodropout.search.space import Choices
from autodropout.search.space import Token
from autodropout.search.space import Value
from autodropout.search.testing import PlaceholderSpace

from .benchmark_task import BenchmarkTask

BASE = 0.92
DEPTH = 0.12  # no policy is worse than the base by more than this
NOISE = 0.015
BUDGETS = (200, 400)

Values = Mapping[str, Value]  # what is asked at one site, by kind


class PlantedTask(BenchmarkTask):
    """A space, the accuracy of each of its sequences, and the best of them.

    Args:
        name: of the task.
        tokens: site by site; the conditions of a token lie within its site.
        effect: what a site adds, from its index and what was chosen there.
        label: what its neighbours see of a site, from the same arguments.
        link: what a pair of neighbours adds, from the index of the first one and both labels.
    """

    def __init__(
        self,
        name: str,
        tokens: Sequence[Token],
        effect: Callable[[int, Values], float],
        label: Callable[[int, Values], Hashable],
        link: Callable[[int, Any, Any], float],
    ) -> None:
        self.name = name
        self.space = PlaceholderSpace(name, tokens)
        self._link = link
        starts = [i for i, token in enumerate(tokens) if i == 0 or tokens[i - 1].site != token.site]
        self._slices = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
        self._tables: list[dict[Choices, tuple[float, Hashable]]] = []
        for site, where in enumerate(self._slices):
            table: dict[Choices, tuple[float, Hashable]] = {}
            for choices in _site_choices(self.space.tokens[where], where.start):
                values = {
                    token.kind: token.values[c] for token, c in zip(tokens[where], choices, strict=True) if c >= 0
                }
                table[tuple(max(c, 0) for c in choices)] = (effect(site, values), label(site, values))
            self._tables.append(table)
        self.best = self._solve()
        self.optimum = self.value(self.best)

    def value(self, choices: Sequence[int]) -> float:
        choices = tuple(choices)
        keys = [choices[where] for where in self._slices]
        if len(choices) != len(self.space.tokens) or any(k not in t for k, t in zip(keys, self._tables, strict=True)):
            self.space.check(choices)
        sites = [table[key] for table, key in zip(self._tables, keys, strict=True)]
        links = (self._link(i, sites[i][1], sites[i + 1][1]) for i in range(len(sites) - 1))
        return BASE + _squash(math.fsum([*(effect for effect, _ in sites), *links]))

    def observe(self, choices: Sequence[int], seed: int) -> float:
        # The noise depends on the seed alone: two searchers see the same noise in trials of the same number.
        return self.value(choices) + random.Random(f"{self.name}/{seed}").gauss(0, NOISE)

    def _solve(self) -> Choices:
        """The best sequence: for each label of a site, the best beginning that ends in it."""
        best: dict[Hashable, tuple[float, Choices]] = {}
        for site, table in enumerate(self._tables):
            here: dict[Hashable, tuple[float, Choices]] = {}
            for choices, (effect, label) in table.items():
                if label not in here or effect > here[label][0]:
                    here[label] = (effect, choices)
            if site:
                for label, (effect, choices) in here.items():
                    joined = [
                        (total + self._link(site - 1, earlier, label) + effect, before + choices)
                        for earlier, (total, before) in best.items()
                    ]
                    here[label] = max(joined)
            best = here
        return max(best.values())[1]


def _site_choices(tokens: Sequence[Token], start: int) -> Iterator[Choices]:
    """All choices of one site, with -1 for a token that is not asked."""

    def extend(choices: Choices) -> Iterator[Choices]:
        if len(choices) == len(tokens):
            yield choices
            return
        token = tokens[len(choices)]
        asked = token.when is None or choices[token.when[0] - start] in token.when[1]
        for choice in range(len(token.values)) if asked else (-1,):
            yield from extend((*choices, choice))

    return extend(())


def _squash(total: float) -> float:
    """Increasing: the identity for gains, and levelling off at -DEPTH for harm."""
    return total if total >= 0 else DEPTH * math.expm1(total / DEPTH)


def _dose(gain: float, fit: float, rate: float, target: float) -> float:
    """A mild share helps, more harms: `gain` at the target for a perfect fit, 0 at 0 and at twice the target."""
    x = rate / target
    return gain * x * (2 * fit - x)


def _tile_rate(values: Values) -> float:
    """The dropped share of tiles of a size and stride, about as on a large map; `repeat` 0 is unlimited."""
    size, stride, repeat = float(values["size"]), float(values["stride"]), int(values["repeat"])
    covered = 1.0 if repeat == 0 else min(1.0, repeat * (size + stride))
    return (size / (size + stride) * covered) ** 2


SIZES = (0.1, 0.2, 0.3, 0.4)
STRIDES = (0.2, 0.4, 0.6, 0.8)
REPEATS = (0, 1, 2)
ANGLES = (0, 30, 60)
SHEARS = (-0.5, 0.0, 0.5)


def tiles(sites: int = 6) -> PlantedTask:
    """The paper's eight tokens; size 0 is off. The last site of each pair ends a block: only it has `residual`.

    A site wants a rate, one of the two `share_c`, an angle, and with that angle (only) one pair of shears. Neighbours
    do better if they differ in `share_c`, and worse if both drop much.
    """
    gains = (0.004, 0.010, 0.006, 0.012, 0.008, 0.010)
    targets = (0.05, 0.11, 0.06, 0.15, 0.08, 0.12)
    shared = (True, True, False, True, False, False)
    angles = (0, 30, 60, 0, 30, 60)
    shears = ((0.0, 0.0), (0.5, 0.0), (0.0, -0.5), (-0.5, 0.5), (0.0, 0.0), (0.5, 0.5))
    residuals = (0.0, 0.2, 0.0, -0.3, 0.0, 0.2)
    signs = (1, 1, -1, 1, -1, 1)  # -1: nothing helps there

    tokens: list[Token] = []
    for site in range(sites):
        size = len(tokens)
        on = (size, tuple(range(1, len(SIZES) + 1)))
        tokens.append(Token(site, "size", (0.0, *SIZES)))
        kinds: list[tuple[str, tuple[Value, ...]]] = [
            ("stride", STRIDES),
            ("repeat", REPEATS),
            ("rotate", ANGLES),
            ("shear_x", SHEARS),
            ("shear_y", SHEARS),
            ("share_c", (False, True)),
        ]
        if site % 2 == 1:
            kinds.append(("residual", (False, True)))
        tokens += [Token(site, kind, values, on) for kind, values in kinds]

    def effect(site: int, values: Values) -> float:
        if values["size"] == 0:
            return 0.0
        angle = values["rotate"] == angles[site]
        shear = angle and (values["shear_x"], values["shear_y"]) == shears[site]
        fit = (1.0 if values["share_c"] == shared[site] else 0.4) * (0.6 + 0.25 * angle + 0.15 * shear)
        if values.get("residual"):
            fit += residuals[site]
        return _dose(gains[site], signs[site] * fit, _tile_rate(values), targets[site])

    def label(site: int, values: Values) -> Hashable:
        return None if values["size"] == 0 else (values["share_c"], _tile_rate(values) > 0.14)

    def link(site: int, first: Any, second: Any) -> float:
        if first is None or second is None:
            return 0.0
        both_heavy = bool(first[1] and second[1])
        return (0.002 if first[0] != second[0] else -0.002) - 0.015 * both_heavy

    return PlantedTask("tiles", tokens, effect, label, link)


KINDS = ("off", "tiled", "dropout", "spatialdropout", "dropblock")
RATES = (0.05, 0.1, 0.2, 0.3)


def kinds(sites: int = 8) -> PlantedTask:
    """One more token says which kind of pattern a site gets; what follows depends on it.

    Each site fits some kinds and not others, at a rate of its own. The same kind at two neighbours is redundant, tiles
    before Dropout do well together.
    """
    gains = (0.006, 0.010, 0.004, 0.010, 0.008, 0.012, 0.006, 0.010)
    targets = (0.06, 0.10, 0.05, 0.08, 0.12, 0.15, 0.10, 0.20)
    fits = (
        #  tiled dropout spatialdropout dropblock
        (0.4, 0.8, -0.2, 0.3),
        (1.0, 0.5, 0.2, 0.7),
        (-0.4, -0.1, -0.5, -0.3),
        (0.9, 0.5, 0.0, 1.0),
        (0.3, 0.4, 0.7, 0.9),
        (1.0, 0.4, 0.3, 0.6),
        (-0.2, 0.7, -0.3, 0.4),
        (0.5, 1.0, 0.6, 0.3),
    )
    blocks = (3, 3, 5, 5, 5, 5, 3, 7)
    angles = (0, 30, 0, 60, 0, 30, 60, 0)
    shared = (False, True, True, False, True, True, False, False)

    tokens: list[Token] = []
    for site in range(sites):
        kind = len(tokens)
        tiled = (kind, (1,))
        tokens += [
            Token(site, "kind", KINDS),
            Token(site, "rate", RATES, (kind, (2, 3, 4))),
            Token(site, "block_size", (3, 5, 7), (kind, (4,))),
            Token(site, "size", SIZES, tiled),
            Token(site, "stride", STRIDES, tiled),
            Token(site, "repeat", REPEATS, tiled),
            Token(site, "rotate", ANGLES, tiled),
            Token(site, "share_c", (False, True), tiled),
        ]

    def effect(site: int, values: Values) -> float:
        kind = str(values["kind"])
        if kind == "off":
            return 0.0
        fit = fits[site][KINDS.index(kind) - 1]
        if kind == "tiled":
            fit -= 0.3 * (values["share_c"] != shared[site]) + 0.2 * (values["rotate"] != angles[site])
            return _dose(gains[site], fit, _tile_rate(values), targets[site])
        if kind == "dropblock":
            fit -= 0.15 * abs(int(values["block_size"]) - blocks[site]) / 2
        return _dose(gains[site], fit, float(values["rate"]), targets[site])

    def label(site: int, values: Values) -> Hashable:
        return values["kind"]

    def link(site: int, first: Any, second: Any) -> float:
        if "off" in (first, second):
            return 0.0
        if first == second:
            return -0.008
        return 0.003 if (first, second) == ("tiled", "dropout") else 0.0

    return PlantedTask("kinds", tokens, effect, label, link)


def neighbours(sites: int = 8) -> PlantedTask:
    """Few tokens, but what pays is mostly joint: a site alone gains little or loses, the right pair gains about 1%.

    The labels are the kind and, for tiles, `share_c`; a pair that is not named adds nothing if one of the two is off,
    and harms a little otherwise. The pairs share sites and exclude each other in places, so that choosing each pair by
    itself does not give the best sequence.
    """
    gains = (0.003, 0.005, 0.004, 0.003, 0.006, 0.003, 0.004, 0.005)
    targets = (0.06, 0.10, 0.08, 0.06, 0.12, 0.10, 0.08, 0.15)
    fits = (
        # tiled, dropout: negative means harm at any rate
        (-0.3, 0.6),
        (0.5, -0.2),
        (-0.2, -0.3),
        (0.4, 0.3),
        (0.8, -0.3),
        (-0.2, 0.5),
        (0.2, 0.3),
        (-0.3, 0.9),
    )
    whole, split = ("tiled", True), ("tiled", False)
    pairs: tuple[dict[tuple[Any, Any], float], ...] = (
        {("dropout", whole): 0.008, (whole, whole): 0.006},
        {(split, "dropout"): 0.009, (whole, "off"): 0.002},
        {("dropout", split): 0.010, ("off", whole): 0.003},
        {(split, whole): 0.006, (whole, split): 0.008},
        {(whole, "dropout"): 0.010, (split, "off"): 0.002},
        {("dropout", "dropout"): 0.004, ("off", whole): 0.004},
        {(whole, "dropout"): 0.007, ("dropout", whole): 0.009},
    )

    tokens: list[Token] = []
    for site in range(sites):
        kind = len(tokens)
        tokens += [
            Token(site, "kind", ("off", "tiled", "dropout")),
            Token(site, "size", SIZES, (kind, (1,))),
            Token(site, "stride", STRIDES, (kind, (1,))),
            Token(site, "share_c", (False, True), (kind, (1,))),
            Token(site, "rate", RATES, (kind, (2,))),
        ]

    def effect(site: int, values: Values) -> float:
        if values["kind"] == "off":
            return 0.0
        tiled = values["kind"] == "tiled"
        rate = _tile_rate({**values, "repeat": 0}) if tiled else float(values["rate"])
        return _dose(gains[site], fits[site][0 if tiled else 1], rate, targets[site])

    def label(site: int, values: Values) -> Hashable:
        return ("tiled", values["share_c"]) if values["kind"] == "tiled" else values["kind"]

    def link(site: int, first: Any, second: Any) -> float:
        return pairs[site].get((first, second), 0.0 if "off" in (first, second) else -0.003)

    return PlantedTask("neighbours", tokens, effect, label, link)


TASKS: dict[str, Callable[[], PlantedTask]] = {"tiles": tiles, "kinds": kinds, "neighbours": neighbours}
