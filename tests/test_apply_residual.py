"""Masks on the skip tensor and on the residual branch of a block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from applied import IMAGES
from applied import RESIDUAL
from applied import SIGMAS
from applied import TILED
from applied import assert_same_attributes
from applied import original
from applied import record
from applied import refused
from applied import site_dropouts
from applied import small
from applied import snapshot
from applied import standard_error
from applied import with_random_norms
from torch import nn

from autodropout import BernoulliPattern
from autodropout import Policy
from autodropout import Site
from autodropout import apply_policy
from autodropout import remove_policy
from autodropout.conventions import SKIP_CHILDREN
from autodropout.conventions import register_residual_block
from autodropout.nn import PatternDropout
from autodropout.reproduce.models.wide_resnet import WideBlock
from autodropout.sites import find_sites

# Residual blocks of known kinds, with 32 channels in and out or twice as many.


def torchvision_block(kind: str, same: bool) -> nn.Module:
    block = getattr(torchvision.models.resnet, kind)
    if same:
        return block(32, 32 // block.expansion)
    return block(32, 64 // block.expansion, 2, nn.Sequential(nn.Conv2d(32, 64, 1, stride=2), nn.BatchNorm2d(64)))


def timm_block(kind: str, same: bool) -> nn.Module:
    block = getattr(timm.models.resnet, kind)
    if same:
        return block(32, 32 // block.expansion)
    return block(32, 64 // block.expansion, 2, timm.models.resnet.downsample_avg(32, 64, 1, stride=2))


BLOCKS = [
    *((f"{kind} of {library}", make, kind) for kind in ("BasicBlock", "Bottleneck")
      for library, make in (("torchvision", torchvision_block), ("timm", timm_block))),
    ("WideBlock", lambda kind, same: WideBlock(32, 32 if same else 64, 1 if same else 2), "WideBlock"),
]  # fmt: skip


@pytest.mark.parametrize("same", [True, False], ids=["identity", "downsampling"])
@pytest.mark.parametrize(("make", "kind"), [block[1:] for block in BLOCKS], ids=[block[0] for block in BLOCKS])
def test_residual_masks_the_skip_tensor_just_before_the_addition(make: Any, kind: str, same: bool) -> None:
    torch.manual_seed(0)
    block = with_random_norms(make(kind, same))
    attributes = snapshot(block)
    x = torch.randn(8, 32, 12, 12)
    applied = apply_policy(block, Policy.uniform(RESIDUAL), example=x)
    last = applied[-1]
    assert [site.pattern.residual for site in applied] == [False] * (len(applied) - 1) + [True]  # type: ignore[attr-defined]
    assert len(site_dropouts(block)) == len(applied) + 1

    # The sum of branch and masked skip, put together by hand, is what the block returns.
    (skip_name,) = set(site_dropouts(block)) - {f"{site.name}.pattern_dropout" for site in applied}
    branch_end = "branch" if kind == "WideBlock" else f"{last.name}.pattern_dropout"
    seen = record(block, [skip_name, branch_end, ""], x)
    ((skip, masked),), ((_, branch),), ((_, result),) = seen[skip_name], seen[branch_end], seen[""]
    assert torch.equal(result, masked + branch if kind == "WideBlock" else (branch + masked).relu())
    if same:
        assert torch.equal(skip, x)

    # A draw of its own with the site's pattern, whose rate it delivers.
    assert skip.all()
    dropped = masked == 0
    rate = RESIDUAL.expected_rate(*skip.shape[2:])
    assert abs(dropped.double().mean().item() - rate) <= SIGMAS * standard_error(RESIDUAL, dropped)
    ((_, at_site),) = record(block, [f"{last.name}.pattern_dropout"], x)[f"{last.name}.pattern_dropout"]
    assert not torch.equal(dropped, at_site == 0)

    with torch.no_grad():
        evaluated = block.eval()(x)
        remove_policy(block)
        assert torch.equal(block(x), evaluated)
    block.train()
    assert_same_attributes(block, attributes)


@pytest.mark.parametrize("as_child", [False, True])
def test_missing_downsample_is_put_back_where_it_was(as_child: bool) -> None:
    """A None can stand among the attributes of a module or among its children."""
    block = torchvision.models.resnet.BasicBlock(8, 8)
    if as_child:
        del block.downsample
        block.register_module("downsample", None)
    attributes = snapshot(block)
    apply_policy(block, Policy.uniform(RESIDUAL))
    assert isinstance(block.downsample, PatternDropout)
    remove_policy(block)
    assert_same_attributes(block, attributes)
    assert block.downsample is None


def test_empty_downsample_masks_once() -> None:
    """An empty nn.Sequential is an identity, and runs the children that it is given by itself."""
    block = torchvision.models.resnet.BasicBlock(8, 8, downsample=nn.Sequential())
    attributes = snapshot(block)
    apply_policy(block, Policy.uniform(RESIDUAL))
    x = torch.randn(4, 8, 16, 16)
    seen = record(block, ["downsample.pattern_dropout"], x)
    assert len(seen["downsample.pattern_dropout"]) == 1
    ((before, after),) = seen["downsample.pattern_dropout"]
    assert torch.equal(before, x)
    assert (after == 0).any()
    remove_policy(block)
    assert_same_attributes(block, attributes)


def exact_policy(model: nn.Module, residual_at: str) -> Policy:
    sites = find_sites(model, IMAGES)
    return Policy(tuple(Site(s.name, s.depth, pattern=RESIDUAL if s.name == residual_at else TILED) for s in sites))


def test_residual_by_name_is_only_allowed_at_the_end_of_a_block() -> None:
    model = torchvision.models.resnet18()
    for name in ("bn1", "layer1.0.bn1"):
        message = refused(model, exact_policy(model, name))
        assert message == f"residual must be False at {name!r}, which does not end a residual block"
    apply_policy(model, exact_policy(model, "layer1.0.bn2"), example=IMAGES)
    skips = [name for name in site_dropouts(model) if not name.endswith("pattern_dropout")]
    assert skips == ["layer1.0.downsample"]


def test_residual_moves_to_the_ends_of_blocks() -> None:
    model = torchvision.models.resnet18()
    applied = apply_policy(model, Policy.uniform(RESIDUAL), example=IMAGES)
    flags = {site.name: site.pattern.residual for site in applied}  # type: ignore[attr-defined]
    assert flags == {name: name.startswith("layer") and name.endswith("bn2") for name in flags}
    assert len(site_dropouts(model)) == len(applied) + 8


@pytest.mark.parametrize("name", ["torchvision mobilenet_v2", "timm efficientnet_b0"])
@pytest.mark.parametrize("example", [IMAGES, None], ids=["example", "blind"])
def test_residual_needs_a_block_of_a_known_kind(name: str, example: torch.Tensor | None) -> None:
    model = copy.deepcopy(original(name))
    message = refused(model, Policy.uniform(RESIDUAL), example)
    assert message.startswith("residual must be False on this model: it has no residual block of a known kind")


def test_stochastic_depth_at_the_ends_of_branches() -> None:
    drop = BernoulliPattern(0.5, shared="sample")
    policy = Policy((Site("end", 1.0, place="branch", pattern=drop),))
    model = small()
    attributes = snapshot(model)
    applied = apply_policy(model, policy, example=IMAGES)
    assert [site.name for site in applied] == ["group1.0.branch", "group2.0.branch", "group3.0.branch"]
    ((before, after),) = record(model, ["group2.0.branch.pattern_dropout"])["group2.0.branch.pattern_dropout"]
    for sample, kept in zip(before, after, strict=True):
        assert torch.equal(kept, 2 * sample) or not kept.any()
    remove_policy(model)
    assert_same_attributes(model, attributes)
    assert "no sites of place 'branch'" in refused(torchvision.models.resnet18(), policy)
    bad = Policy((Site("start", 0.0, place="branch", pattern=drop), Site("end", 1.0, place="branch", pattern=RESIDUAL)))
    assert refused(small(), bad) == "residual must be False at sites of place 'branch', got True at 'end'"


def test_a_policy_may_have_both_places() -> None:
    drop = BernoulliPattern(0.5, shared="sample")
    policy = Policy((Site("norm", 0.0, pattern=TILED), Site("end", 0.0, place="branch", pattern=drop)))
    model = small()
    applied = apply_policy(model, policy, example=IMAGES)
    assert [site.pattern for site in applied] == [TILED] * 7 + [drop] * 3
    assert len(site_dropouts(model)) == 10


class OwnBlock(nn.Module):
    """A residual block that no library has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.projection: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.conv(x))
        return y + (x if self.projection is None else self.projection(x))


