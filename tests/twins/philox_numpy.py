"""Philox4x32 with 10 rounds (Salmon et al., SC 2011) in NumPy uint64: no product of two 32-bit words overflows it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

Words = NDArray[np.uint64]

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def key_of(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits of a seed in [-2^63, 2^64), taken modulo 2^64."""
    return seed % 2**32, (seed // 2**32) % 2**32


def philox(
    c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike, key: tuple[int, int]
) -> tuple[Words, Words, Words, Words]:
    """The four output words of the counters (c0, c1, c2, c3), which broadcast; values below 2^32 in uint64."""
    x0, x1, x2, x3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3)))
    k0, k1 = key
    for _ in range(10):
        p0 = MULTIPLIERS[0] * x0
        p1 = MULTIPLIERS[1] * x2
        x0, x1, x2, x3 = (p1 >> SHIFT) ^ x1 ^ np.uint64(k0), p1 & LOW, (p0 >> SHIFT) ^ x3 ^ np.uint64(k1), p0 & LOW
        k0 = (k0 + KEY_STEPS[0]) % 2**32
        k1 = (k1 + KEY_STEPS[1]) % 2**32
    return x0, x1, x2, x3


def below(word: Words, n: int) -> NDArray[np.int64]:
    """A word as an integer in [0, n): (word * n) >> 32."""
    return ((word * np.uint64(n)) >> SHIFT).astype(np.int64)
