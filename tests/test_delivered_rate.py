"""The share of cells that is really dropped, against what was promised.

Each assertion compares a mean over independent planes with its expectation at 4 standard errors: two-sided
alpha = 6.3e-5 by the normal approximation, so that a correct implementation would fail one of the 240 tiled comparisons
with probability 1.5%, and one of the 48 of DropBlock with 0.3%, once: the seeds are fixed, so a pass stays a pass.
"""

from __future__ import annotations

import math

import pytest
import torch
from tiled_cases import Case
from tiled_cases import random_cases
from twins import tiled_numpy as twin

from autodropout import BlockPattern
from autodropout.kernels import block_dropout

PLACEMENTS = 2048
SIGMAS = 4.0
TILED = [case for case in random_cases(400, seed=77, longest=32) if case.shape[2] * case.shape[3] >= 16][:240]
BATCHES = 12


def test_the_cases_are_telling() -> None:
    """Most rates are neither 0 nor 1, and most depend on the placement, so that placements are put to the test."""
    rates = [twin.expected_rate(case.tiling, *case.shape[2:]) for case in TILED]
    assert len(TILED) >= 200
    assert sum(0.01 < rate < 0.99 for rate in rates) >= 150
    assert sum(twin.rate_variance(case.tiling, *case.shape[2:]) > 0 for case in TILED) >= 130


def check_tiled(case: Case) -> None:
    H, W = case.shape[2:]
    expected = twin.expected_rate(case.tiling, H, W)
    assert case.pattern.expected_rate(H, W) == float(expected)
    # Independent placements: one a sample with share_c, else one a channel, too.
    N, C = (PLACEMENTS, 1) if case.share_c else (PLACEMENTS // 16, 16)
    kept = case.pattern.mask(N, C, H, W, case.seed, rank=case.rank)
    dropped = kept.numel() - int(kept.sum())
    variance = twin.rate_variance(case.tiling, H, W)
    if variance == 0:
        assert dropped == expected * kept.numel(), case
    else:
        error = abs(dropped / kept.numel() - float(expected))
        assert error <= SIGMAS * math.sqrt(variance / PLACEMENTS), case


@pytest.mark.parametrize("batch", range(BATCHES))
def test_tiled_patterns_deliver_the_exact_expected_rate(batch: int) -> None:
    for case in TILED[batch::BATCHES]:
        check_tiled(case)


@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("block_size", [3, 5, 7])
@pytest.mark.parametrize("side", [7, 8, 14, 28])
def test_drop_block_delivers_the_requested_rate(side: int, block_size: int, rate: float, share_c: bool) -> None:
    """The standard error is that of the mean of the planes' shares, estimated from their spread."""
    N, C = (4 * PLACEMENTS, 1) if share_c else (PLACEMENTS // 4, 16)
    x = torch.ones(N, C, side, side)
    y = block_dropout(x, (rate, block_size), 2**33 + side, share_c=share_c, normalize="none")
    shares = (y == 0).double().mean(dim=(2, 3)).flatten()
    error = abs(shares.mean().item() - rate)
    assert error <= SIGMAS * shares.std().item() / math.sqrt(shares.numel())
    # Decisions come from 32-bit words: less than 2^6 times the whole map hangs on thresholds, each off by up to 2^-32.
    assert BlockPattern(rate, block_size).expected_rate(side, side) == pytest.approx(rate, abs=2**-26)