def test_a_block_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodropout.conventions.SKIP_CHILDREN", dict(SKIP_CHILDREN))
    policy, x = Policy.uniform(RESIDUAL), torch.rand(2, 3, 16, 16) + 1
    with pytest.raises(ValueError, match="autodropout.conventions.register_residual_block"):
        apply_policy(OwnBlock(), policy, x)
    register_residual_block(OwnBlock, skip="projection")
    block = OwnBlock().train()
    nn.init.zeros_(block.norm.weight)  # what is left is the skip tensor
    apply_policy(block, policy, x)
    assert len(site_dropouts(block)) == 2
    y = block(x)
    kept = y != 0
    assert not kept.all()
    torch.testing.assert_close(y[kept] / x[kept], (kept.numel() / kept.sum()).expand(int(kept.sum())))
    remove_policy(block)
    assert block.projection is None
    with pytest.raises(TypeError, match="kind must be a subclass of nn.Module, got 3"):
        register_residual_block(3, "skip")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="skip must be the name of an attribute, got 3"):
        register_residual_block(OwnBlock, 3)  # type: ignore[arg-type]


def regnet_blocks() -> nn.Module:
    kind = torchvision.models.regnet.ResBottleneckBlock
    return nn.Sequential(*(kind(width, 16, 1, nn.BatchNorm2d, nn.ReLU, group_width=8) for width in (3, 16)))


