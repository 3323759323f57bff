"""Which site gets which pattern, what `apply_policy` tells, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision
from applied import IMAGES
from applied import TILED
from applied import assert_same_attributes
from applied import refused
from applied import run
from applied import site_dropouts
from applied import small
from applied import snapshot
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

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


def in_part(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """One group of the model is wrapped, rather than all of it."""

    def wrap_group(model: nn.Module) -> nn.Module:
        model.group2 = wrap(model.group2)
        return model

    return wrap_group


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (torch.optim.swa_utils.AveragedModel, "module.group2.0.bn1"),
        (lambda model: torch.compile(nn.DataParallel(torch.compile(model))), "module._orig_mod.group2.0.bn1"),
        (in_part(torch.compile), "group2._orig_mod.0.bn1"),
        (in_part(checkpoint_wrapper), "group2._checkpoint_wrapped_module.0.bn1"),
    ],
)
def test_wrappers_do_not_change_names(wrap: Callable[[nn.Module], nn.Module], name: str) -> None:
    """The policy's depth is wrong on purpose: only a name takes its pattern to its site."""
    sites = [replace(site, depth=1 - site.depth, pattern=None) for site in Policy.uniform(None).fit(small()).sites]
    sites[2] = replace(sites[2], pattern=TILED)
    assert sites[2].name == "group2.0.bn1"
    assert [site.name for site in apply_policy(wrap(small()), Policy(tuple(sites)))] == [name]
    # From a wrapped model to one without.
    fitted = Policy.uniform(None).fit(wrap(small()), verbose=False)
    wrapped = Policy(tuple(replace(site, name=of.name) for site, of in zip(sites, fitted.sites, strict=True)))
    assert [site.name for site in apply_policy(small(), wrapped)] == ["group2.0.bn1"]


def test_names_that_differ_by_what_a_wrapper_adds_are_told_apart() -> None:
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(3), "module": nn.ModuleDict({"norm": nn.BatchNorm2d(3)})})
    policy = Policy((Site("module.norm", 0.0, pattern=TILED), Site("norm", 1.0, pattern=None)))
    assert [site.name for site in apply_policy(model, policy)] == ["module.norm"]


def test_a_policy_may_name_what_the_example_does_not_reach() -> None:
    class WithHead(nn.Module):
        """With an auxiliary head, for training only, registered before its end."""

        def __init__(self) -> None:
            super().__init__()
            self.start, self.head = nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
            self.middle, self.end = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.start(x)
            z: torch.Tensor = self.end(self.middle(y))
            return z + self.head(y) if self.training else z

    patterns = {"start": None, "head.0": TILED, "head.1": TILED, "middle": None, "end": BernoulliPattern(0.1)}
    fitted = Policy.uniform(None).fit(WithHead(), verbose=False)
    assert [site.name for site in fitted.sites] == list(patterns)
    policy = Policy(tuple(replace(site, depth=1 - site.depth, pattern=patterns[site.name]) for site in fitted.sites))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        applied = apply_policy(WithHead(), policy, example=IMAGES)
    assert [(site.name, site.pattern) for site in applied] == [("end", BernoulliPattern(0.1))]


@pytest.mark.parametrize(("layers", "expected"), [(2, ["1"]), (3, ["2"]), (8, ["4", "5", "6", "7"])])
def test_a_relative_s_policy_moves_by_depth_and_unasked(layers: int, expected: list[str]) -> None:
    """It has the names of this model, and more or fewer."""
    fitted = Policy.uniform(None).fit(nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(4))), verbose=False)
    policy = Policy(tuple(replace(site, pattern=TILED if site.depth > 0.5 else None) for site in fitted.sites))
    model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(layers)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [site.name for site in apply_policy(model, policy)] == expected


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


@pytest.mark.parametrize("names", [["layer4.1.bn2"], ["module.layer4.1.bn2", "bn0"], ["bn1", "bn2", "layer4.1.bn2"]])
def test_a_policy_of_some_sites_of_the_model_is_warned_of(names: list[str]) -> None:
    policy = Policy(tuple(Site(name, 1.0, pattern=TILED) for name in names))
    model = torchvision.models.resnet18()
    known = sum("layer" in name or name == "bn1" for name in names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(apply_policy(model, policy)) == len(site_dropouts(model)) == 17
    assert [str(warning.message) for warning in caught] == [
        f"patterns go by depth, as the policy names only {known} of the 17 sites of place 'batch_norm'; one that names "
        "all of them, with pattern None where nothing is dropped, is applied by name"
    ]
    assert caught[0].filename == __file__


def test_names_that_are_mostly_another_model_s_are_not_warned_of() -> None:
    policy = Policy(tuple(Site(name, 1.0, pattern=TILED) for name in ("bn1", "stem", "head")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(apply_policy(torchvision.models.resnet18(), policy)) == 17


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
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, got NoneType$"):
        remove_policy(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["batch_norm", "branch"])
@pytest.mark.parametrize("shared", [(4,), (0, 9)])
def test_maps_have_four_dimensions(place: str, shared: tuple[int, ...]) -> None:
    """Also where the policy comes from a file. The last of the four is one."""
    policy = Policy((Site("end", 0.5, place, BernoulliPattern(0.2, shared)),))
    for each in (policy, Policy.from_json(policy.to_json())):
        message = refused(small(), each)
        assert message == f"shared must hold dimensions of maps, 0 to 3, got {shared} at 'end'"
    assert apply_policy(small(), Policy.uniform(BernoulliPattern(0.2, (0, 3))))


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
