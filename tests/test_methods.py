"""Every method is the policy that its name promises."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Policy
from autodropout import apply_policy
from autodropout import load_policy
from autodropout.reproduce.methods import METHODS
from autodropout.reproduce.methods import STRENGTHS
from autodropout.reproduce.methods import method_label
from autodropout.reproduce.methods import method_policy
from autodropout.reproduce.methods import open_policy
from autodropout.reproduce.methods import policy_origin
from autodropout.reproduce.models.wide_resnet import WideResNet

HAND = load_policy("hand-v0")


def policy(method: str, strength: float | None, blocks: int = 3) -> Policy:
    return method_policy(method, strength, blocks, 5, HAND)


def test_equal_number_of_trials() -> None:
    assert METHODS == ("none", "dropout", "spatialdropout", "dropblock", "stochasticdepth", "autodropout")
    assert {method: len(grid) for method, grid in STRENGTHS.items()} == dict.fromkeys(METHODS, 3) | {"none": 0}
    assert all(len(set(grid)) == len(grid) for grid in STRENGTHS.values())


def test_policies() -> None:
    assert policy("none", None) == Policy.uniform(None)
    assert policy("dropout", 0.1) == Policy.uniform(BernoulliPattern(0.1, shared="none"))
    assert policy("spatialdropout", 0.1) == Policy.uniform(BernoulliPattern(0.1, shared="map"))
    assert policy("dropblock", 0.1) == Policy.uniform(BlockPattern(0.1, 5))
    assert policy("autodropout", 0.5) == HAND.scaled(0.5)


@pytest.mark.parametrize(("depth", "width", "side", "channels"), [(10, 1, 8, 1), (28, 2, 32, 3)])
def test_stochastic_depth_is_linear_on_the_residual_branches(depth: int, width: int, side: int, channels: int) -> None:
    model = WideResNet(depth, width, in_channels=channels)
    blocks = (depth - 4) // 2
    applied = apply_policy(model, policy("stochasticdepth", 0.4, blocks), example=torch.zeros(2, channels, side, side))
    names = [f"group{g}.{b}.branch" for g in (1, 2, 3) for b in range(blocks // 3)]
    assert [site.name for site in applied] == names[1:], "at depth 0 the rate is 0"
    for i, site in enumerate(applied, start=1):
        assert site.pattern == BernoulliPattern(0.4 * (i / (blocks - 1)), shared="sample")


def test_stochastic_depth_skips_the_branch_of_whole_samples() -> None:
    torch.manual_seed(0)
    model = WideResNet(10, 1, in_channels=1).train()
    block = model.group3[0]
    seen: dict[str, torch.Tensor] = {}
    block.conv2.register_forward_hook(lambda _m, _i, output: seen.setdefault("branch", output))
    block.shortcut.register_forward_hook(lambda _m, _i, output: seen.setdefault("skip", output))
    block.register_forward_hook(lambda _m, _i, output: seen.setdefault("out", output))
    apply_policy(model, policy("stochasticdepth", 0.5), example=torch.zeros(2, 1, 8, 8))
    seen.clear()
    model(torch.randn(64, 1, 8, 8))
    skipped = (seen["out"] == seen["skip"]).flatten(1).all(1)
    # Binomial(64, 1/2): outside of 12..52 with probability 1e-7.
    assert 12 <= int(skipped.sum()) <= 52
    kept = ~skipped
    torch.testing.assert_close(seen["out"][kept], (seen["skip"] + 2 * seen["branch"])[kept])


@pytest.mark.parametrize("method", METHODS)
def test_every_strength_fits_the_networks(method: str) -> None:
    for depth, channels, side in ((10, 1, 8), (10, 3, 32)):
        for strength in STRENGTHS[method] or (None,):
            model = WideResNet(depth, 1, in_channels=channels)
            applied = apply_policy(model, policy(method, strength), example=torch.zeros(2, channels, side, side))
            assert bool(applied) == (method != "none")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"method must be one of none, dropout, .*, got 'cutout'"):
        policy("cutout", 0.1)
    with pytest.raises(ValueError, match="got None for dropout"):
        policy("dropout", None)
    with pytest.raises(ValueError, match=r"got 0.1 for none"):
        policy("none", 0.1)


def test_labels_say_where_the_policy_comes_from(tmp_path: Path) -> None:
    HAND.save(tmp_path / "found.json")
    assert open_policy("hand-v0") == ("hand-v0", HAND)
    assert open_policy(str(tmp_path / "found.json")) == ("found", HAND)
    assert (
        method_label("autodropout", "hand-v0", policy_origin(HAND)) == "AutoDropout (hand-v0, hand-made, not searched)"
    )
    assert [method_label(method, "x", "y") for method in METHODS[:2]] == ["none", "Dropout"]
    # A copy of the hand-made one does not become a learned one by its name.
    assert policy_origin(load_policy(tmp_path / "found.json")) == "hand-made, not searched"
    assert policy_origin(Policy.uniform(None)) == "of unknown origin"
    found = {
        "kind": "searched",
        "recipe": {"name": "digits"},
        "trials": {"proposed": 200, "finished": 199, "failed": 1},
    }
    searched = dataclasses.replace(HAND, provenance=found)
    assert policy_origin(searched) == "searched with the recipe digits, 200 trials"


SEARCHED = {"kind": "searched", "recipe": {"name": "digits"}, "trials": {"proposed": 200}}


@pytest.mark.parametrize("missing", [{"recipe": None}, {"trials": {}}, {"recipe": {}, "trials": {}}, {"trials": "200"}])
def test_a_search_that_does_not_say_enough_is_of_unknown_origin(missing: dict[str, object]) -> None:
    partly = {name: value for name, value in (SEARCHED | missing).items() if value is not None}
    assert policy_origin(dataclasses.replace(HAND, provenance=partly)) == "of unknown origin"


def test_the_origin_of_a_changed_policy_is_that_of_the_policy_it_was() -> None:
    found = dataclasses.replace(HAND, provenance=SEARCHED)
    assert policy_origin(found.scaled(0.5)) == "searched with the recipe digits, 200 trials, scaled"
    assert policy_origin(HAND.scaled(0.5).scaled(3)) == "hand-made, not searched, scaled"
    fitted = HAND.fit(WideResNet(10, 1, in_channels=1), torch.zeros(1, 1, 8, 8), verbose=False)
    assert policy_origin(fitted) == "hand-made, not searched"
    assert policy_origin(Policy.uniform(None).scaled(2)) == "of unknown origin, scaled"
    for odd in (
        {"from": SEARCHED},
        {"scaled_by": 2},
        {"scaled_by": 2, "from": "digits"},
        {"scaled_by": 2, "from": [1]},
    ):
        assert policy_origin(dataclasses.replace(HAND, provenance=odd)) == "of unknown origin"


def test_a_policy_in_a_file_whose_name_is_no_text_has_a_name_that_prints(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"n\xff.json")
    HAND.save(os.fsdecode(path))
    name, policy = open_policy(os.fsdecode(path))
    assert (name, policy) == ("n\N{REPLACEMENT CHARACTER}", HAND)
