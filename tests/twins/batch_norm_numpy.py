"""Batch normalisation, mask and ReLU one after the other in float64, and their derivatives by the chain rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    y: Floats
    dx: Floats
    dweight: Floats
    dbias: Floats
    mean: Floats
    unbiased: Floats
    bn: Floats  # the output of the normalisation


def batch_norm_pattern_relu(
    x: Floats, weight: Floats, bias: Floats, factor: Floats, upstream: Floats, eps: float
) -> Result:
    """Channel by channel. factor is the mask times its scale, upstream the gradient of y; all of x's shape."""
    y, dx, bn = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    dweight, dbias, mean, unbiased = (np.empty(x.shape[1]) for _ in range(4))
    for c in range(x.shape[1]):
        values = x[:, c]
        m = values.size
        mean[c] = values.sum() / m
        variance = ((values - mean[c]) ** 2).sum() / m
        unbiased[c] = variance * m / (m - 1)
        deviation = np.sqrt(variance + eps)
        normalised = (values - mean[c]) / deviation
        bn[:, c] = weight[c] * normalised + bias[c]
        masked = bn[:, c] * factor[:, c]
        y[:, c] = np.maximum(masked, 0)
        # Backwards through ReLU, mask, affine map; then x enters directly, by the mean and by the variance.
        of_bn = np.where(masked > 0, upstream[:, c], 0) * factor[:, c]
        dweight[c], dbias[c] = (of_bn * normalised).sum(), of_bn.sum()
        of_normalised = of_bn * weight[c]
        of_variance = (of_normalised * (values - mean[c])).sum() * -0.5 * deviation**-3
        of_mean = -of_normalised.sum() / deviation + of_variance * (-2 * (values - mean[c])).sum() / m
        dx[:, c] = of_normalised / deviation + of_variance * 2 * (values - mean[c]) / m + of_mean / m
    return Result(y, dx, dweight, dbias, mean, unbiased, bn)
