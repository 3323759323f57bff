"""Modules that do several layers in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .kernels import batch_norm_pattern_relu
from .patterns import TiledPattern


class BatchNormPatternReLU2d(nn.BatchNorm2d):
    """`BatchNorm2d`, `PatternDropout` and `ReLU` in one, with half of what they save for backward.

    In evaluation it is `relu(batch_norm(x))`. The keys of its `state_dict` are those of `nn.BatchNorm2d`, so that
    weights move both ways. Statistics are of the process: `nn.SyncBatchNorm` has no such op, and
    `convert_sync_batchnorm` must not be used on this module.

    `module.pattern = p` may be set at any time, for example by a schedule.

    Shape: (N, C, H, W); the output has the input's shape, dtype and memory format.

    Args:
        num_features: C.
        pattern: what is dropped; its `residual` means nothing here.
        eps, momentum, affine, track_running_stats: as of `nn.BatchNorm2d`.

    Raises:
        TypeError: `pattern` is no TiledPattern.
    """

    _pattern: TiledPattern
    _fields: torch.Tensor

    def __init__(
        self,
        num_features: int,
        pattern: TiledPattern,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.pattern = pattern

    @property
    def pattern(self) -> TiledPattern:
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: TiledPattern) -> None:
        if not isinstance(pattern, TiledPattern):
            raise TypeError(f"pattern must be a TiledPattern, got {pattern!r} of type {type(pattern).__name__}")
        self._pattern = pattern
        # A plain attribute, an input of a compiled graph: other values never recompile.
        with torch.inference_mode(False):  # kept, and saved for backward in later training
            self._fields = pattern.fields()
        self._share_c = pattern.share_c

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return torch.relu(super().forward(input))
        momentum = self.momentum
        tracked = self.track_running_stats  # it may be set later, when the buffers are there
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the average over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        y: torch.Tensor = batch_norm_pattern_relu(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            self._fields,
            momentum=0.0 if momentum is None else momentum,
            eps=self.eps,
            share_c=self._share_c,
        )
        return y

    def extra_repr(self) -> str:
        options: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{options}, pattern={self.pattern}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # torch.load moves every tensor to `map_location`: the fields are made again, on the CPU.
        self.pattern = self._pattern
