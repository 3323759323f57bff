"""Policies: schema, errors that name the field, depth mapping, files and the shipped policy."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import math
import os
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from autodropout.patterns import BernoulliPattern
from autodropout.patterns import BlockPattern
from autodropout.patterns import TiledPattern
from autodropout.policy import Policy
from autodropout.policy import Site
from autodropout.policy import load_policy
from autodropout.policy import shipped_policies

PLACES = "'batch_norm', 'branch', 'query', 'key', 'value', 'softmax', 'output', 'residual', 'feed_forward'"
POLICY = Policy(
    (
        Site("a", 0.0, pattern=TiledPattern(0.25, stride=0.5, repeat=2, residual=True)),
        Site("b", 0.25, pattern=None),
        Site("c", 0.5, pattern=BernoulliPattern(0.2, "map")),
        Site("d", 1, "batch_norm", BlockPattern(0.1, 7)),
    ),
    {"kind": "test", "scores": [1, 2.5, None]},
)


def numbered(*depths: float) -> Policy:
    """One site per depth; the rate of its pattern is (index + 1) / 100."""
    return Policy(tuple(Site(f"s{i}", d, pattern=BernoulliPattern((i + 1) / 100)) for i, d in enumerate(depths)))


def index_at(policy: Policy, depth: float) -> int:
    pattern = policy.pattern_at(depth)
    assert isinstance(pattern, BernoulliPattern)
    return round(pattern.rate * 100) - 1


# ---------------------------------------------------------------------------------------------------- depth


def test_the_nearest_site_gives_the_pattern() -> None:
    policy = numbered(0.0, 0.3, 1.0)
    for depth, expected in ((0, 0), (0.1, 0), (0.2, 1), (0.3, 1), (0.64, 1), (0.66, 2), (1, 2)):
        assert index_at(policy, depth) == expected


def test_ties_go_to_the_earlier_site_even_where_floats_round_the_other_way() -> None:
    rounded_away = 0
    for source in range(2, 14):
        policy = numbered(*(i / (source - 1) for i in range(source)))
        for target in range(2, 40):
            for t in range(target):
                exact = [abs(Fraction(i, source - 1) - Fraction(t, target - 1)) for i in range(source)]
                assert index_at(policy, t / (target - 1)) == exact.index(min(exact))
                floats = [abs(i / (source - 1) - t / (target - 1)) for i in range(source)]
                rounded_away += floats.index(min(floats)) != exact.index(min(exact))
    assert rounded_away > 0  # otherwise this test would not see a comparison of bare floats


def test_earlier_means_less_deep_whatever_the_order_of_the_list() -> None:
    assert index_at(numbered(1.0, 0.5, 0.0), 0.25) == 2
    assert index_at(numbered(0.5, 0.5), 0.5) == 0


def test_a_uniform_policy_is_the_same_everywhere() -> None:
    pattern = BlockPattern(0.1, 7)
    policy = Policy.uniform(pattern)
    assert [site.name for site in policy.sites] == ["*"]
    for depth in (0.0, 0.5, 1.0):
        assert policy.pattern_at(depth) is pattern
    assert Policy.uniform(None).pattern_at(0.3) is None


@pytest.mark.parametrize("depth", [-0.1, 1.1, math.nan])
def test_a_depth_outside_the_network_is_refused(depth: float) -> None:
    with pytest.raises(ValueError, match=r"^depth must be in \[0, 1\], got "):
        POLICY.pattern_at(depth)
    with pytest.raises(ValueError, match=r"^depth must be in \[0, 1\], got "):
        Site("a", depth)


# ---------------------------------------------------------------------------------------------------- values


def test_policies_are_values() -> None:
    same = Policy(list(POLICY.sites), dict(POLICY.provenance))  # type: ignore[arg-type]
    assert same == POLICY
    assert hash(same) == hash(POLICY)
    assert isinstance(same.sites, tuple)
    for twin in (copy.deepcopy(POLICY), pickle.loads(pickle.dumps(POLICY))):
        assert twin == POLICY
    with pytest.raises(dataclasses.FrozenInstanceError):
        POLICY.sites = ()  # type: ignore[misc]


def test_provenance_is_copied_and_must_be_json() -> None:
    provenance = {"list": [1]}
    policy = Policy(POLICY.sites, provenance)
    provenance["list"].append(2)
    assert policy.provenance == {"list": [1]}
    policy.to_json()["provenance"]["list"].append(3)
    assert policy.provenance == {"list": [1]}
    for bad in ({"a": (1, 2)}, {1: "a"}, {"a": math.nan}, {"a": object()}):
        with pytest.raises(ValueError, match=r"^provenance must hold only what JSON can hold"):
            Policy(POLICY.sites, bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^provenance must be an object, got None"):
        Policy(POLICY.sites, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Policy(()), ValueError, "sites must hold at least one site, got none"),
        (lambda: Policy(Site("a", 0)), TypeError, "sites must be a tuple of Site, got Site("),
        (lambda: Policy((BernoulliPattern(0.1),)), TypeError, "sites[0] must be a Site, got BernoulliPattern("),
        (
            lambda: Policy((Site("a", 0), Site("b", 0.5), Site("a", 1))),
            ValueError,
            "sites[2].name must differ from sites[0].name, got 'a'",
        ),
        (lambda: Site("", 0), ValueError, "name must not be empty, got ''"),
        (lambda: Site(3, 0), TypeError, "name must be a string, got 3 of type int"),
        (lambda: Site("a", "0"), TypeError, "depth must be in [0, 1], got '0' of type str"),
        (lambda: Site("a", 0, "relu"), ValueError, f"place must be one of {PLACES}, got 'relu'"),
        (lambda: Site("a", 0, pattern=0.5), TypeError, "pattern must be a Pattern or None, got 0.5 of type float"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        make()


def test_scaled_scales_every_pattern_and_says_so() -> None:
    scaled = POLICY.scaled(0.5)
    assert [site.pattern for site in scaled.sites] == [
        TiledPattern(0.125, stride=0.5, repeat=2, residual=True),
        None,
        BernoulliPattern(0.1, "map"),
        BlockPattern(0.05, 7),
    ]
    assert [(s.name, s.depth, s.place) for s in scaled.sites] == [(s.name, s.depth, s.place) for s in POLICY.sites]
    assert scaled.provenance == {"scaled_by": 0.5, "from": POLICY.provenance}
    with pytest.raises(ValueError, match=r"^factor must be finite and at least 0, got -1$"):
        POLICY.scaled(-1)


# ---------------------------------------------------------------------------------------------------- JSON


def test_json_round_trip() -> None:
    data = POLICY.to_json()
    assert list(data) == ["schema", "masks", "sites", "provenance"]
    assert (data["schema"], data["masks"]) == (1, 1)
    assert list(data["sites"][0]) == ["name", "depth", "place", "pattern"]
    assert data["sites"][1] == {"name": "b", "depth": 0.25, "place": "batch_norm", "pattern": None}
    assert Policy.from_json(json.loads(json.dumps(data))) == POLICY


def test_provenance_may_be_left_out_of_a_file() -> None:
    data = POLICY.to_json()
    del data["provenance"]
    assert Policy.from_json(data) == Policy(POLICY.sites)


def change(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = to

    return apply


def remove(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        del data[path[-1]]

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("sites", 0, "pattern", "size", to=3.5), "sites[0].pattern.size: must be in [0, 2], got 3.5"),
        (change("sites", 0, "pattern", "tile", to=1), "sites[0].pattern.tile: unknown field, known are size, stride"),
        (remove("sites", 0, "pattern", "size"), "sites[0].pattern.size: missing"),
        (change("sites", 2, "pattern", "op", to="token2"), "sites[2].pattern.op: must be one of "),
        (change("sites", 2, "pattern", to="off"), "sites[2].pattern: must be an object, got 'off'"),
        (change("sites", 2, "pattern", to=False), "sites[2].pattern: must be an object, got False"),
        (remove("sites", 1, "pattern"), "sites[1].pattern: missing"),
        (change("sites", 1, "depth", to=1.5), "sites[1].depth: must be in [0, 1], got 1.5"),
        (change("sites", 1, "depth", to=True), "sites[1].depth: must be in [0, 1], got True of type bool"),
        (change("sites", 1, "place", to="relu"), f"sites[1].place: must be one of {PLACES}, got 'relu'"),
        (change("sites", 1, "name", to=None), "sites[1].name: must be a string, got None of type NoneType"),
        (change("sites", 1, "name", to="a"), "sites[1].name: must differ from sites[0].name, got 'a'"),
        (change("sites", 1, "layer", to=3), "sites[1].layer: unknown field, known are name, depth, place, pattern"),
        (change("sites", 1, to=None), "sites[1]: must be an object, got None"),
        (change("sites", to=[]), "sites: must hold at least one site, got none"),
        (change("sites", to={}), "sites: must be a list, got {}"),
        (remove("sites"), "sites: missing"),
        (change("provenance", to=[]), "provenance: must be an object, got [] of type list"),
        (change("author", to="me"), "author: unknown field, known are schema, masks, sites, provenance"),
        (remove("schema"), "schema: missing"),
        (change("schema", to=2), "schema: must be 1, the version of the file format that this autodropout knows, "),
        (change("schema", to=True), "schema: must be 1, "),
        (change("masks", to=2), "masks: must be 1, the version of the bits of the masks that this autodropout knows,"),
        (remove("masks"), "masks: missing"),
    ],
)
def test_errors_begin_with_the_path_of_the_field(
    edit: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    data = POLICY.to_json()
    edit(data)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Policy.from_json(data)
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{file}: {message}')}"):
        load_policy(file)


def test_another_version_is_told_before_its_fields() -> None:
    with pytest.raises(ValueError, match=r"^schema: must be 1, .* got 2$"):
        Policy.from_json({"schema": 2, "layers": []})
    with pytest.raises(ValueError, match=r"^policy: must be an object, got \[\]$"):
        Policy.from_json([])


# ---------------------------------------------------------------------------------------------------- files


def test_save_and_load(tmp_path: Path) -> None:
    policy = Policy((*POLICY.sites, Site("\u00fc", 0.1, pattern=None)))
    policy.save(tmp_path / "policy.json")
    assert load_policy(tmp_path / "policy.json") == policy
    assert load_policy(str(tmp_path / "policy.json")) == policy
    assert (tmp_path / "policy.json").read_bytes().endswith(b"}\n")


def test_a_file_that_cannot_be_written_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "policy.json"
    POLICY.save(file)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        Policy.uniform(None).save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there, and pipes have no names")
def test_links_stay_links_and_pipes_stay_pipes(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("policy.json")
    POLICY.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_policy(tmp_path / "policy.json") == POLICY
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)  # with a reader nothing waits, and a pipe has room for so little
    POLICY.save(pipe)
    assert os.read(end, 2**16) == (tmp_path / "policy.json").read_bytes()
    os.close(end)
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff\xfe", "'utf-8' codec can't decode"),
        (b'{"schema": 1, "schema": 1}', "schema: field appears twice in the same object"),
    ],
)
def test_files_that_are_not_json(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{file}: {message}')}"):
        load_policy(file)


def test_unknown_names_list_the_shipped_ones(tmp_path: Path) -> None:
    for name in ("hand-v9", tmp_path / "none.json", tmp_path):
        shipped = "digits-v1, digits-v2, hand-lm-v0, hand-v0"
        message = f"policy must be a file or one of the shipped policies ({shipped}), got '{name}'"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            load_policy(name)
    with pytest.raises(TypeError, match=r"^name_or_path must be a string or a path, got None of type NoneType$"):
        load_policy(None)  # type: ignore[arg-type]


def test_a_shipped_name_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    POLICY.save(tmp_path / "hand-v0")
    monkeypatch.chdir(tmp_path)
    assert load_policy("hand-v0") != POLICY
    assert load_policy("./hand-v0") == POLICY
    assert load_policy(Path("hand-v0")) == POLICY


def test_every_shipped_policy_loads_and_round_trips() -> None:
    assert shipped_policies() == ["digits-v1", "digits-v2", "hand-lm-v0", "hand-v0"]
    for name in shipped_policies():
        policy = load_policy(name)
        assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("side", [32, 16, 8])
def test_hand_v0_is_what_it_says(side: int) -> None:
    policy = load_policy("hand-v0")
    assert [site.depth for site in policy.sites] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    rates = []
    for site in policy.sites:
        assert isinstance(site.pattern, TiledPattern)
        assert not site.pattern.residual
        rates.append(site.pattern.expected_rate(side, side))
    assert rates == sorted(rates)
    assert 0.015 <= rates[0] <= 0.025
    assert 0.115 <= rates[-1] <= 0.12
    assert policy.provenance["kind"] == "hand-made"
    assert "Nothing was searched" in policy.provenance["method"]
