"""The search space of ConvNets: sequences and policies correspond, value sets are safe and spread as documented."""

from __future__ import annotations

import itertools
import random
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from space_cases import check_every_sequence
from space_cases import check_json
from space_cases import check_random_sequences
from space_cases import check_row
from space_cases import distribution
from space_cases import sequences

from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Pattern
from autodropout import Policy
from autodropout import Site
from autodropout import TiledPattern
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout import remove_policy
from autodropout.reproduce.methods import STRENGTHS
from autodropout.reproduce.methods import method_policy
from autodropout.reproduce.models.wide_resnet import WideResNet
from autodropout.search.conv_space import KINDS
from autodropout.search.conv_space import SHAPE
from autodropout.search.conv_space import TILED
from autodropout.search.conv_space import ConvSite
from autodropout.search.conv_space import ConvSpace
from autodropout.search.conv_space import default_values
from autodropout.search.space import Value
from autodropout.sites import find_sites

DIGITS = (10, 1, 10, 1), torch.zeros(1, 1, 8, 8)
CIFAR = (28, 2), torch.zeros(1, 3, 32, 32)


def network(which: tuple[Any, torch.Tensor]) -> tuple[WideResNet, torch.Tensor]:
    return WideResNet(*which[0]), which[1]


def site(*sides: int, name: str = "a", depth: float = 0.0, ends_block: bool = True) -> ConvSite:
    height, width = sides if len(sides) == 2 else sides * 2
    return ConvSite(name, depth, ((16, height, width),), ends_block)


def one(pattern: Pattern | None) -> Policy:
    return Policy((Site("a", 0.0, pattern=pattern),))


def kinds_of(space: ConvSpace, index: int) -> list[str]:
    return [token.kind for token in space.tokens if token.site == index]


# ---------------------------------------------------------------------------------------------------- tokens


def test_the_tokens_of_the_paper_in_its_order() -> None:
    space = ConvSpace.of(*network(DIGITS))
    order = ["size", "stride", "repeat", "rotate", "shear_x", "shear_y", "share_c", "residual"]
    assert [kinds_of(space, index) for index in range(7)] == [order] * 7
    # WideBlock's second normalisation is its last site.
    ends = [token.values == (False, True) for token in space.tokens if token.kind == "residual"]
    assert ends == [False, True, False, True, False, True, False]
    assert {token.values for token in space.tokens if token.kind == "residual"} == {(False,), (False, True)}
    sizes = [token.values for token in space.tokens if token.kind == "size"]
    assert sizes[0] == (0.0, 1 / 8, 3 / 8, 4 / 8)  # 8x8
    assert sizes[3] == (0.0, 1 / 4, 2 / 4)  # 4x4
    assert sizes[6] == (0.0, 1 / 2)  # 2x2
    for start in range(0, 56, 8):
        sizes_on = tuple(range(1, len(space.tokens[start].values)))
        assert [t.when for t in space.tokens[start : start + 8]] == [None] + [(start, sizes_on)] * 7


def test_off_leaves_the_others_unasked() -> None:
    space = ConvSpace([site(8), site(8, name="b", depth=1.0)])
    choices = (0,) * 8 + (1,) * 8
    assert space.asked(choices) == [True] + [False] * 7 + [True] * 8
    off, on = space.decode(choices).sites
    assert off == Site("a", 0.0, "batch_norm", None)
    tiled = TiledPattern(1 / 8, 4 / 8, 2, 22.5, 0.0, 0.0, share_c=True, residual=True)
    assert on == Site("b", 1.0, "batch_norm", tiled)
    with pytest.raises(
        ValueError, match=r"^choices\[3\] \(rotate of site 0\) must be in \[0, 1\), as the token is not"
    ):
        space.decode((0, 0, 0, 1) + (0,) * 12)


