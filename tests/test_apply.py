"""Which site gets which pattern, what `apply_policy` tells, and what it refuses."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torchvision
from applied import IMAGES
from applied import TILED
from applied import assert_same_attributes
from applied import refused
from applied import run
from applied import small
from applied import snapshot
from torch import nn

from autodropout import AppliedSite
from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Pattern
from autodropout import Policy
from autodropout import Site
from autodropout import TiledPattern
from autodropout import apply_policy
from autodropout import load_policy
from autodropout import remove_policy
from autodropout.nn import PatternDropout
from autodropout.sites import find_sites


def test_names_win_over_depth() -> None:
    model = small()
    names = [site.name for site in find_sites(model, IMAGES)]
    patterns: list[Pattern | None] = [BernoulliPattern(i / 10) if i % 2 else None for i in range(len(names))]
    sites = [Site(n, 1 - i / (len(names) - 1), pattern=p) for i, (n, p) in enumerate(zip(names, patterns, strict=True))]
    applied = apply_policy(model, Policy(tuple(sites)), example=IMAGES)
    assert {site.name: site.pattern for site in applied} == {n: p for n, p in zip(names, patterns, strict=True) if p}
    # One name less, and depth decides: the very opposite, because the depths were turned round.
    other = small()
    moved = apply_policy(other, Policy((Site("x", 1.0, pattern=None), *sites[1:])), example=IMAGES)
    assert [(site.name, site.pattern) for site in moved] == [
        (n, p) for n, p in zip(names, reversed(patterns), strict=True) if p
    ]


def test_ties_of_depth_go_to_the_earlier_site() -> None:
    """Three sites take from four: the middle one is as far from depth 1/3 as from 2/3, though not in floats."""
    sites = tuple(Site(f"s{i}", i / 3, pattern=BernoulliPattern(0.1 * (i + 1))) for i in range(4))
    model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(3)))
    applied = apply_policy(model, Policy(sites), example=IMAGES)
    assert [site.pattern for site in applied] == [sites[0].pattern, sites[1].pattern, sites[3].pattern]


def test_result_tells_what_was_done() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(4), nn.BatchNorm2d(3))
    policy = Policy((Site("*", 0.0, pattern=TILED), Site("end", 1.0, pattern=BlockPattern(0.1, 3))))
    applied = apply_policy(model, policy, example=IMAGES)
    assert applied == [
        AppliedSite("0", 0.0, (3, 64, 64), TILED, TILED.expected_rate(64, 64)),
        AppliedSite("2", 1.0, (3, 16, 16), BlockPattern(0.1, 3), 0.1),
    ]
    remove_policy(model)
    blind = apply_policy(model, policy)
    assert [(site.map, site.rate) for site in blind] == [(None, None)] * 2
    assert [site.pattern for site in blind] == [site.pattern for site in applied]
    assert isinstance(model[0].pattern_dropout, PatternDropout)
    assert repr(model[2].pattern_dropout) == "PatternDropout(BlockPattern(rate=0.1, block_size=3))"


def test_policy_of_nothing_leaves_the_model_alone() -> None:
    model = small()
    attributes = snapshot(model)
    assert apply_policy(model, Policy.uniform(None), example=IMAGES) == []
    assert_same_attributes(model, attributes)


def test_frozen_normalisation_drops_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].eval()
    apply_policy(model, Policy.uniform(BernoulliPattern(0.5)))
    assert (run(model[0]) != 0).all()
    assert not (run(model[1]) != 0).all()


def test_refuses_a_second_policy() -> None:
    model = small()
    apply_policy(model, Policy.uniform(TILED))
    assert "call remove_policy first" in refused(model, Policy.uniform(TILED))


def test_says_that_a_conversion_took_a_policy_away() -> None:
    model = small()
    apply_policy(model, Policy.uniform(TILED))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert "since convert_sync_batchnorm made new modules" in refused(converted, Policy.uniform(TILED))
    remove_policy(converted)
    assert not any("pattern_dropout" in name for name, _ in converted.named_modules())
    assert apply_policy(converted, Policy.uniform(TILED))


def test_names_that_are_nearly_those_of_the_model_are_warned_of() -> None:
    model = torchvision.models.resnet18()
    policy = load_policy("hand-v0").fit(model, torch.ones(1, 3, 32, 32))
    first, *others = policy.sites
    with pytest.warns(
        UserWarning, match="names the sites of place 'batch_norm' otherwise than the model: bn11 for bn1$"
    ):
        apply_policy(model, Policy((replace(first, name="bn11"), *others)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_policy(torchvision.models.resnet50(), policy)  # has all of these names, and more


def test_refuses_a_model_without_sites() -> None:
    message = refused(nn.Sequential(nn.Conv2d(3, 3, 1)), Policy.uniform(TILED))
    assert message == (
        "model has no sites of place 'batch_norm' that the example reaches: Sequential. They are the outputs of "
        "BatchNorm2d and SyncBatchNorm; for a Transformer name its places"
    )


def test_refuses_the_wrong_things() -> None:
    assert refused(small(), {"sites": []}, error=TypeError) == "policy must be a Policy, got dict"
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, got Policy$"):
        apply_policy(Policy.uniform(TILED), small())  # type: ignore[arg-type]


def test_refuses_a_rate_above_095_by_name_map_and_rate() -> None:
    """Half of one cell is rounded to the whole cell: the pattern drops all of a 1x1 map, and much less of others."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    message = refused(model, Policy.uniform(TiledPattern(0.5)))
    assert message.startswith(
        "pattern at site '2' (map 3x1x1) must have an expected rate of at most 0.95, got 1.0000: TiledPattern(size=0.5,"
    )
    assert len(apply_policy(model, Policy.uniform(TiledPattern(0.5)))) == 2  # without an example nobody knows

    sites = (Site("start", 0.0, pattern=TILED), Site("end", 1.0, pattern=BernoulliPattern(0.951)))
    message = refused(small(), Policy(sites))
    assert "'group3.0.bn1' (map 32x32x32)" in message  # the fourth of seven sites lies in the middle: a tie
    assert "got 0.9510" in message


def test_rate_of_095_is_allowed() -> None:
    (site,) = apply_policy(nn.Sequential(nn.BatchNorm2d(3)), Policy.uniform(BernoulliPattern(0.95)), IMAGES)
    assert site.rate == 0.95


def test_every_map_of_a_shared_site_is_checked() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x).mean() + self.norm(x[:, :, :1, :1]).mean()

    pattern = TiledPattern(0.5)
    assert pattern.expected_rate(64, 64) < 0.95 < pattern.expected_rate(1, 1) == 1
    assert "(map 3x1x1)" in refused(Pyramid(), Policy.uniform(pattern))
