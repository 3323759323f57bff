"""Wide residual networks for small images (Zagoruyko & Komodakis 2016, arXiv 1605.07146), pre-activation form.

WRN-28-10 has 36.5 million and WRN-28-2 1.47 million parameters for 10 classes and RGB images, as in their paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class WideBlock(nn.Module):
    """One residual block: `shortcut + branch(conv2(relu(bn2(conv1(relu(bn1(x)))))))`.

    x is `(N, in_channels, H, W)`, the result `(N, out_channels, H / stride, W / stride)`. Where the shape changes, the
    shortcut is a 1x1 convolution of `relu(bn1(x))`, as in the authors' code; elsewhere it is `x` itself.

    `branch` and `shortcut` are modules, though `branch` computes nothing, because a policy masks the output of modules:
    stochastic depth masks `branch`, the `residual` flag of a tiled pattern masks `shortcut`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.branch = nn.Identity()
        self.same_shape = in_channels == out_channels and stride == 1
        self.shortcut: nn.Module = (
            nn.Identity() if self.same_shape else nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.bn1(x))
        out = self.branch(self.conv2(F.relu(self.bn2(self.conv1(active)))))
        skip: torch.Tensor = self.shortcut(x if self.same_shape else active)
        return torch.add(skip, out)


class WideResNet(nn.Module):
    """WRN-`depth`-`width` for images `(N, in_channels, H, W)`; the result is `(N, classes)`, unnormalised scores.

    `depth` is 4 + 6n with n blocks in each of the three groups, whose widths are 16, 32 and 64 times `width`.
    The weights are drawn from PyTorch's default generator: He's normal initialisation (fan out) for convolutions.

    Raises:
        ValueError: `depth` is not 10, 16, 22, ..., or `width`, `classes` or `in_channels` is below 1.
    """

    def __init__(self, depth: int, width: int, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"depth must be 4 + 6n with n >= 1 (10, 16, 22, 28, ...), got {depth}")
        for name, value in (("width", width), ("classes", classes), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        blocks = (depth - 4) // 6
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.group1 = _group(16, 16 * width, blocks, stride=1)
        self.group2 = _group(16 * width, 32 * width, blocks, stride=2)
        self.group3 = _group(32 * width, 64 * width, blocks, stride=2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.group3(self.group2(self.group1(self.stem(x))))
        scores: torch.Tensor = self.fc(F.relu(self.bn(x)).mean(dim=(2, 3)))
        return scores


def _group(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` blocks of one width, the first of which changes the shape."""
    first = WideBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(WideBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
