"""Outputs in huge pages: the same tensors, and what the system says of their memory."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autodropout import TiledPattern
from autodropout.kernels import pages
from autodropout.kernels import tiled_dropout

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
granted = pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this system grants no huge pages"
)
LARGE = (16, 64, 64, 64)  # 16 MiB


def advised(y: torch.Tensor) -> int:
    """Bytes of y in mappings with the flag `hg`, for which huge pages were asked."""
    begin, end = y.data_ptr(), y.data_ptr() + y.nbytes
    total, low, high = 0, 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(bound, 16) for bound in mapping.groups())
        elif line.startswith("VmFlags:") and "hg" in line.split():
            total += max(0, min(end, high) - max(begin, low))
    return total


@granted
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_are_in_huge_pages_but_for_their_ends(format: torch.memory_format) -> None:
    y = pages.empty_like(torch.empty(LARGE).to(memory_format=format))
    assert advised(y) >= y.nbytes - 2 * pages.HUGE_PAGE
    assert y.stride() == torch.empty(LARGE).to(memory_format=format).stride()


def test_only_whole_huge_pages_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What shares its page with other owners is left out; a small tensor may have no page of its own."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_huge_pages", lambda: lambda *range_: asked.append(range_))
    pages.empty_like(torch.empty(pages.LARGE // 4 - 1))
    assert asked == []
    y = pages.empty_like(torch.empty(pages.LARGE // 4 + 12_345))
    ((begin, length),) = asked
    assert begin % pages.HUGE_PAGE == length % pages.HUGE_PAGE == 0
    assert 0 <= begin - y.data_ptr() < pages.HUGE_PAGE
    assert 0 <= y.data_ptr() + y.nbytes - (begin + length) < pages.HUGE_PAGE


@pytest.mark.parametrize("request_is_possible", [True, False])
def test_values_do_not_depend_on_it(request_is_possible: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(LARGE, generator=torch.Generator().manual_seed(1))
    atlas = TiledPattern(size=0.25).atlas(64, 64)
    monkeypatch.setattr(pages, "LARGE", 2**60)
    expected = tiled_dropout(x, atlas, seed=5)
    monkeypatch.undo()
    if not request_is_possible:
        monkeypatch.setattr(pages, "_huge_pages", lambda: None)
    assert torch.equal(tiled_dropout(x, atlas, seed=5), expected)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    pages._huge_pages.cache_clear()
    yield
    pages._huge_pages.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_systems_without_such_pages_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert pages._huge_pages() is None


@pytest.mark.usefixtures("asked_anew")
def test_numpys_switch_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    monkeypatch.setenv("NUMPY_MADVISE_HUGEPAGE", "1")
    assert pages._huge_pages() is not None
    pages._huge_pages.cache_clear()
    monkeypatch.setenv("NUMPY_MADVISE_HUGEPAGE", "0")
    assert pages._huge_pages() is None
