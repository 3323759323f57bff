"""Inputs of token_attention, what the twins make of them, and how far a result may be from that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from twins import attention_numpy
from twins import token as token_twin

PATTERN = (2, 3, 0.6)  # size, stride, rate
FIELDS = torch.tensor(PATTERN, dtype=torch.float64)
SHARING = [(False, False), (True, False), (False, True), (True, True)]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    upstream: torch.Tensor
    kept: torch.Tensor
    scale: float  # of the mask
    factor: float  # of the scores
    causal: bool


def case(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    seed: int,
    sharing: tuple[bool, bool] = (False, False),
    normalize: str = "expected",
    rank: int = 0,
    causal: bool = False,
    pattern: tuple[int, int, float] = PATTERN,
) -> Case:
    """Of samples, heads, queries, keys, head size. Weights differ by orders of magnitude."""
    n, h, queries, keys, d = shape
    generator = torch.Generator().manual_seed(seed % 2**32)

    def numbers(length: int) -> torch.Tensor:
        return torch.randn(n, h, length, d, generator=generator).to(dtype)

    dropped = _dropped(n, keys, h * queries, *pattern, seed, *sharing, rank)
    scale = token_twin.scale(dropped, keys, *pattern, normalize)
    kept = torch.from_numpy(~token_twin.in_layout(dropped, "NHQK", h))
    return Case(
        numbers(queries), numbers(keys), numbers(keys), numbers(queries), kept, scale, 1.5 * d**-0.5, causal
    )  # fmt: skip


# Every dtype has the same, and the twin takes its time.
_dropped = lru_cache(token_twin.dropped)


def check(got: dict[str, torch.Tensor], case: Case, rounded: bool) -> None:
    """`got` has out, dq, dk, dv; `rounded` says that weights are rounded to the dtype before they are multiplied.

    u is twice the rounding of the compute type, to cover second orders, s that of the dtype where it has 16 bits, else
    0; numbers of K keys, Q queries and D of a head are added up. To first order:

    - A score is off by (D + 4) u A, A the largest sum of |q||k||factor| of its row. So is lse, the logarithm of a mean
      of such factors. Both, their difference and the running maximum are rounded, to 4 u (A + log K). exp makes all of
      that relative; K terms are added, and rescaled whenever a tile has a new maximum: 4 u a key covers both. Together
      every weight p is off by p e, e = 2 u ((D + 8) 2 A + 4 K + 16), and by p s more where it is rounded.
    - out and dv add K and Q products: (e + s + K u) and (e + s + Q u) times the sum of their absolute values.
    - delta = sum(u out): what out is off, and D u of its absolute terms.
    - dscores = p (dw f - delta), f the mask times its scale: (e + s + 8 u) times its absolute terms, D u of those of
      dw, and p times what delta is off. dq and dk add K and Q products with it.
    - Each result is rounded to s. What underflows in 16 bits is off by the smallest number t, also in products.
    """
    double = case.q.dtype == torch.float64
    u = torch.finfo(torch.float64 if double else torch.float32).eps  # twice what one rounding does
    narrow = case.q.dtype.itemsize == 2
    s = torch.finfo(case.q.dtype).eps if narrow else 0.0
    of_weights = s if rounded else 0.0
    t = 2.0**-24 if case.q.dtype == torch.float16 else torch.finfo(torch.float32).tiny
    of_products = t if rounded else 0.0
    q, k, v, upstream = (x.double().numpy() for x in (case.q, case.k, case.v, case.upstream))
    _, _, queries, d = q.shape
    keys = k.shape[2]
    f = case.kept.numpy() * case.scale
    exact = attention_numpy.attention(q, k, v, f, upstream, case.factor, case.causal)
    p = exact.weights

    def times(path: str, a: Any, b: Any) -> Any:
        return np.einsum(path, np.abs(a), np.abs(b))

    rows, columns = "nhqk,nhkd->nhqd", "nhqk,nhqd->nhkd"
    size = abs(case.factor) * times("nhqd,nhkd->nhqk", q, k).max(-1, keepdims=True)
    e = u * ((d + 8) * 2 * size + 4 * keys + 16) + of_weights
    ones = np.ones_like(p) * case.scale

    out = times(rows, p * f * (e + keys * u), v) + of_products * times(rows, ones, v) + s * np.abs(exact.out) + t
    dv = times(columns, p * f * (e + queries * u), upstream) + of_products * times(columns, ones, upstream)
    dv += s * np.abs(exact.dv) + t
    delta = (np.abs(upstream) * (out + d * u * np.abs(exact.out))).sum(-1, keepdims=True)
    handled = np.abs(exact.of_weights) * f + np.abs((upstream * exact.out).sum(-1, keepdims=True))
    ds = p * ((e + 8 * u) * handled + d * u * times("nhqd,nhkd->nhqk", upstream, v) * f + delta) + of_products
    ds_size = p * handled
    dq = times(rows, ds + keys * u * ds_size, k) * abs(case.factor) + s * np.abs(exact.dq) + t
    dk = times(columns, ds + queries * u * ds_size, q) * abs(case.factor) + s * np.abs(exact.dk) + t

    for name, bound in {"out": out, "dq": dq, "dk": dk, "dv": dv}.items():
        error = np.abs(got[name].detach().double().numpy() - getattr(exact, name))
        assert (error <= bound).all(), (name, float((error / bound).max()))
        assert got[name].dtype == case.q.dtype
