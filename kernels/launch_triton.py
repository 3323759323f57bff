"""What the launchers of Triton kernels share: grains of vector accesses, lengths of tiles, words as arguments."""

from __future__ import annotations

import math

import triton


def grain_of(*numbers: int) -> int:
    """The largest power of two up to 16 that divides them all: what vector accesses can build on."""
    return math.gcd(16, *numbers)


def tile_length(number: int, most: int) -> tuple[int, int]:
    """Of so many in a row: how many a tile has, a power of two up to `most`, and how many tiles there are.

    The longest whose last tile wastes at most a sixteenth; else the one that wastes least, at least 8.
    """
    longest = min(most, triton.next_power_of_2(number))
    lengths = [longest >> k for k in range(longest.bit_length()) if longest >> k >= min(8, longest)]
    padded = {length: triton.cdiv(number, length) * length for length in lengths}
    fitting = [length for length in lengths if padded[length] * 16 <= number * 17]
    length = fitting[0] if fitting else min(lengths, key=lambda length: (padded[length], -length))
    return length, padded[length] // length


def as_int32(word: int) -> int:
    """A uint32 as the int32 of the same bits: as an int64 it would compile the kernel anew."""
    return word - 2**32 if word >= 2**31 else word
