"""Random tiled patterns with their maps and seeds, the same on every run, and what the twin expects of them."""

from __future__ import annotations

import functools
import random
from dataclasses import asdict
from dataclasses import dataclass

import torch
from twins import tiled_numpy as twin
from twins.tiled_numpy import Tiling

from autodropout import TiledPattern

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**40 + 8, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**32), -(2**63)]
# Where implementations may change course: maps too large for a table of all windows, many channels, many planes, and
# tensors too large for one pass.
LARGE = [
    (2, 3, 96, 88),
    (1, 2, 7, 300),
    (2, 2, 3, 700),
    (1, 2, 150, 70),
    (3, 70, 14, 14),
    (40, 64, 4, 4),
    (2, 40, 64, 64),
    (700, 2, 16, 16),
    (1100, 256, 2, 2),
]
SIDES = [(1, 1), (1, 2), (2, 1), (1, 64), (64, 1), (64, 64), (7, 9), (64, 3)]


@dataclass(frozen=True)
class Case:
    tiling: Tiling
    share_c: bool
    shape: tuple[int, int, int, int]
    seed: int
    rank: int

    @property
    def pattern(self) -> TiledPattern:
        return TiledPattern(**asdict(self.tiling), share_c=self.share_c)


def random_tiling(rng: random.Random) -> Tiling:
    """All fields over their whole ranges, most often where neither everything nor nothing is dropped."""
    wide = rng.random() < 0.2
    size = rng.uniform(0, 2) if wide else rng.uniform(0.05, 0.5)
    stride = rng.choice([0.0, rng.uniform(0, 4)]) if wide else rng.uniform(0.05, 0.8)
    repeat = rng.choice([0, 1, 1, 2, 3, 5, 64, rng.randint(0, 64)])
    if repeat == 0 and stride == 0:
        stride = rng.uniform(0.1, 1)
    rotate = rng.choice([0.0, 90.0, -180.0, 45.0, rng.uniform(-90, 90), rng.uniform(-1e4, 1e4)])
    shear_x, shear_y = (rng.choice([0.0, rng.uniform(-0.5, 0.5), rng.uniform(-2, 2)]) for _ in "xy")
    return Tiling(size, stride, repeat, rotate, shear_x, shear_y)


def random_cases(count: int, seed: int, longest: int) -> list[Case]:
    """`count` cases; sides lean to the small ones of 1 to `longest`, after every pair of SIDES that fits."""
    rng = random.Random(seed)
    sides = [pair for pair in SIDES if max(pair) <= longest]
    cases = []
    for i in range(count):
        if i < len(sides):
            H, W = sides[i]
        else:
            H, W = (1 + int(longest * rng.random() ** 2) for _ in "HW")
        planes = rng.choice([(1, 1), (2, 3), (3, 2), (1, 5), (4, 1)])
        case_seed = SEEDS[i] if i < len(SEEDS) else rng.randrange(-(2**63), 2**64)
        cases.append(Case(random_tiling(rng), rng.random() < 0.4, (*planes, H, W), case_seed, rng.choice([0, 3])))
    return cases


def large_cases(seed: int) -> list[Case]:
    """One case for each shape of LARGE; a long map is turned little, or most of its cells would lie off the pattern."""
    rng = random.Random(seed)
    cases = []
    for i, shape in enumerate(LARGE):
        turn = 90 * min(shape[2:]) / max(shape[2:])
        tiling = Tiling(
            rng.uniform(0.3, 0.5), rng.uniform(0.2, 0.6), i % 4, rng.uniform(-turn, turn), rng.uniform(-0.5, 0.5)
        )
        cases.append(Case(tiling, i in (1, 3), shape, rng.randrange(-(2**63), 2**64), 3 * (i % 2)))
    return cases


@functools.cache
def kept_of(case: Case) -> torch.Tensor:
    return torch.from_numpy(twin.mask(case.tiling, *case.shape, case.seed, case.share_c, case.rank))


@functools.cache
def scale_of(case: Case, normalize: str) -> float:
    if normalize == "mask":
        return twin.mask_scale(kept_of(case).numpy())
    if normalize == "expected":
        return twin.expected_scale(twin.expected_rate(case.tiling, *case.shape[2:]))
    return 1.0


def expected_output(x: torch.Tensor, case: Case, normalize: str) -> torch.Tensor:
    name = str(x.dtype).removeprefix("torch.")
    values = twin.output(x.detach().cpu().double().numpy(), kept_of(case).numpy(), scale_of(case, normalize), name)
    return torch.from_numpy(values)


def same(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal numbers, hence equal bits but for the sign of zero; a NaN equals nothing."""
    return torch.equal(result.detach().cpu().double(), expected)


def activations(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers over many binades: with float16 down to its subnormals and up to where scaling overflows."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-18, 16, shape, generator=generator)
    return torch.ldexp(torch.randn(shape, generator=generator, dtype=torch.float64), exponents).to(dtype)