def test_one_more_token_says_which_kind() -> None:
    space = ConvSpace([site(16)], kinds=KINDS)
    assert kinds_of(space, 0) == ["kind", "rate", "block_size", *TILED]
    of = {token.kind: None if token.when is None else [KINDS[c] for c in token.when[1]] for token in space.tokens}
    assert of == {
        "kind": None,
        "rate": ["dropout", "spatialdropout", "dropblock"],
        "block_size": ["dropblock"],
        **{kind: ["tiled"] for kind in TILED},
        "share_c": ["tiled", "dropblock"],
    }
    assert 0.0 not in space.tokens[3].values
    patterns = {type(space.decode(choices).sites[0].pattern) for choices, _ in itertools.islice(sequences(space), 60)}
    assert patterns == {type(None), TiledPattern}


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("off", "dropout"), ["kind", "rate"]),
        (("dropblock",), ["kind", "rate", "block_size", "share_c"]),
        (["off", "tiled"], ["kind", *TILED]),
        (("spatialdropout", "tiled"), ["kind", "rate", *TILED]),
    ],
)
def test_a_subset_of_the_kinds_has_their_tokens(kinds: tuple[str, ...], expected: list[str]) -> None:
    space = ConvSpace([site(16)], kinds=kinds)
    assert kinds_of(space, 0) == expected
    assert space.tokens[0].values == tuple(kinds)


def test_a_site_of_one_cell_is_not_tiled() -> None:
    space = ConvSpace([site(1), site(4, name="b", depth=1.0)])
    assert kinds_of(space, 0) == ["size"]
    assert kinds_of(space, 1) == list(TILED)
    assert space.decode((0,) * 9).sites[0].pattern is None
    with_values = ConvSpace([site(1), site(4, name="b", depth=1.0)], values={"rotate": (0.0, 15.0)})
    assert kinds_of(with_values, 0) == ["size"]
    with_kinds = ConvSpace([site(1)], kinds=KINDS)
    assert with_kinds.tokens[0].values == ("off", "dropout", "spatialdropout", "dropblock")
    with pytest.raises(ValueError, match=r"^kinds must hold another than 'tiled' for site 'a', whose map is a single"):
        ConvSpace([site(1)], kinds=["tiled"])


def test_sites_may_be_those_of_a_model_or_explicit() -> None:
    model, example = network(DIGITS)
    found = find_sites(model, example)
    space = ConvSpace.of(model, example)
    explicit = [ConvSite(s.name, s.depth, s.maps, s.block is not None) for s in found]
    for same in (ConvSpace(found), ConvSpace(explicit)):
        assert same.to_json() == space.to_json()
        assert same.fingerprint() == space.fingerprint()
    other_types = [ConvSite(s.name, s.depth, [list(m) for m in s.maps], s.ends_block) for s in explicit]  # type: ignore[arg-type, misc]
    other_types[0] = ConvSite(explicit[0].name, 0, explicit[0].maps)
    assert ConvSpace(other_types).fingerprint() == space.fingerprint()
    assert ConvSpace(explicit, kinds=KINDS).fingerprint() != space.fingerprint()
    assert ConvSpace(explicit, values={"rotate": (0.0, 15.0)}).fingerprint() != space.fingerprint()
    assert ConvSpace([*explicit[:-1], site(2, name="bn", depth=1.0)]).fingerprint() != space.fingerprint()


def test_value_sets_can_be_restricted_and_extended() -> None:
    values = {"rotate": (0, 15, 30), "repeat": [1, 4], "share_c": (False,), "size": (0, 0.2)}
    space = ConvSpace.of(*network(DIGITS), values=values)
    for index in range(7):
        own = {token.kind: token.values for token in space.tokens if token.site == index}
        assert own["rotate"] == (0.0, 15.0, 30.0)
        assert own["repeat"] == (1, 4)
        assert own["share_c"] == (False,)
        assert own["size"] == (0.0, 0.2)
    choices = (1, 2, 1, 2, 0, 0, 0, 0) + (0,) * 48
    assert space.decode(choices).sites[0].pattern == TiledPattern(0.2, 5 / 8, 4, 30.0, -0.5, -0.5)
    # The same values in other types are the same space.
    same = {"rotate": [0.0, 15.0, 30.0], "repeat": (1, 4), "share_c": [False], "size": [0.0, 0.2]}
    assert ConvSpace.of(*network(DIGITS), values=same).fingerprint() == space.fingerprint()


def test_a_site_that_sees_several_maps_is_safe_on_all() -> None:
    maps = ((16, 32, 32), (16, 4, 4))
    assert default_values(ConvSite("a", 0.0, maps)) == default_values(site(4))
    values = {"size": (1.66,), "repeat": (1,), "rotate": (0.0,), "shear_x": (0.0,), "shear_y": (0.0,)}
    ConvSpace([ConvSite("a", 0.0, maps[:1])], values=values)
    with pytest.raises(ValueError, match=re.escape("at site 'a' (map 16x4x4)")):  # 1.66 * 4 is rounded to 7 cells
        ConvSpace([ConvSite("a", 0.0, maps)], values=values)


