"""Policies that name the sites of a model, but not quite: refused where a pattern would do nothing, else warned of."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision
from torch import nn

from autodropout import BlockPattern
from autodropout import Pattern
from autodropout import Policy
from autodropout import Site
from autodropout import apply_policy
from autodropout.sites import find_sites

PATTERN = BlockPattern(0.1, 3)
IMAGES = torch.zeros(1, 3, 64, 64)


def resnet18() -> nn.Module:
    model: nn.Module = torchvision.models.resnet18()
    return model


def all_off_but(name: str, **others: Pattern | None) -> Policy:
    """All sites of a ResNet-18 by name, and more; the depths are wrong, so that only names take it there."""
    sites = [Site(site.name, 0.0, pattern=PATTERN if site.name == name else None) for site in find_sites(resnet18())]
    return Policy((*sites, *(Site(other, 0.0, pattern=pattern) for other, pattern in others.items())))


def applied(policy: Policy) -> tuple[list[str], list[str]]:
    """Where patterns are now, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sites = apply_policy(resnet18(), policy, IMAGES)
    assert {warning.filename for warning in caught} <= {__file__}
    return [site.name for site in sites], [str(warning.message) for warning in caught]


def test_a_pattern_at_a_module_that_is_no_site_is_refused() -> None:
    model = resnet18()
    policy = all_off_but("layer4.1.bn2", **{"layer2.0.downsample.1": PATTERN})
    message = r"^pattern must be None at 'layer2.0.downsample.1', which is no site of place 'batch_norm', got BlockPatt"
    with pytest.raises(ValueError, match=message):
        apply_policy(model, policy, IMAGES)
    with pytest.raises(ValueError, match=message):
        policy.fit(model, verbose=False)
    wrapped = Policy(tuple(Site(f"module.{site.name}", 0.0, pattern=site.pattern) for site in policy.sites))
    with pytest.raises(ValueError, match=r"^pattern must be None at 'module.layer2.0.downsample.1', which is no site"):
        apply_policy(model, wrapped)
    assert applied(all_off_but("layer4.1.bn2", **{"layer2.0.downsample.1": None})) == (["layer4.1.bn2"], [])


@pytest.mark.parametrize(("name", "count"), [("bn1", 17), ("layer4.1.bn2", 0)])
def test_one_misspelt_name_more_than_all_is_warned_of(name: str, count: int) -> None:
    sites, messages = applied(all_off_but(name, **{"layer2.0.dwnsample.1": PATTERN}))
    assert len(sites) == count
    assert messages == [
        "patterns go by depth, as the policy names what is no site of place 'batch_norm' of the model: "
        "layer2.0.dwnsample.1"
    ]


@pytest.mark.parametrize("name", ["layer4.1.bn3", "module.layer4.1.bn3", "layer2.0.downsample.1"])
def test_a_single_misspelt_name_is_warned_of_where_its_parent_is_of_the_model(name: str) -> None:
    sites, messages = applied(Policy((Site(name, 0.0, pattern=PATTERN),)))
    assert len(sites) == 17
    assert messages == [
        "patterns go by depth, as the policy names what is no site of place 'batch_norm' of the model: "
        + name.removeprefix("module.")
    ]


@pytest.mark.parametrize("name", ["*", "query", "layer5.1.bn2", "blocks.0.norm"])
def test_a_single_name_of_another_model_is_not_warned_of(name: str) -> None:
    sites, messages = applied(Policy((Site(name, 0.0, pattern=PATTERN),)))
    assert (len(sites), messages) == (17, [])


def test_a_warning_points_to_the_line_that_called() -> None:
    policy = Policy((Site("layer4.1.bn2", 0.0, pattern=PATTERN),))
    with pytest.warns(UserWarning, match="names only 1 of the 17 sites") as caught:
        policy.fit(resnet18(), IMAGES, verbose=False)
    assert [warning.filename for warning in caught] == [__file__]
