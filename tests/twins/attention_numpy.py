"""Attention with a mask on its weights in float64, all weights at once, and the gradients of queries, keys, values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import softmax_numpy
from .softmax_numpy import Floats


@dataclass(frozen=True)
class Attention:
    scores: Floats
    weights: Floats
    of_weights: Floats  # gradient of what multiplies v
    of_scores: Floats
    out: Floats
    dq: Floats
    dk: Floats
    dv: Floats


def attention(
    q: Floats, k: Floats, v: Floats, factor: Floats, upstream: Floats, scale: float, causal: bool
) -> Attention:
    """`factor` is the mask times its scale, (N, H, Q, K). The first keys are a memory where there are more of them."""
    scores = np.einsum("nhqd,nhkd->nhqk", q, k) * scale
    queries, keys = scores.shape[2:]
    if causal:
        for i in range(queries):
            scores[:, :, i, i + keys - queries + 1 :] = -np.inf
    weights = softmax_numpy.softmax(scores)
    of_weights = np.einsum("nhqd,nhkd->nhqk", upstream, v)
    of_scores = softmax_numpy.gradient(scores, factor, of_weights)
    return Attention(
        scores=scores,
        weights=weights,
        of_weights=of_weights,
        of_scores=of_scores,
        out=np.einsum("nhqk,nhkd->nhqd", weights * factor, v),
        dq=np.einsum("nhqk,nhkd->nhqd", of_scores, k) * scale,
        dk=np.einsum("nhqk,nhqd->nhkd", of_scores, q) * scale,
        dv=np.einsum("nhqk,nhqd->nhkd", weights * factor, upstream),
    )
