"""The wide residual networks: their size, their structure, their sites."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autodropout.reproduce.models.wide_resnet import WideBlock
from autodropout.reproduce.models.wide_resnet import WideResNet


def parameters(depth: int, width: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in WideResNet(depth, width).parameters())


@pytest.mark.parametrize(("depth", "width", "millions"), [(28, 10, 36.5), (28, 2, 1.47)])
def test_parameter_counts_of_the_paper(depth: int, width: int, millions: float) -> None:
    digits = 1 if millions > 10 else 2
    assert round(parameters(depth, width) / 1e6, digits) == millions


def counted_by_hand(depth: int, width: int) -> int:
    """Layer by layer, from the definition."""
    total, channels = 3 * 16 * 9, 16
    for group in range(3):
        wide = 16 * width * 2**group
        for block in range((depth - 4) // 6):
            total += 2 * channels + channels * wide * 9 + 2 * wide + wide * wide * 9
            if block == 0 and (channels != wide or group > 0):
                total += channels * wide
            channels = wide
    return total + 2 * channels + channels * 10 + 10


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 4), (28, 2), (28, 10)])
def test_parameter_count_is_exact(depth: int, width: int) -> None:
    assert parameters(depth, width) == counted_by_hand(depth, width)


@pytest.mark.parametrize(("channels", "stride"), [((4, 4), 1), ((4, 6), 1), ((4, 4), 2)])
def test_block_is_the_pre_activation_block(channels: tuple[int, int], stride: int) -> None:
    torch.manual_seed(0)
    block = WideBlock(*channels, stride).double().eval()
    for bn in (block.bn1, block.bn2):
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    x = torch.randn(2, channels[0], 6, 6, dtype=torch.float64)

    def normalised(bn: nn.BatchNorm2d, h: torch.Tensor) -> torch.Tensor:
        scale = (bn.running_var + bn.eps).rsqrt()
        return (h - bn.running_mean[:, None, None]) * scale[:, None, None]

    active = normalised(block.bn1, x).clamp(min=0)
    h = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
    branch = F.conv2d(normalised(block.bn2, h).clamp(min=0), block.conv2.weight, padding=1)
    same = channels[0] == channels[1] and stride == 1
    skip = x if same else F.conv2d(active, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), skip + branch, rtol=1e-12, atol=1e-12)


def test_the_skip_and_the_branch_are_modules_that_can_be_masked() -> None:
    torch.manual_seed(0)
    block = WideBlock(4, 4, 1).eval()
    x = torch.randn(2, 4, 6, 6)
    whole = block(x)
    seen: dict[str, torch.Tensor] = {}
    for name in ("branch", "shortcut"):
        module = block.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.setdefault(name, output))
    block(x)
    assert isinstance(block.branch, nn.Identity)
    assert torch.equal(seen["shortcut"], x)
    assert torch.equal(seen["shortcut"] + seen["branch"], whole)


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 8)])
def test_shapes(channels: int, side: int) -> None:
    model = WideResNet(10, 1, classes=7, in_channels=channels)
    maps = []
    for group in (model.group1, model.group2, model.group3):
        group.register_forward_hook(lambda _m, _i, output: maps.append(tuple(output.shape)))
    assert model(torch.zeros(2, channels, side, side)).shape == (2, 7)
    assert maps == [(2, 16, side, side), (2, 32, side // 2, side // 2), (2, 64, side // 4, side // 4)]


def test_he_initialisation_keeps_the_fan_out_variance() -> None:
    torch.manual_seed(0)
    weight = WideResNet(10, 8).group3[0].conv2.weight
    expected = 2 / (weight.shape[0] * 9)
    # The variance of n normal values has relative standard error sqrt(2 / n): five of them, alpha = 6e-7.
    assert weight.var().item() == pytest.approx(expected, rel=5 * (2 / weight.numel()) ** 0.5)


@pytest.mark.parametrize("depth", [4, 9, 11, 27, -2])
def test_impossible_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must be 4 .* got {depth}"):
        WideResNet(depth, 1)


@pytest.mark.parametrize("name", ["width", "classes", "in_channels"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        WideResNet(10, **{"width": 1, name: 0})
