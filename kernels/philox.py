"""Philox4x32-10 (Salmon et al. 2011) in int64, equal to `tl.philox` bit for bit on every device.

A word is a uint32 held in an int64, because PyTorch has next to no arithmetic on uint32. An int64 product wraps like
the unsigned one; the shift that follows is arithmetic and leaves sign bits above bit 31, which one mask per word
removes. On the CPU a loop does all of it where Numba is installed. Where it is not, few words come from NumPy, whose
operations cost a fifth of PyTorch's to begin.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .compiled import has_numba

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Words for which NumPy is faster on two cores: 0.15 ms instead of 0.66 for 128, 0.5 instead of 0.9 for 16,384, more
# than PyTorch on two threads from 32,768 on.
FEW = 1 << 14

Counter = torch.Tensor | int
Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(c0: Counter, c1: Counter, c2: Counter, c3: Counter, seed: torch.Tensor) -> Words:
    """The four words of counter (c0, c1, c2, c3) under the key (low, high 32 bits of seed).

    Args:
        c0, c1, c2, c3: counter words, int64 tensors with values in [0, 2^32) that broadcast against each other, or
            ints. Words that vary along different axes should be passed unexpanded: the first two rounds then run on the
            small axes, which saves a fifth of the work.
        seed: 0-d int64 tensor on the device of the counters; its 64 bits are the key.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    counter = (c0, c1, c2, c3)
    if seed.is_cpu and has_numba():
        from . import philox_numba

        return philox_numba.all_words(counter, int(seed))
    if seed.is_cpu:
        shape = torch.broadcast_shapes(*(word.shape for word in counter if isinstance(word, torch.Tensor)))
        if math.prod(shape) <= FEW:
            return _philox_of_few(counter, int(seed))
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(2):
        counter = _round(counter, k0, k1)
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    c0, c1, c2, c3 = counter
    assert isinstance(c0, torch.Tensor)
    assert isinstance(c2, torch.Tensor)

    # From here on every word has the full shape. The remaining rounds are bound by the cache, so they run in place in
    # six buffers: 10 passes a round instead of 12 allocations. Odd words keep their upper half until the next mask.
    shape = torch.broadcast_shapes(c0.shape, c2.shape)
    even0, even2 = c0.expand(shape).contiguous(), c2.expand(shape).contiguous()
    odd1, odd3 = c1, c3
    free0, free1, spare0, spare1 = (torch.empty_like(even0) for _ in range(4))
    for _ in range(ROUNDS - 2):
        torch.mul(even0, MULTIPLIERS[0], out=free0)
        torch.mul(even2, MULTIPLIERS[1], out=free1)
        torch.bitwise_right_shift(free1, 32, out=even0)
        even0.bitwise_xor_(odd1).bitwise_xor_(k0).bitwise_and_(MASK32)
        torch.bitwise_right_shift(free0, 32, out=even2)
        even2.bitwise_xor_(odd3).bitwise_xor_(k1).bitwise_and_(MASK32)
        odd1, odd3, free0, free1, spare0, spare1 = free1, free0, spare0, spare1, free1, free0
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    assert isinstance(odd1, torch.Tensor)
    assert isinstance(odd3, torch.Tensor)
    return even0, odd1.bitwise_and_(MASK32), even2, odd3.bitwise_and_(MASK32)


def _philox_of_few(counter: tuple[Counter, ...], seed: int) -> Words:
    """The same for CPU tensors, out of place in NumPy."""
    words: Any = tuple(word.numpy() if isinstance(word, torch.Tensor) else word for word in counter)
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    with np.errstate(over="ignore"):  # it warns of what wraps, but only where an array has no dimension
        for _ in range(ROUNDS):
            words = _round(words, k0, k1)
            k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    w0, w1, w2, w3 = (torch.from_numpy(np.asarray(word, dtype=np.int64)) for word in words)
    return w0, w1, w2, w3


def _round(counter: Any, k0: Any, k1: Any) -> Any:
    """One round on ints, tensors or arrays."""
    c0, c1, c2, c3 = counter
    p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
    return _high(p1) ^ (c1 ^ k0), p1 & MASK32, _high(p0) ^ (c3 ^ k1), p0 & MASK32


def _high(product: Any) -> Any:
    return (product >> 32) & MASK32


def below(word: torch.Tensor, n: int) -> torch.Tensor:
    """A word as an integer in [0, n): `(word * n) >> 32`, for n up to 2^31."""
    return (word * n) >> 32
