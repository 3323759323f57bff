"""Inputs of softmax_token_dropout, what the twins make of them, and how far a result may be from that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from twins import softmax_numpy
from twins import token as token_twin

PATTERN = (2, 3, 0.6)  # size, stride, rate
FIELDS = torch.tensor(PATTERN, dtype=torch.float64)
SHARING = [(False, False), (True, False), (False, True), (True, True)]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    scores: torch.Tensor
    upstream: torch.Tensor
    kept: torch.Tensor
    scale: float


def case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    seed: int,
    sharing: tuple[bool, bool],
    normalize: str,
    rank: int = 0,
) -> Case:
    """Scores of a causal attention, with -inf for later keys where there are as many queries."""
    n, h, q, k = shape
    generator = torch.Generator().manual_seed(seed % 2**32)
    scores = torch.randn(shape, generator=generator) * 3
    if q == k:
        scores = scores.masked_fill(torch.ones(q, k).triu(1).bool(), -float("inf"))
    size, stride, rate = PATTERN
    dropped = token_twin.dropped(n, k, h * q, size, stride, rate, seed, *sharing, rank)
    scale = token_twin.scale(dropped, k, size, stride, rate, normalize)
    kept = torch.from_numpy(~token_twin.in_layout(dropped, "NHQK", h))
    return Case(scores.to(dtype), torch.randn(shape, generator=generator).to(dtype), kept, scale)


def check(y: torch.Tensor, dscores: torch.Tensor, case: Case) -> None:
    """u is the rounding of the compute type, s of the result's.

    The difference of two scores is rounded to u of itself, which exp makes an error relative to the weight, and exp and
    the sum of up to K terms add (2 + K) u. The gradient adds up K products once more.
    """
    double = case.scores.dtype == torch.float64
    u = torch.finfo(torch.float64 if double else torch.float32).eps
    s = 0.0 if case.scores.dtype.itemsize >= 4 else torch.finfo(case.scores.dtype).eps
    tiny = 2.0**-25 if case.scores.dtype == torch.float16 else torch.finfo(torch.float32).tiny
    scores = case.scores.double().numpy()
    factor = case.kept.numpy() * case.scale
    weights = softmax_numpy.softmax(scores)
    distance = np.where(np.isfinite(scores), scores, 0)
    distance = np.abs(distance).max(-1, keepdims=True) * 2
    relative = (8 + scores.shape[-1] + distance) * u
    expected = weights * factor
    got: Any = y.detach().double().numpy()
    assert (got[~case.kept.numpy()] == 0).all()
    assert (np.abs(got - expected) <= (relative + s) * expected + tiny).all()
    upstream = case.upstream.double().numpy()
    terms = np.abs(upstream) * factor
    handled = weights * (terms + (terms * weights).sum(-1, keepdims=True))
    gradient = softmax_numpy.gradient(scores, factor, upstream)
    error = np.abs(dscores.double().numpy() - gradient)
    assert (error <= 3 * relative * handled + s * np.abs(gradient) + tiny).all()
    assert y.dtype == dscores.dtype == case.scores.dtype
