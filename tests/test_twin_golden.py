"""The NumPy twins against published and frozen vectors, so that what judges the kernels is itself judged."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from twins import tiled_numpy as twin
from twins.golden import GOLDEN
from twins.golden import GOLDEN_ROWS
from twins.philox_numpy import below
from twins.philox_numpy import key_of
from twins.philox_numpy import philox

# Counter, key and output; the vectors published with Random123.
PHILOX_VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = words(key)
    assert [int(w) for w in philox(*words(counter), (k0, k1))] == words(expected)


def test_philox_broadcasts() -> None:
    grid = philox(np.arange(3)[:, None], 7, np.arange(2)[None, :], 9, (1, 2))
    for i in range(3):
        for j in range(2):
            assert [int(w[i, j]) for w in grid] == [int(w) for w in philox(i, 7, j, 9, (1, 2))]


@pytest.mark.parametrize(
    ("seed", "key"),
    [
        (5, (5, 0)),
        (2**40 + 8, (8, 2**8)),
        (-1, (2**32 - 1, 2**32 - 1)),
        (-(2**63), (0, 2**31)),
        (2**63, (0, 2**31)),
        (2**64 - 2, (2**32 - 2, 2**32 - 1)),
        (-2, (2**32 - 2, 2**32 - 1)),
    ],
)
def test_key_of_a_seed(seed: int, key: tuple[int, int]) -> None:
    assert key_of(seed) == key


def test_words_become_integers_of_a_range() -> None:
    word = np.array([0, 2**31 - 1, 2**31, 2**32 - 1], dtype=np.uint64)
    assert below(word, 1).tolist() == [0, 0, 0, 0]
    assert below(word, 10).tolist() == [0, 4, 5, 9]


@pytest.mark.parametrize(("n", "c"), sorted(GOLDEN_ROWS))
def test_golden_mask(n: int, c: int) -> None:
    kept = twin.mask(GOLDEN, N=2, C=2, H=7, W=9, seed=2**40 + 8, rank=3)
    rows = ["".join(".#"[int(not k)] for k in row) for row in kept[n, c]]
    assert " ".join(rows) == GOLDEN_ROWS[n, c]


def test_a_square_by_hand() -> None:
    """One 2x2 tile, centred at (cy, cx), covers rows cy-1..cy and columns cx-1..cx: u = dy + 1, v = dx + 1."""
    square = twin.Tiling(size=0.5)
    expected = np.zeros((4, 4), dtype=bool)
    expected[1:3, 0:2] = True
    assert np.array_equal(twin.dropped_around(square, 4, 4, cy=2, cx=1), expected)
    # Of the 4x4 placements those with centre 0 on an axis lose one of two rows: mean rows dropped (1+2+2+2)/4 of 4.
    assert twin.expected_rate(square, 4, 4) == Fraction(7, 16) ** 2
    assert twin.rate_variance(square, 4, 4) == Fraction(13, 64) ** 2 - Fraction(7, 16) ** 4


def test_stripes_by_hand() -> None:
    """Unlimited repeat, tile 1, gap 1 on a 4x4 map: every placement drops rows and columns of one parity."""
    stripes = twin.Tiling(size=0.25, stride=0.25, repeat=0)
    assert twin.expected_rate(stripes, 4, 4) == Fraction(1, 4)
    assert twin.rate_variance(stripes, 4, 4) == 0


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_rounding_of_the_output(dtype: torch.dtype, name: str) -> None:
    """Ties, subnormals and overflow round as PyTorch's own cast does."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 20, (4096,), generator=generator)
    x = torch.ldexp(torch.randn(4096, generator=generator), exponents)
    tie = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65520.0, 3.4e38])
    x = torch.cat([x, tie])
    got = twin.output(x.double().numpy(), np.ones(x.shape, dtype=np.bool_), 1.0, name)
    assert torch.equal(torch.from_numpy(got), x.to(dtype).double())