def own_blocks() -> nn.Module:
    """The skip tensor is made last."""
    blocks = nn.Sequential(OwnBlock(), OwnBlock())
    blocks[0].projection = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    return blocks


@pytest.mark.parametrize("example", [torch.rand(2, 3, 16, 16), None], ids=["example", "blind"])
@pytest.mark.parametrize(
    ("make", "skip", "inside", "end"),
    [(regnet_blocks, "proj", ["f.a.1", "f.b.1"], "f.c.1"), (own_blocks, "projection", [], "norm")],
)
def test_what_makes_a_registered_skip_tensor_has_no_sites(
    make: Any, skip: str, inside: list[str], end: str, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autodropout.conventions.SKIP_CHILDREN", dict(SKIP_CHILDREN))
    model = make()
    register_residual_block(type(model[0]), skip)
    attributes = snapshot(model)
    applied = apply_policy(model, Policy.uniform(RESIDUAL), example)
    names = [f"{block}.{name}" for block in range(2) for name in (*inside, end)]
    assert [site.name for site in applied] == names
    assert [site.depth for site in applied] == [i / (len(names) - 1) for i in range(len(names))]
    assert [site.pattern.residual for site in applied] == [name.endswith(end) for name in names]  # type: ignore[attr-defined]
    at_skips = {f"0.{skip}.1.pattern_dropout", f"1.{skip}"}
    assert site_dropouts(model).keys() == {f"{name}.pattern_dropout" for name in names} | at_skips
    model.train()(torch.rand(2, 3, 16, 16))
    remove_policy(model)
    assert_same_attributes(model, attributes)


def test_an_exception_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodropout.conventions.SKIP_CHILDREN", dict(SKIP_CHILDREN))
    register_residual_block(OwnBlock, skip="missing")
    message = refused(nn.Sequential(nn.BatchNorm2d(3), OwnBlock()), Policy.uniform(RESIDUAL), error=AttributeError)
    assert "missing" in message


def test_masks_of_skip_tensors_follow_the_module_that_makes_them_or_the_block() -> None:
    model = torchvision.models.resnet18().train()
    apply_policy(model, Policy.uniform(RESIDUAL))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    dropping = [name for name, dropout in site_dropouts(model).items() if dropout.training]
    assert dropping == [f"layer{i}.{j}.downsample" for i, j in [(1, 0), (1, 1), (2, 1), (3, 1), (4, 1)]]
    model.layer1.eval()
    assert not any(dropout.training for dropout in site_dropouts(model.layer1).values())
    model.layer2[0].downsample[1].train()
    assert model.layer2[0].downsample[1].pattern_dropout.training