# ---------------------------------------------------------------------------------------------------- bijection

SMALL: dict[str, tuple[Value, ...]] = {
    "size": (0.25, 0.5),
    "stride": (0.5,),
    "repeat": (1, 0),
    "rotate": (0.0, 45.0),
    "shear_x": (0.0,),
    "shear_y": (-0.5, 0.5),
}


def test_every_sequence_of_a_small_space() -> None:
    two = [site(4, ends_block=False), site(4, name="b", depth=1.0)]
    tiled = [2 * 2 * 2 * 2 * 2, 2 * 2 * 2 * 2 * 2 * 2]  # the second one ends a block
    off = {**SMALL, "size": (0.0, 0.25, 0.5)}
    check_every_sequence(ConvSpace(two, values=off), (1 + tiled[0]) * (1 + tiled[1]))
    with_kinds = {**SMALL, "rate": (0.1, 0.2), "block_size": (3,)}
    classical = 2 + 2 + 2 * 1 * 2
    check_every_sequence(ConvSpace(two[1:], KINDS, with_kinds), 1 + tiled[1] + classical)
    check_every_sequence(
        ConvSpace(two, ("off", "dropblock", "dropout"), {"rate": (0.1,), "block_size": (3, 5)}), (1 + 2 * 2 + 1) ** 2
    )


@pytest.mark.parametrize("kinds", [None, KINDS])
@pytest.mark.parametrize(("which", "count"), [(DIGITS, 1000), (CIFAR, 50)])
def test_random_sequences(which: Any, count: int, kinds: tuple[str, ...] | None, tmp_path: Path) -> None:
    check_random_sequences(ConvSpace.of(*network(which), kinds=kinds), count, tmp_path)


@pytest.mark.parametrize("kinds", [None, KINDS])
def test_json(kinds: tuple[str, ...] | None) -> None:
    space = ConvSpace([site(8, 6), site(1, name="b", depth=1.0)], kinds)
    check_json(space)
    assert space.to_json()["sites"][0] == {"name": "a", "depth": 0.0, "maps": [[16, 8, 6]], "ends_block": True}


def test_classical_regularisers_are_points_of_the_space() -> None:
    for which, block_size in ((DIGITS, 3), (CIFAR, 7)):  # those of table2_cifar.py
        space = ConvSpace.of(*network(which), kinds=KINDS)
        for method in ("dropout", "spatialdropout", "dropblock"):
            for strength in STRENGTHS[method]:
                pattern = method_policy(method, strength, 3, block_size, one(None)).pattern_at(0.0)
                assert pattern is not None
                policy = Policy(tuple(Site(s.name, s.depth, s.place, pattern) for s in space.sites))
                assert space.decode(space.encode(policy)) == policy


# ---------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize("kinds", [None, KINDS])
@pytest.mark.parametrize(("which", "count"), [(DIGITS, 12), (CIFAR, 3)])
def test_networks_accept_the_policies(which: Any, count: int, kinds: tuple[str, ...] | None) -> None:
    model, example = network(which)
    space = ConvSpace.of(model, example, kinds=kinds)
    generator = random.Random(5)
    for _ in range(count):
        policy = space.decode(space.sample(generator))
        applied = apply_policy(model, policy, example)
        assert [(s.name, s.pattern) for s in applied] == [
            (s.name, s.pattern) for s in policy.sites if s.pattern is not None
        ]
        remove_policy(model)


@pytest.mark.parametrize("side", [2, 4, 7, 8, 14, 16, 28, 32, 56])
def test_rates_spread_as_documented(side: int) -> None:
    """Exactly, by all sequences of a site. Even: the distribution where on is nowhere far from that of [0, 0.3]."""
    fixed = {"share_c": (False,), "residual": (False,)}  # these change no rate
    space = ConvSpace([site(side)], values=fixed)
    rates: list[tuple[float | None, Fraction]] = []
    for choices, share in sequences(space):
        pattern = space.decode(choices).sites[0].pattern
        rates.append((None if pattern is None else pattern.expected_rate(side, side), share))
    sizes, strides = (space.tokens[at].values for at in (0, 1))
    cells = [", ".join(str(round(float(value) * side)) for value in values if value) for values in (sizes, strides)]
    check_row(side, *cells, distribution(rates))

    on = [(rate, share) for rate, share in rates if rate is not None]
    off = 1 - sum(share for _, share in on)
    assert Fraction(1, 5) <= off <= Fraction(1, 2)
    assert sum(share for rate, share in on if rate > 0.3) <= Fraction(9, 100) * (1 - off)
    bounds = {4: 0.15, 7: 0.11, 8: 0.11}  # few cells, few rates
    if side > 2:
        for level in range(1, 10):
            share = sum(share for rate, share in on if rate <= 0.3 * level / 10) / (1 - off)
            assert abs(share - Fraction(level, 10)) < bounds.get(side, 0.06), level


