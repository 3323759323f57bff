"""Device helpers of the tiled kernels: division by reciprocals, and the masked product from bits in words.

A division by a number that only the launch knows takes some 20 instructions in 32 bits and 100 in 64; by its reciprocal
three and a dozen.
"""

from __future__ import annotations

import triton
import triton.language as tl


def divisor(d: int) -> tuple[int, int, int]:
    """A divisor d in [1, 2^31) with the reciprocal and the shift by which the kernels divide.

    n // d is the upper half of (n + 1) * reciprocal, shifted. With 64 bits, s = floor(log2(d)) and the reciprocal
    floor((2^(64+s) - 1) / d) that is (n + 1) / d * (1 - r / 2^(64+s)), 1 <= r <= d: less than (n + 1) / d, and not
    less than n / d as long as (n + 1) * d <= 2^(64+s), so exact for n < 2^63. The upper half of the reciprocal is the
    one for 32 bits, exact for n < 2^31.
    """
    shift = d.bit_length() - 1
    return d, ((1 << (64 + shift)) - 1) // d, shift


@triton.jit
def wide_quotient(n, reciprocal, shift):
    """n // d of a 64-bit n, by what `divisor` makes of d."""
    return (tl.umulhi((n + 1).to(tl.uint64), reciprocal.to(tl.uint64)) >> shift.to(tl.uint64)).to(tl.int64)


@triton.jit
def quotient(n, reciprocal, shift):
    """n // d of a 32-bit n."""
    upper = (reciprocal.to(tl.uint64) >> 32).to(tl.uint32)
    return (tl.umulhi((n + 1).to(tl.uint32), upper) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def byte_of_row(start, row, width, period, period_reciprocal, period_shift):
    """Where, in the table of a large map, the window of a start has the first cell of a row."""
    column = quotient(start, period_reciprocal, period_shift)
    return (start - column * period + row) * (2 * width - 1) + width - 1 - column


@triton.jit
def opaque(words, scale):
    """The same words, since a scale of 0 means that all is dropped. But the compiler cannot see the bytes through it.

    It would test each byte for itself, in 16 bits and two at a time, which takes two instructions an element more.
    """
    return tl.where(scale > 0, words, 0)


@triton.jit
def product(x, kept, scale):
    """`x * scale` in the compute type, cast to x's type; 0 at dropped cells, whatever x holds there.

    The select comes first: behind the product the compiler would move it behind the cast, to 16-bit numbers that it has
    to unpack and pack again (2 instructions an element).
    """
    if x.dtype == tl.float64:
        return tl.where(kept, x, 0.0) * scale
    else:
        return (tl.where(kept, x.to(tl.float32), 0.0) * scale.to(tl.float32)).to(x.dtype)


@triton.jit
def product_of_pairs(pairs, first_kept, second_kept, scale, dtype: tl.constexpr):
    """The same of 16-bit numbers that were loaded two by two as int32; the result has a last axis of 2.

    A shift and a mask unpack two of bfloat16; the compiler's own conversion takes three instructions.
    """
    if dtype == tl.bfloat16:
        first = (pairs << 16).to(tl.float32, bitcast=True)
        second = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        first = pairs.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        second = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    scale = scale.to(tl.float32)
    first = tl.where(first_kept, first, 0.0) * scale
    return tl.join(first, tl.where(second_kept, second, 0.0) * scale).to(dtype)
