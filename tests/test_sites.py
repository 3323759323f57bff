"""Where the sites of a model are, in which order, and that looking for them changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from autodropout import Policy
from autodropout import TiledPattern
from autodropout import apply_policy
from autodropout.conventions import SKIP_CHILDREN
from autodropout.conventions import register_residual_block
from autodropout.conventions import skip_child
from autodropout.fused import BatchNormPatternReLU2d
from autodropout.reproduce.models.wide_resnet import WideResNet
from autodropout.sites import ModelSite
from autodropout.sites import find_sites

IMAGE = torch.zeros(2, 3, 32, 32)


def names(model: nn.Module, example: Any = None, place: str = "batch_norm") -> list[str]:
    return [site.name for site in find_sites(model, example, place)]


class Backwards(nn.Module):
    """Runs its normalisations in another order than it registers them, one often, one only in training, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm2d(3)
        self.never = nn.BatchNorm2d(3)
        self.only_training = nn.BatchNorm2d(3)
        self.often = nn.BatchNorm2d(3)
        self.first = nn.BatchNorm2d(3)
        self.alias = self.first

    def forward(self, x: torch.Tensor, *, flip: bool = False) -> torch.Tensor:
        x = self.often(self.often(self.first(x)))
        x = self.often(x[:, :, ::2, ::4])
        if self.training:
            x = self.only_training(x)
        return self.last(x.flip(3) if flip else x)


def test_order_is_that_of_the_execution() -> None:
    sites = find_sites(Backwards(), torch.zeros(2, 3, 8, 8))
    assert sites == (
        ModelSite("first", 0.0, "batch_norm", ((3, 8, 8),), "first", None),
        ModelSite("often", 0.5, "batch_norm", ((3, 8, 8), (3, 4, 2)), "often", None),
        ModelSite("last", 1.0, "batch_norm", ((3, 4, 2),), "last", None),
    )
    assert sites[1].map == (3, 8, 8)


def test_without_an_example_it_is_that_of_the_registration() -> None:
    sites = find_sites(Backwards())
    assert [site.name for site in sites] == ["last", "never", "only_training", "often", "first"]
    assert [site.depth for site in sites] == [0, 0.25, 0.5, 0.75, 1]
    assert all(site.map is None for site in sites)


@pytest.mark.parametrize("example", [IMAGE, (IMAGE,), {"x": IMAGE}, {"x": IMAGE, "flip": True}])
def test_example_may_be_any_arguments(example: Any) -> None:
    assert names(Backwards(), example) == ["first", "often", "last"]


def test_one_site_has_depth_0_and_none_is_empty() -> None:
    assert find_sites(nn.BatchNorm2d(3), IMAGE) == (ModelSite("", 0.0, "batch_norm", ((3, 32, 32),), "", None),)
    assert find_sites(nn.Conv2d(3, 3, 1), IMAGE) == ()
    assert find_sites(nn.Sequential(nn.BatchNorm1d(3), nn.GroupNorm(1, 3))) == ()


@pytest.mark.parametrize("example", [IMAGE, None])
@pytest.mark.parametrize("name", ["downsample", "shortcut", "skip"])
def test_shortcut_branches_are_left_out(name: str, example: torch.Tensor | None) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Sequential(nn.BatchNorm2d(3)))
    model.add_module(f"{name}s", nn.BatchNorm2d(3))  # only whole components count
    assert names(model, example) == [f"{name}s"]


# Sites, normalisations on a shortcut; a site; and the end of the name of one that is none.
SHORTCUTS = [
    ("torchvision", "regnet_y_400mf", 49, 4, "trunk_output.block1.block1-0.f.b.1", "block1-0.proj.1"),
    ("timm", "dla46_c", 45, 3, "level2.tree1.bn1", "level2.project.1"),
    ("timm", "repvgg_a0", 44, 17, "stages.0.1.conv_1x1.bn", "stages.0.1.identity"),
    ("timm", "fastvit_t8", 46, 24, "stages.1.downsample.proj.0.large_conv.bn", "mixer.identity"),
    ("timm", "fasternet_t0", 17, 0, "stages.1.downsample.norm", None),
    ("timm", "hgnet_tiny", 36, 0, "stages.1.downsample.bn", None),
    ("timm", "inception_next_atto", 16, 0, "stages.1.downsample.0", None),
    ("timm", "efficientformer_l1", 33, 0, "stages.1.downsample.norm", None),
    ("timm", "tiny_vit_5m_224", 27, 0, "stages.1.downsample.conv1.bn", None),
]


