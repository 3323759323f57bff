"""The Triton kernels of softmax_token_dropout against the float64 twins, interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import softmax_cases as cases
import torch
from mask_contracts import filled_memory  # noqa: F401
from softmax_cases import DTYPES
from softmax_cases import FIELDS
from softmax_cases import SHARING

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("filled_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 3, 5, 7), (3, 2, 8, 8), (2, 1, 3, 40), (1, 5, 13, 300)]


# NumPy warns of rows that only fill a tile: nothing but -inf.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_kernels_equal_the_twin(index: int, sharing: tuple[bool, bool]) -> None:
    from autodropout.kernels import softmax_triton

    shape, seed, rank = SHAPES[index], 2**40 + index, index % 2 * 3
    for dtype in DTYPES if index == 0 else DTYPES[1::2]:
        case = cases.case(shape, dtype, seed, sharing, "expected", rank)
        scale = torch.tensor(case.scale, dtype=torch.float64, device=DEVICE)
        key = torch.tensor(seed, device=DEVICE)
        # Others are copied together first, whatever is shared.
        formats = (torch.contiguous_format, torch.channels_last)
        for memory_format in formats if sharing == SHARING[0] else formats[:1]:
            scores = case.scores.to(DEVICE).contiguous(memory_format=memory_format)
            y, *rows = softmax_triton.forward(scores, FIELDS, key, scale, *sharing, rank)
            # Where it is dropped the gradient does not count, whatever it is.
            upstream = torch.where(case.kept, case.upstream, float("nan")).to(DEVICE)
            arguments = (upstream, scores, *rows, FIELDS, key, scale, *sharing, rank)
            gradient = softmax_triton.backward(*arguments)
            assert y.stride() == gradient.stride() == scores.stride()
            cases.check(y.cpu(), gradient.cpu(), case)
