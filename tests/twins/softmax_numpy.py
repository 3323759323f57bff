"""Softmax over the last axis and a mask in float64, with the gradient through the whole Jacobian of each row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def gradient(scores: Floats, factor: Floats, upstream: Floats) -> Floats:
    """Of softmax(scores) * factor; factor is the mask times its scale, of the shape of the scores."""
    rows = softmax(scores).reshape(-1, scores.shape[-1])
    of_weights = (upstream * factor).reshape(rows.shape)
    result = np.empty_like(rows)
    for i, p in enumerate(rows):
        jacobian = np.diag(p) - np.outer(p, p)
        result[i] = jacobian @ of_weights[i]
    return result.reshape(scores.shape)