@pytest.mark.parametrize(("library", "name", "count", "left_out", "site", "shortcut"), SHORTCUTS)
def test_a_shortcut_is_of_a_block_and_not_of_a_stage(
    library: str, name: str, count: int, left_out: int, site: str, shortcut: str | None
) -> None:
    model = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    sites = names(model)
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    rest = set(norms) - set(sites)
    assert (len(sites), len(rest)) == (count, left_out)
    assert site in sites
    assert any(path.endswith(shortcut) for path in rest) if shortcut else not rest


def test_a_registered_block_s_skip_tensor_is_a_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = nn.BatchNorm2d(3)
            self.around = nn.BatchNorm2d(3)

    monkeypatch.setattr("autodropout.conventions.SKIP_CHILDREN", dict(SKIP_CHILDREN))
    assert names(Block()) == ["main", "around"]
    register_residual_block(Block, "around")
    assert names(Block()) == ["main"]


def test_synchronised_normalisation_counts() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(torchvision.models.resnet18())
    assert names(model, IMAGE) == names(torchvision.models.resnet18(), IMAGE)


def test_place_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"^place must be one of 'batch_norm', 'branch', 'query', .*, got 'relu'$"):
        find_sites(nn.BatchNorm2d(3), place="relu")


def test_compiled_model_is_seen_from_inside() -> None:
    model = torchvision.models.resnet18()
    assert find_sites(torch.compile(model), IMAGE) == find_sites(model, IMAGE)