def test_no_default_pattern_comes_near_the_limit() -> None:
    """Maps that are not square, too: default value sets are not checked when a space is made."""
    shapes = [(side, side) for side in (2, 3, 5, 6, 9, 11)]
    for height, width in [*shapes, (2, 3), (2, 64), (3, 7), (5, 16), (4, 12), (6, 9), (16, 5)]:
        values = default_values(site(height, width))
        tiles = tuple(size for size in values["size"] if size)
        combinations = itertools.product(tiles, *(values[kind] for kind in SHAPE[1:]))
        assert max(TiledPattern(*shape).expected_rate(height, width) for shape in combinations) < 0.62  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rot": (1,)},
            "values must be for some of the tokens size, stride, repeat, rotate, shear_x, shear_y, share_c, r",
        ),
        ({"rate": (0.1,)}, "values must be for some of the tokens size, stride,"),
        ((0.0, 15.0), "values must be a mapping from kinds of tokens to values, got (0.0, 15.0)"),
        ({"rotate": ()}, "values['rotate'] must hold at least one value, got none"),
        ({"rotate": 15.0}, "values['rotate'] must be a tuple or list, got 15.0"),
        ({"rotate": (0, "15")}, "values['rotate'][1] must be a finite number, got '15' of type str"),
        ({"size": (0, 2.5)}, "values['size'][1] must be in [0, 2], got 2.5"),
        ({"size": (0.0,)}, "values['size'] must hold a size above 0, got (0.0,)"),
        ({"size": (0.1, 0.1)}, "values must all differ, got (0.1, 0.1) for 'size'"),
        ({"repeat": (1, 1.5)}, "values['repeat'][1] must be an integer in [0, 64], got 1.5"),
        ({"shear_y": (3,)}, "values['shear_y'][0] must be in [-2, 2], got 3"),
        ({"share_c": (0, 1)}, "values['share_c'][0] must be True or False, got 0"),
        ({"stride": (0.0, 0.5)}, "values['stride'] must be above 0 where values['repeat'] holds 0"),
        (
            {"size": (0, 1.9)},
            "values must give expected rates of at most 0.95, got 1.0000 at site 'a' (map 16x8x8) with",
        ),
    ],
)
def test_bad_value_sets_are_named(values: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        ConvSpace([site(8)], values=values)


@pytest.mark.parametrize(
    ("kinds", "values", "message"),
    [
        (
            True,
            None,
            "kinds must be a tuple of some of 'off', 'tiled', 'dropout', 'spatialdropout', 'dropblock', or None",
        ),
        (
            ("off", "droppath"),
            None,
            "kinds must be some of 'off', 'tiled', 'dropout', 'spatialdropout', 'dropblock', got",
        ),
        (("off",), None, "kinds must be different ones of"),
        ((), None, "kinds must be different ones of"),
        (("dropout", "dropout"), None, "kinds must be different ones of"),
        (KINDS, {"size": (0, 0.5)}, "values['size'] must be above 0 in a space with kinds, where off is one of them"),
        (
            KINDS,
            {"rate": (0.0, 0.1)},
            "values['rate'][0] must be above 0 (what drops nothing is the kind 'off'), got 0",
        ),
        (KINDS, {"rate": (0.96,)}, "values['rate'][0] must be in [0, 0.95], got 0.96"),
        (KINDS, {"block_size": (2.5,)}, "values['block_size'][0] must be an integer in [1, "),
        (("off", "dropout"), {"size": (0.5,)}, "values must be for some of the tokens rate, got 'size'"),
    ],
)
def test_bad_kinds_are_named(kinds: Any, values: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        ConvSpace([site(8)], kinds, values)


def test_bad_sites_are_named() -> None:
    with pytest.raises(ValueError, match=r"^sites must be a tuple of at least one ConvSite or ModelSite, got \(\)"):
        ConvSpace(())
    with pytest.raises(TypeError, match=r"^sites\[1\] must be a ConvSite or ModelSite, got 'b'"):
        ConvSpace((site(4), "b"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^sites\[1\].name must differ from sites\[0\].name, got 'a'"):
        ConvSpace((site(4), site(4)))
    with pytest.raises(
        ValueError, match=r"^maps must hold at least one \(channels, height, width\), got none for 'bn1'"
    ):
        ConvSpace(find_sites(torchvision.models.resnet18()))
    with pytest.raises(ValueError, match=r"^maps must hold \(channels, height, width\), got \(4, 4\) for 'a'"):
        ConvSite("a", 0.0, ((4, 4),))  # type: ignore[arg-type]
    model, example = network(DIGITS)
    with pytest.raises(ValueError, match=r"^sites\[0\].place must be 'batch_norm', got 'branch'"):
        ConvSpace(find_sites(model, example, "branch"))
    with pytest.raises(ValueError, match=r"^model has no sites of place 'batch_norm' that the example reaches: Linear"):
        ConvSpace.of(torch.nn.Linear(2, 2), torch.zeros(1, 2))


IN_SPACE = TiledPattern(0.5, 0.5, 2, 45.0, 0.5, -0.5, True, False)


@pytest.mark.parametrize(
    ("kinds", "policy", "message"),
    [
        (None, Policy((Site("a", 0.0), Site("b", 1.0))), "sites must be 1, those of the space, got 2"),
        (None, Policy((Site("b", 0.0),)), "sites[0].name must be 'a' in this space, got 'b'"),
        (None, Policy((Site("a", 0.5),)), "sites[0].depth must be 0.0 in this space, got 0.5"),
        (None, Policy((Site("a", 0.0, "branch"),)), "sites[0].place must be 'batch_norm' in this space, got 'branch'"),
        (None, one(TiledPattern(0.3)), "sites[0] ('a'): size must be one of 0.0, 0.125, 0.375, 0.5, got 0.3 in Tiled"),
        (None, one(TiledPattern(0.5, 0.5, 3)), "sites[0] ('a'): repeat must be one of 1, 2, 0, got 3 in Tiled"),
        (
            None,
            one(TiledPattern(0.0, 0.5, 1)),
            "sites[0] ('a'): pattern must be None for what drops nothing, got Tiled",
        ),
        (None, one(BernoulliPattern(0.1)), "sites[0] ('a'): pattern must be of a kind that the space has, got Bern"),
        (
            KINDS,
            one(BernoulliPattern(0.11)),
            "sites[0] ('a'): rate must be one of 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, got 0",
        ),
        (KINDS, one(BernoulliPattern(0.1, "sample")), "sites[0] ('a'): pattern must be of a kind that the space has"),
        (KINDS, one(TokenPattern(1, rate=0.1)), "sites[0] ('a'): pattern must be of a kind that the space has"),
        (KINDS, one(BlockPattern(0.1, 4)), "sites[0] ('a'): block_size must be one of 3, 5, 7, got 4 in Block"),
        (KINDS, one(TiledPattern(0.0, 0.5)), "sites[0] ('a'): size must be one of 0.125, 0.375, 0.5, got 0.0 in Tiled"),
        (("off", "dropout"), one(IN_SPACE), "sites[0] ('a'): kind must be one of 'off', 'dropout', got 'tiled' in"),
        (("dropout",), one(None), "sites[0] ('a'): kind must be one of 'dropout', got 'off' in None"),
    ],
)
def test_other_policies_are_refused_by_site_and_field(kinds: Any, policy: Policy, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ConvSpace([site(8)], kinds).encode(policy)


def test_residual_is_refused_where_it_means_nothing() -> None:
    policy = one(TiledPattern(0.5, 0.5, residual=True))
    assert ConvSpace([site(8)], values={"rotate": (0.0,), "shear_x": (0.0,), "shear_y": (0.0,)}).encode(policy)
    with pytest.raises(ValueError, match=r"^sites\[0\] \('a'\): residual must be one of False, got True"):
        ConvSpace([site(8, ends_block=False)], values={"shear_x": (0.0,), "shear_y": (0.0,)}).encode(policy)
