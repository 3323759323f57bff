"""The search space of Transformers: sequences and policies correspond, rates spread as documented."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from space_cases import check_every_sequence
from space_cases import check_json
from space_cases import check_random_sequences
from space_cases import check_row
from space_cases import distribution
from space_cases import sequences

from autodropout import BernoulliPattern
from autodropout import Pattern
from autodropout import Policy
from autodropout import Site
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout.policy import TOKEN_PLACES
from autodropout.reproduce.models.wide_resnet import WideResNet
from autodropout.search.token_space import TokenSite
from autodropout.search.token_space import TokenSpace

LAYERS = [
    TokenSite(f"layers.{layer}.{place}", (6 * layer + i) / 11, place, 64)
    for layer in range(2)
    for i, place in enumerate(TOKEN_PLACES)
]


def site(length: int = 64, place: str = "query") -> TokenSite:
    return TokenSite("a", 0.0, place, length)


def one(pattern: Pattern | None) -> Policy:
    return Policy((Site("a", 0.0, "query", pattern),))


def test_the_tokens_of_a_site() -> None:
    space = TokenSpace(LAYERS)
    assert TOKEN_PLACES == ("query", "key", "value", "softmax", "output", "residual")
    assert [token.kind for token in space.tokens] == ["size", "stride", "share_t", "share_c", "rate"] * 12
    assert [s.place for s in space.decode(space.encode(space.decode((0,) * 60))).sites] == list(TOKEN_PLACES) * 2
    size, stride, share_t, share_c, rate = space.tokens[5:10]
    assert size.values == (0, 1, 4, 16, 64)
    assert size.when is None
    assert stride.when == (5, (1, 2, 3))  # not after off, nor after the whole sequence
    assert share_t.when == (5, (2, 3, 4))  # nor after a single token
    assert share_c.when == rate.when == (5, (1, 2, 3, 4))


def test_the_special_cases_are_points_of_the_space() -> None:
    """Dropout, word dropout and variational dropout."""
    space = TokenSpace([site()])
    for pattern in (
        TokenPattern(1, 0, rate=0.1),
        TokenPattern(1, 0, rate=0.2, share_c=True),
        TokenPattern(64, 0, rate=0.3, share_t=True),
        None,
    ):
        assert space.decode(space.encode(one(pattern))) == one(pattern)


@pytest.mark.parametrize(("length", "sizes"), [(1, (0, 1)), (2, (0, 1, 2)), (4, (0, 1, 4)), (5, (0, 1, 4, 5))])
def test_sizes_of_short_sequences(length: int, sizes: tuple[int, ...]) -> None:
    assert TokenSpace([site(length)]).tokens[0].values == sizes


def test_value_sets_can_be_restricted_and_extended() -> None:
    space = TokenSpace([site(64), TokenSite("b", 1.0, "softmax", 8)], {"rate": (0.15,), "size": [0, 2, 8]})
    values = [(token.site, token.kind, token.values, token.when) for token in space.tokens if token.kind != "share_c"]
    assert values == [
        (0, "size", (0, 2, 8), None),
        (0, "stride", (0, 2, 8), (0, (1, 2))),
        (0, "share_t", (False, True), (0, (1, 2))),
        (0, "rate", (0.15,), (0, (1, 2))),
        (1, "size", (0, 2, 8), None),
        (1, "stride", (0, 2, 8), (5, (1,))),  # 8 is the whole sequence there
        (1, "share_t", (False, True), (5, (1, 2))),
        (1, "rate", (0.15,), (5, (1, 2))),
    ]
    # A token that is never asked is left out; one that always is has no condition.
    always = TokenSpace([site(64)], {"size": (1,)})
    assert [(token.kind, token.when) for token in always.tokens] == [
        ("size", None),
        ("stride", None),
        ("share_c", None),
        ("rate", None),
    ]


def test_every_sequence_of_a_small_space() -> None:
    # off; one token: strides x share_c x rates; 4 tokens: also share_t; the sequence: share_t x share_c x rates
    count = 1 + 3 * 2 * 3 + 3 * 2 * 2 * 3 + 2 * 2 * 3
    check_every_sequence(TokenSpace([site(8)]), count)
    two = [site(8), TokenSite("b", 1.0, "value", 64)]
    check_every_sequence(TokenSpace(two, {"size": (0, 1, 8), "rate": (0.1, 0.2)}), (1 + 12 + 8) * (1 + 12 + 24))


def test_random_sequences(tmp_path: Path) -> None:
    check_random_sequences(TokenSpace(LAYERS), 700, tmp_path)


def test_json() -> None:
    space = TokenSpace(LAYERS)
    check_json(space)
    assert space.to_json()["sites"][1] == {"name": "layers.0.key", "depth": 1 / 11, "place": "key", "length": 64}
    assert space.fingerprint() == TokenSpace(list(LAYERS)).fingerprint()
    assert space.fingerprint() != TokenSpace(LAYERS, {"rate": (0.1,)}).fingerprint()


@pytest.mark.parametrize("length", [64, 128, 512])
def test_rates_spread_as_documented(length: int) -> None:
    space = TokenSpace([site(length)])
    rates: list[tuple[float | None, Fraction]] = []
    for choices, share in sequences(space):
        pattern = space.decode(choices).sites[0].pattern
        assert pattern is None or isinstance(pattern, TokenPattern)
        rates.append((None if pattern is None else pattern.expected_rate(length), share))
    check_row(length, distribution(rates))
    on = [(rate, share) for rate, share in rates if rate is not None]
    assert sum(share for _, share in on) == Fraction(4, 5)
    assert max(rate for rate, _ in on) <= 0.3
    for level in range(1, 10):
        share = sum(share for rate, share in on if rate <= 0.3 * level / 10 + 1e-9) / Fraction(4, 5)
        assert abs(share - Fraction(level, 10)) < Fraction(16, 100), level


def test_convnets_refuse_the_places_of_transformers() -> None:
    policy = TokenSpace([site()]).decode((0,) * 5)
    with pytest.raises(ValueError, match=r"^model has no sites of place 'query' that the example reaches: WideResNet"):
        apply_policy(WideResNet(10, 1), policy, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repeat": (1,)}, "values must be for some of the tokens size, stride, share_t, share_c, rate, got 'repeat'"),
        ({"size": (0,)}, "values['size'] must hold a size above 0, got (0,)"),
        ({"size": (0.5,)}, "values['size'][0] must be an integer in [0, 1073741823], got 0.5 of type float"),
        ({"stride": (-1,)}, "values['stride'][0] must be an integer in [0, 1073741823], got -1"),
        ({"rate": (0.1, 0)}, "values['rate'][1] must be above 0 (what drops nothing is size 0), got 0"),
        ({"rate": (1.5,)}, "values['rate'][0] must be in [0, 1], got 1.5"),
        ({"share_t": (1,)}, "values['share_t'][0] must be True or False, got 1"),
        (
            {"rate": (0.1, 1.0)},
            "values must give expected rates of at most 0.95, got 1.0000 at site 'a' (64 tokens) with",
        ),
        ({"size": (4, 4)}, "values must all differ, got (4, 4) for 'size'"),
    ],
)
def test_bad_value_sets_are_named(values: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        TokenSpace([site()], values)


def test_a_rate_of_one_is_allowed_where_little_is_covered() -> None:
    TokenSpace([site()], {"size": (0, 4), "stride": (12,), "rate": (1.0,)})


def test_bad_sites_are_named() -> None:
    with pytest.raises(ValueError, match=r"^place must be one of 'query', 'key', 'value', 'softmax', 'output', 'resid"):
        site(place="batch_norm")
    with pytest.raises(ValueError, match=r"^length must be an integer in \[1, 1073741823\], got 0"):
        site(length=0)
    with pytest.raises(ValueError, match=r"^sites must be a tuple of at least one TokenSite, got \[\]"):
        TokenSpace([])
    with pytest.raises(TypeError, match=r"^sites\[0\] must be a TokenSite, got 'a'"):
        TokenSpace(["a"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy((Site("a", 0.0, "key"),)), "sites[0].place must be 'query' in this space, got 'key'"),
        (one(BernoulliPattern(0.1)), "sites[0] ('a'): pattern must be of a kind that the space has, got Bernoulli"),
        (one(TokenPattern(3, rate=0.1)), "sites[0] ('a'): size must be one of 0, 1, 4, 16, 64, got 3 in Token"),
        (one(TokenPattern(4, 3, rate=0.1)), "sites[0] ('a'): stride must be one of 0, 2, 8, got 3 in Token"),
        (one(TokenPattern(64, 2, rate=0.1)), "sites[0] ('a'): stride must be 0 here, got 2 in Token"),
        (one(TokenPattern(1, 2, rate=0.1, share_t=True)), "sites[0] ('a'): share_t must be False here, got True in"),
    ],
)
def test_other_policies_are_refused_by_site_and_field(policy: Policy, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        TokenSpace([site()]).encode(policy)