class Busy(nn.Module):
    """Changes its buffers and draws random numbers even in evaluation; fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", None)
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.latest = x.mean()
        x = self.norm(x) + torch.rand(())
        if self.fails:
            raise RuntimeError("on demand")
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(fails: bool) -> None:
    model = Busy()
    model.fails = fails
    model.drop.eval()
    calls = model.calls
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    hooks = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    if fails:
        with pytest.raises(RuntimeError, match="on demand"):
            find_sites(model, IMAGE + 1)
    else:
        assert names(model, IMAGE + 1) == ["norm"]
    assert torch.equal(torch.get_rng_state(), generator)
    assert (model.training, model.norm.training, model.drop.training) == (True, True, False)
    assert model.calls is calls
    assert model.latest is None
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert {name: dict(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


class Merging(nn.Linear):
    """A LoRA, which adds its product to the weight when evaluation begins, and takes it off when it ends."""

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        with torch.no_grad():
            self.weight += -1.0 if mode else 1.0
        return self


def test_modules_that_do_more_when_evaluation_begins_are_left_in_peace() -> None:
    merging = Merging(3, 3)
    before = merging.weight.clone()
    assert names(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(2), nn.Linear(1024, 3), merging), IMAGE) == ["0"]
    assert torch.equal(merging.weight, before)
    assert merging.training


# Sites, last sites of residual blocks. A bottleneck has three normalisations, an EfficientNet block one more than its
# position in the first stage says.
MODELS = [
    (torchvision.models.resnet18, 1 + 2 * 8, 8),
    (torchvision.models.resnet50, 1 + 3 * 16, 16),
    (torchvision.models.mobilenet_v2, 1 + 2 + 3 * 16 + 1, 0),
    (lambda: timm.create_model("resnet18"), 1 + 2 * 8, 8),
    (lambda: timm.create_model("resnet26d"), 3 + 3 * 8, 8),
    (lambda: timm.create_model("efficientnet_b0"), 1 + 2 + 3 * 15 + 1, 0),
    (lambda: WideResNet(16, 1), 2 * 6 + 1, 6),
]


@pytest.mark.parametrize(("make", "count", "blocks"), MODELS)
def test_real_models(make: Any, count: int, blocks: int) -> None:
    model = make()
    sites = find_sites(model, IMAGE)
    assert len(sites) == count
    assert [site.depth for site in sites] == [i / (count - 1) for i in range(count)]
    assert [site.name for site in sites] == names(model)  # these register in the order of execution
    ends = [site for site in sites if site.block is not None]
    assert len(ends) == len({site.block for site in ends}) == blocks
    for site in ends:
        assert site.block is not None
        block = model.get_submodule(site.block)
        assert skip_child(block) is not None
        norms = [name for name, child in block.named_children() if isinstance(child, nn.BatchNorm2d)]
        assert site.name == f"{site.block}.{norms[-1]}"


def test_maps_are_those_of_the_outputs() -> None:
    sites = {site.name: site for site in find_sites(torchvision.models.resnet50(), torch.zeros(1, 3, 64, 96))}
    assert sites["bn1"].map == (64, 32, 48)
    assert sites["layer2.0.bn1"].map == (128, 16, 24)
    assert sites["layer2.0.bn2"].map == (128, 8, 12)
    assert sites["layer4.2.bn3"].map == (2048, 2, 3)


def test_timms_fused_activation_comes_after_the_site() -> None:
    """BatchNormAct2d normalises, calls `drop`, then `act`: what is masked is what batch normalisation alone returns."""
    model = timm.create_model("efficientnet_b0").eval()
    sites = find_sites(model, IMAGE)
    assert all(site.target == f"{site.name}.drop" for site in sites)
    norm = model.get_submodule(sites[0].name)
    seen = []
    model.get_submodule(sites[0].target).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    x = torch.randn(2, 32, 4, 4)
    y = norm(x)
    plain = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    assert torch.equal(seen[0], plain)
    assert torch.equal(y, nn.functional.silu(plain))


def test_branches() -> None:
    model = WideResNet(10, 1)
    sites = find_sites(model, IMAGE, place="branch")
    assert [site.name for site in sites] == ["group1.0.branch", "group2.0.branch", "group3.0.branch"]
    assert [site.map for site in sites] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert [site.depth for site in sites] == [0, 0.5, 1]
    assert all(site.target == site.name and site.block is None for site in sites)
    assert find_sites(torchvision.models.resnet18(), IMAGE, place="branch") == ()


def test_blocks_are_known_through_their_bases() -> None:
    class Mine(torchvision.models.resnet.BasicBlock):
        pass

    class BasicBlock(nn.Module):
        pass

    assert skip_child(Mine(4, 4)) == "downsample"
    assert skip_child(BasicBlock()) is None  # the name alone is not enough


def test_a_layer_with_a_pattern_of_its_own_is_no_site() -> None:
    model = nn.Sequential(BatchNormPatternReLU2d(3, TiledPattern(0.2)), nn.BatchNorm2d(3))
    assert names(model) == names(model, IMAGE) == ["1"]
    with pytest.raises(ValueError, match="model has no sites of place 'batch_norm'"):
        apply_policy(model[:1], Policy.uniform(TiledPattern(0.2)), IMAGE)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, got NoneType$"):
        find_sites(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("example", [[IMAGE], "image", IMAGE.numpy(), 3])
def test_what_is_no_example_is_refused(example: Any) -> None:
    kind = type(example).__name__
    message = (
        "^example must be a tensor, a tuple of positional or a mapping of keyword arguments, "
        rf"got {kind}; \(example,\) for a model that is called with one {kind}$"
    )
    model = nn.BatchNorm2d(3)
    with pytest.raises(TypeError, match=message):
        find_sites(model, example)
    with pytest.raises(TypeError, match=message):
        apply_policy(model, Policy.uniform(TiledPattern(0.2)), example)


def test_lazy_modules_are_refused_until_they_have_run() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(
        ValueError, match=r"^model must have initialised parameters, got a LazyConv2d that has never run at '1'$"
    ):
        find_sites(model, IMAGE)
    assert isinstance(model[1], nn.LazyConv2d)
    model(IMAGE)
    assert names(model, IMAGE) == ["0", "2"]
