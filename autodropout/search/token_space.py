"""The search space of Transformers: the paper's four tokens for each site, and the rate that it leaves open.

The tokens are the paper's (Pham & Le 2021); the rate, off as a size of 0, and all value sets are ours, chosen by the
expected rates of uniform sequences: docs/search-space.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..apply import MAX_RATE
from ..patterns import Pattern
from ..patterns import TokenPattern
from ..patterns.checks import choice
from ..patterns.checks import flag
from ..patterns.checks import integer
from ..patterns.checks import real
from ..patterns.token import MAX_SPAN
from ..policy import TOKEN_PLACES
from ..policy import Site
from .site_space import Question
from .site_space import SiteSpace
from .site_space import Values
from .site_space import checked_names
from .space import Value

# In tokens. The length of the site is one more size.
SIZES = (1, 4, 16)
STRIDES = (0, 2, 8)
RATES = (0.1, 0.2, 0.3)
TOKENS = ("size", "stride", "share_t", "share_c", "rate")


@dataclass(frozen=True)
class TokenSite:
    """A site of a Transformer, as far as a search space needs it.

    Args:
        name: any string that no other site has, for example "layers.3.query".
        depth: position in order of execution, from 0 (the first site) to 1 (the last).
        place: "query", "key", "value", "softmax", "output" or "residual".
        length: tokens of a sequence; at the softmax, keys.

    Raises:
        TypeError, ValueError: naming the field.
    """

    name: str
    depth: float
    place: str
    length: int

    def __post_init__(self) -> None:
        # Equal sites should also look equal in JSON.
        object.__setattr__(self, "depth", real("depth", self.depth, 0, 1))
        choice("place", self.place, TOKEN_PLACES)
        object.__setattr__(self, "length", integer("length", self.length, 1, MAX_SPAN))


class TokenSpace(SiteSpace):
    """Token patterns for the sites of a Transformer, each with the tokens size, stride, share_t, share_c, rate.

    Size 0 is "off", after which the others are not asked. A size of the whole sequence has no stride, and a size of one
    token nothing to share in time: stride is then 0 and share_t False, without being asked.

    Args:
        sites: in order of execution.
        values: value sets by kind of token, the same for every site, in place of the default ones:
            `{"rate": (0.1,)}`. A single value is fixed.

    Raises:
        TypeError, ValueError: naming the argument; also where value sets hold a pattern whose expected rate on its site
            is above 0.95.
    """

    def __init__(self, sites: Sequence[TokenSite], values: Values | None = None) -> None:
        if not isinstance(sites, (tuple, list)) or not sites:
            raise ValueError(f"sites must be a tuple of at least one TokenSite, got {sites!r}")
        for index, site in enumerate(sites):
            if not isinstance(site, TokenSite):
                raise TypeError(f"sites[{index}] must be a TokenSite, got {site!r}")
        own = _checked_values(values)
        self.token_sites = tuple(sites)
        questions = [_questions(site, {**default_values(site), **own}) for site in sites]
        super().__init__([Site(site.name, site.depth, site.place) for site in sites], questions)

    def _pattern(self, answers: dict[str, Value]) -> Pattern | None:
        fields: dict[str, Any] = dict(answers)
        return TokenPattern(**fields) if fields["size"] else None

    def _answers(self, pattern: Pattern | None) -> dict[str, Value] | None:
        if pattern is None:
            return {"size": 0}
        if not isinstance(pattern, TokenPattern):
            return None
        return {kind: getattr(pattern, kind) for kind in TOKENS}

    def to_json(self) -> dict[str, Any]:
        sites = [{"name": s.name, "depth": s.depth, "place": s.place, "length": s.length} for s in self.token_sites]
        return {"space": "token", "sites": sites, "tokens": self._tokens_json()}


def default_values(site: TokenSite) -> dict[str, tuple[Value, ...]]:
    """The value sets of a site, by kind of token; among the sizes is 0, "off"."""
    return {
        "size": (0, *(size for size in SIZES if size < site.length), site.length),
        "stride": STRIDES,
        "share_t": (False, True),
        "share_c": (False, True),
        "rate": RATES,
    }


def _questions(site: TokenSite, values: dict[str, tuple[Value, ...]]) -> list[Question]:
    sizes = [int(size) for size in values["size"]]
    spans = {
        "stride": [size for size in sizes if 0 < size < site.length],
        "share_t": [size for size in sizes if size > 1],
    }
    on = [size for size in sizes if size > 0]
    _check_rates(site, on, values)
    others = (Question(kind, values[kind], "size", tuple(spans.get(kind, on))) for kind in TOKENS[1:])
    return [Question("size", values["size"]), *others]


def _check_rates(site: TokenSite, sizes: list[int], values: dict[str, tuple[Value, ...]]) -> None:
    for size, stride, rate in itertools.product(sizes, values["stride"], values["rate"]):
        pattern = TokenPattern(size, int(stride), rate=float(rate))
        expected = pattern.expected_rate(site.length)
        if expected > MAX_RATE:
            raise ValueError(
                f"values must give expected rates of at most {MAX_RATE}, got {expected:.4f} at site {site.name!r} "
                f"({site.length} tokens) with {pattern!r}"
            )


def _checked_values(values: object) -> dict[str, tuple[Value, ...]]:
    """A user's value sets, each value checked and in the type of the pattern's field."""
    result = {
        kind: tuple(_checked_value(f"values[{kind!r}][{i}]", kind, value) for i, value in enumerate(given))
        for kind, given in checked_names(values, TOKENS).items()
    }
    if not any(result.get("size", (1,))):
        raise ValueError(f"values['size'] must hold a size above 0, got {result['size']!r}")
    return result


def _checked_value(name: str, kind: str, value: object) -> Value:
    if kind in ("share_t", "share_c"):
        return flag(name, value)
    if kind == "rate":
        rate = real(name, value, 0, 1)
        if rate == 0:
            raise ValueError(f"{name} must be above 0 (what drops nothing is size 0), got 0")
        return rate
    return integer(name, value, 0, MAX_SPAN)
