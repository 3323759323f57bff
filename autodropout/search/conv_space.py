"""The search space of ConvNets: the paper's eight tokens for each site, or also the kind of pattern it gets.

The tokens and their order are the paper's (Pham & Le 2021); the value sets, which it does not state, are ours, chosen
by the exact expected rates of uniform sequences: docs/search-space.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from typing import cast

from torch import nn

from ..apply import MAX_RATE
from ..patterns import BernoulliPattern
from ..patterns import BlockPattern
from ..patterns import Pattern
from ..patterns import TiledPattern
from ..patterns.block import MAX_BLOCK
from ..patterns.checks import flag
from ..patterns.checks import integer
from ..patterns.checks import real
from ..patterns.tiled import MAX_REPEAT
from ..patterns.tiled import MAX_SHEAR
from ..patterns.tiled import MAX_SIZE
from ..patterns.tiled import MAX_STRIDE
from ..policy import Site
from ..sites import Example
from ..sites import Map
from ..sites import ModelSite
from ..sites import find_sites
from .site_space import Question
from .site_space import SiteSpace
from .site_space import Values
from .site_space import checked_names
from .space import Value

KINDS = ("off", "tiled", "dropout", "spatialdropout", "dropblock")

# Side of a tile and gap between tiles, in parts of the smaller side of a map; used in whole cells of that side.
SIZES = (1 / 8, 5 / 16, 7 / 16, 1 / 2)
STRIDES = (3 / 8, 1 / 2, 5 / 8)
LARGEST_TILE = 0.3  # a size is left out where a single tile drops more than this share of the map
REPEATS = (1, 2, 0)  # one tile, 2 x 2 tiles, as many as the map holds
ANGLES = (0.0, 22.5, 45.0, 67.5)  # a square looks the same after 90 degrees
SHEARS = (-0.5, 0.0, 0.5)
TURNED_FROM = 4  # cells: smaller maps have too few for angles and shears to be seen, theirs are 0
RATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
BLOCK_SIZES = (3, 5, 7)

SHAPE = ("size", "stride", "repeat", "rotate", "shear_x", "shear_y")
TILED = (*SHAPE, "share_c", "residual")

# Which kinds of pattern a token describes, in the order of choice: without and with a token for the kind.
PAPER_TOKENS = dict.fromkeys(TILED, ("tiled",))
KIND_TOKENS = {
    "rate": ("dropout", "spatialdropout", "dropblock"),
    "block_size": ("dropblock",),
    **PAPER_TOKENS,
    "share_c": ("tiled", "dropblock"),
}
BERNOULLI = {"dropout": "none", "spatialdropout": "map"}


@dataclass(frozen=True)
class ConvSite:
    """A site of a ConvNet, as far as a search space needs it.

    Args:
        name: its path in the model.
        depth: position in order of execution, from 0 (the first site) to 1 (the last).
        maps: (channels, height, width) of the activation; several if the site is passed with several sizes.
        ends_block: it is the last site of a residual block whose skip tensor can be masked too.

    Raises:
        TypeError, ValueError: naming the field.
    """

    name: str
    depth: float
    maps: tuple[Map, ...]
    ends_block: bool = False

    def __post_init__(self) -> None:
        if not self.maps:
            raise ValueError(f"maps must hold at least one (channels, height, width), got none for {self.name!r}")
        for seen in self.maps:
            if len(seen) != 3:
                raise ValueError(f"maps must hold (channels, height, width), got {seen!r} for {self.name!r}")
        # Equal sites should also look equal in JSON.
        maps = tuple(tuple(integer("maps", side, 1, 2**31 - 1) for side in seen) for seen in self.maps)
        object.__setattr__(self, "maps", maps)
        object.__setattr__(self, "depth", real("depth", self.depth, 0, 1))
        object.__setattr__(self, "ends_block", flag("ends_block", self.ends_block))

    @classmethod
    def of(cls, site: ModelSite) -> ConvSite:
        """The site that `find_sites` found, with an example."""
        return cls(site.name, site.depth, site.maps, site.block is not None)

    @property
    def side(self) -> int:
        """The smallest side of its maps, in cells."""
        return min(min(seen[1:]) for seen in self.maps)


class ConvSpace(SiteSpace):
    """Patterns for the outputs of the batch normalisations of a ConvNet.

    Without `kinds`, a site has the tokens of the paper, in its order: size, stride, repeat, rotate, shear_x, shear_y,
    share_c, residual. Size 0 is "off", after which the others are not asked. Where `residual` means nothing its only
    value is False. A site of a single cell has the token size alone, always 0.

    With `kinds` (ours), a site is first asked for its kind: off, tiled (the eight tokens, no size being 0), dropout or
    spatialdropout (rate), dropblock (rate, block_size, share_c). So the classical regularisers, site by site, belong to
    the space.

    Args:
        sites: in order of execution; what `find_sites` returns for an example will do.
        kinds: some of `KINDS`, at least one of which is not "off"; None for the paper's tokens.
        values: value sets by kind of token, the same for every site, in place of the default ones, which depend on the
            map: `{"rotate": (0.0, 15.0, 30.0)}`. Lengths are fractions of the map's side. A single value is fixed.

    Raises:
        TypeError, ValueError: naming the argument; also where value sets hold a pattern that is refused elsewhere, for
            unlimited repeat without stride or an exact expected rate above 0.95 on a map of its site.
    """

    def __init__(
        self, sites: Sequence[ConvSite | ModelSite], kinds: Sequence[str] | None = None, values: Values | None = None
    ) -> None:
        if not isinstance(sites, (tuple, list)) or not sites:
            raise ValueError(f"sites must be a tuple of at least one ConvSite or ModelSite, got {sites!r}")
        for index, site in enumerate(sites):
            if not isinstance(site, (ConvSite, ModelSite)):
                raise TypeError(f"sites[{index}] must be a ConvSite or ModelSite, got {site!r}")
            if isinstance(site, ModelSite) and site.place != "batch_norm":
                raise ValueError(f"sites[{index}].place must be 'batch_norm', got {site.place!r}")
        self.conv_sites = tuple(site if isinstance(site, ConvSite) else ConvSite.of(site) for site in sites)
        self.kinds = None if kinds is None else _checked_kinds(kinds)
        self._own = _checked_values(values, self.kinds)
        questions = [self._questions(site) for site in self.conv_sites]
        super().__init__([Site(site.name, site.depth) for site in self.conv_sites], questions)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Example,
        kinds: Sequence[str] | None = None,
        values: Values | None = None,
    ) -> ConvSpace:
        """The space of a model's sites, found by running the example; see `find_sites`.

        Raises:
            ValueError: the model has no sites; as the constructor.
        """
        sites = find_sites(model, example)
        if not sites:
            raise ValueError(
                f"model has no sites of place 'batch_norm' that the example reaches: {type(model).__name__}"
            )
        return cls(sites, kinds, values)

    def _questions(self, site: ConvSite) -> list[Question]:
        values = {**default_values(site), **self._own}
        if not site.ends_block:
            values["residual"] = (False,)
        tiles = tuple(size for size in values["size"] if size)
        if tiles:  # a single cell has none
            _check_tiles(site, {**values, "size": tiles})
        if self.kinds is None:
            size = Question("size", values["size"])
            return [size, *(Question(kind, values[kind], "size", tiles) for kind in TILED[1:])]
        kinds = tuple(kind for kind in self.kinds if kind != "tiled" or tiles)
        if not kinds:
            raise ValueError(f"kinds must hold another than 'tiled' for site {site.name!r}, whose map is a single cell")
        values["size"] = tiles
        return [
            Question("kind", kinds),
            *(Question(kind, values[kind], "kind", of) for kind, of in KIND_TOKENS.items() if set(of) & set(kinds)),
        ]

    def _pattern(self, answers: dict[str, Value]) -> Pattern | None:
        fields: dict[str, Any] = dict(answers)
        kind = fields.pop("kind", None)
        if kind == "off" or fields.get("size") == 0:
            return None
        if kind in BERNOULLI:
            return BernoulliPattern(shared=BERNOULLI[kind], **fields)
        return BlockPattern(**fields) if kind == "dropblock" else TiledPattern(**fields)

    def _answers(self, pattern: Pattern | None) -> dict[str, Value] | None:
        if self.kinds is None:
            if pattern is None:
                return {"size": 0.0}
            return _fields(pattern) if isinstance(pattern, TiledPattern) else None
        if pattern is None:
            return {"kind": "off"}
        if isinstance(pattern, BernoulliPattern):
            for kind, shared in BERNOULLI.items():
                if pattern.shared == shared:
                    return {"kind": kind, "rate": pattern.rate}
            return None
        if isinstance(pattern, (TiledPattern, BlockPattern)):
            return {"kind": "tiled" if isinstance(pattern, TiledPattern) else "dropblock", **_fields(pattern)}
        return None

    def to_json(self) -> dict[str, Any]:
        sites = [
            {"name": s.name, "depth": s.depth, "maps": [list(m) for m in s.maps], "ends_block": s.ends_block}
            for s in self.conv_sites
        ]
        kinds = None if self.kinds is None else list(self.kinds)
        return {"space": "conv", "kinds": kinds, "sites": sites, "tokens": self._tokens_json()}


def default_values(site: ConvSite) -> dict[str, tuple[Value, ...]]:
    """The value sets of a site, by kind of token; among the sizes is 0, "off"."""
    side = site.side
    tiles = [cells / side for cells in _cells(SIZES, side)]
    turned = side >= TURNED_FROM
    return {
        "rate": RATES,
        # A block that is larger than the map is the map.
        "block_size": tuple(size for size in BLOCK_SIZES if size < side + 2 or size == BLOCK_SIZES[0]),
        "size": (0.0, *(size for size in tiles if TiledPattern(size).expected_rate(side, side) <= LARGEST_TILE)),
        "stride": tuple(cells / side for cells in _cells(STRIDES, side)),
        "repeat": REPEATS,
        "rotate": ANGLES if turned else (0.0,),
        "shear_x": SHEARS if turned else (0.0,),
        "shear_y": SHEARS if turned else (0.0,),
        "share_c": (False, True),
        "residual": (False, True),
    }


def _cells(fractions: Sequence[float], side: int) -> list[int]:
    """Whole cells, at least one, rounded as `TiledPattern` does it; each number once."""
    return sorted({max(1, math.floor(fraction * side + 0.5)) for fraction in fractions})


def _fields(pattern: Pattern) -> dict[str, Value]:
    return {name: value for name, value in pattern.to_json().items() if name != "op"}


def _checked_kinds(kinds: object) -> tuple[str, ...]:
    known = ", ".join(map(repr, KINDS))
    if not isinstance(kinds, (tuple, list)):
        raise TypeError(f"kinds must be a tuple of some of {known}, or None, got {kinds!r}")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds must be some of {known}, got {kind!r}")
    if len(set(kinds)) < len(kinds) or not set(kinds) - {"off"}:
        raise ValueError(f"kinds must be different ones of {known}, and not 'off' alone, got {kinds!r}")
    return tuple(kinds)


def _checked_values(values: object, kinds: tuple[str, ...] | None) -> dict[str, tuple[Value, ...]]:
    """A user's value sets, each value checked and in the type of the pattern's field."""
    tokens = PAPER_TOKENS if kinds is None else KIND_TOKENS
    used = [kind for kind, of in tokens.items() if kinds is None or set(of) & set(kinds)]
    result = {
        kind: tuple(_checked_value(f"values[{kind!r}][{i}]", kind, value) for i, value in enumerate(given))
        for kind, given in checked_names(values, used).items()
    }
    sizes = result.get("size", (0.0, 1.0))
    if not any(sizes):
        raise ValueError(f"values['size'] must hold a size above 0, got {sizes!r}")
    if kinds is not None and "size" in result and not all(sizes):
        raise ValueError(
            f"values['size'] must be above 0 in a space with kinds, where off is one of them, got {sizes!r}"
        )
    return result


def _checked_value(name: str, kind: str, value: object) -> Value:
    if kind in ("share_c", "residual"):
        return flag(name, value)
    if kind == "repeat":
        return integer(name, value, 0, MAX_REPEAT)
    if kind == "block_size":
        return integer(name, value, 1, MAX_BLOCK)
    if kind == "rate":
        rate = real(name, value, 0, MAX_RATE)
        if rate == 0:
            raise ValueError(f"{name} must be above 0 (what drops nothing is the kind 'off'), got 0")
        return rate
    ranges = {"size": (0, MAX_SIZE), "stride": (0, MAX_STRIDE), "rotate": (-math.inf, math.inf)}
    return real(name, value, *ranges.get(kind, (-MAX_SHEAR, MAX_SHEAR)))


def _check_tiles(site: ConvSite, values: dict[str, tuple[Value, ...]]) -> None:
    """Refuses tiled patterns that the pattern itself or `apply_policy` would refuse on a map of the site."""
    if 0 in values["repeat"] and 0 in values["stride"]:
        raise ValueError(
            "values['stride'] must be above 0 where values['repeat'] holds 0 (unlimited tiles without gaps), "
            f"got stride {values['stride']!r}, repeat {values['repeat']!r}"
        )
    defaults = default_values(site)
    if all(set(values[kind]) <= set(defaults[kind]) for kind in SHAPE):
        return  # a test has enumerated those
    shapes = cast("tuple[tuple[float, ...], ...]", tuple(values[kind] for kind in SHAPE))
    for channels, height, width in site.maps:
        rate, shape = _highest_rate(shapes, height, width)
        if rate > MAX_RATE:
            raise ValueError(
                f"values must give expected rates of at most {MAX_RATE}, got {rate:.4f} at site {site.name!r} "
                f"(map {channels}x{height}x{width}) with {dict(zip(SHAPE, shape, strict=True))}"
            )


@lru_cache(maxsize=64)
def _highest_rate(shapes: tuple[tuple[float, ...], ...], height: int, width: int) -> tuple[float, tuple[float, ...]]:
    """The highest exact expected rate of all combinations on a map, and the combination that has it."""
    rated = ((TiledPattern(*shape).expected_rate(height, width), shape) for shape in itertools.product(*shapes))  # type: ignore[arg-type]
    return max(rated, key=lambda pair: pair[0])
