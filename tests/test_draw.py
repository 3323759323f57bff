"""The figure of a policy: what it shows is the masks and the rates, and nothing runs out of the page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autodropout.draw import DPI
from autodropout.draw import PLACEMENTS
from autodropout.draw import draw_policy
from autodropout.draw import save_figure
from autodropout.patterns import BernoulliPattern
from autodropout.patterns import BlockPattern
from autodropout.patterns import TiledPattern
from autodropout.patterns import TokenPattern
from autodropout.policy import Policy
from autodropout.policy import Site
from autodropout.policy import load_policy

LONGEST = TiledPattern(0.123456, 0.234567, 62, -123.456, -0.55555, -0.44444, True, True)
MIXED = Policy(
    (
        Site("stages.3.blocks.26.$norm$", 0.0, pattern=None),
        Site("bernoulli", 0.2, pattern=BernoulliPattern(0.2)),
        Site("sample", 0.4, "branch", pattern=BernoulliPattern(0.5, "sample")),
        Site("block", 0.6, pattern=BlockPattern(0.1, 7, share_c=True)),
        Site("unlimited", 0.8, pattern=TiledPattern(0.125, 0.25, repeat=0, rotate=-20)),
        Site("longest", 1.0, pattern=LONGEST),
    )
)

SPANS = TokenPattern(4, 12, rate=0.4, share_t=True)
TOKENS = Policy(
    (
        Site("layers.0.query", 0.0, "query", SPANS),
        Site("layers.0.softmax", 0.0, "softmax", TokenPattern(2**29, rate=0.123456, share_t=True, share_c=True)),
        Site("layers.0.output", 0.5, "output", BernoulliPattern(0.25)),
        Site("layers.0.residual", 1.0, "residual", None),
    )
)


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_every_panel_is_a_mask() -> None:
    figure = draw_policy(MIXED, 16)
    assert len(figure.axes) == len(MIXED.sites) * PLACEMENTS
    panels = {axes.get_label(): np.asarray(axes.images[0].get_array()) for axes in figure.axes}
    for i, site in enumerate(MIXED.sites):
        expected = np.ones((PLACEMENTS, 16, 16), dtype=bool)
        if site.pattern is not None:
            expected = site.pattern.mask(PLACEMENTS, 1, 16, 16, seed=i)[:, 0].numpy()
        for j in range(PLACEMENTS):
            assert np.array_equal(panels[f"{i}.{j}"], expected[j])


def test_rows_state_pattern_depth_and_exact_rate() -> None:
    shown = texts(draw_policy(MIXED, 16))
    assert shown[0] == "8 random placements per site on a map of 16\u00d716 cells"
    rows = [shown[1 + 4 * i : 5 + 4 * i] for i in range(len(MIXED.sites))]
    assert rows[0][0].endswith("$norm$")
    assert rows[0][1:] == ["depth 0", "off: nothing is dropped", "expected rate 0%"]
    assert rows[1] == ["bernoulli", "depth 0.2", "bernoulli: rate 0.2", "expected rate 20%"]
    assert rows[2][1:3] == ["depth 0.4, branch", "bernoulli: rate 0.5, shared sample"]
    assert rows[3][2:] == ["block: rate 0.1, block_size 7, share_c", "expected rate 10%"]
    assert rows[4][2] == "tiled: size 0.125, stride 0.25, repeat unlimited, rotate \u221220\u00b0"
    assert rows[5][2] == (
        "tiled: size 0.123, stride 0.235, repeat 62, rotate \u2212123\u00b0, "
        "shear_x \u22120.556, shear_y \u22120.444, share_c, residual"
    )
    assert rows[5][3] == f"expected rate {100 * LONGEST.expected_rate(16, 16):.3g}%"


def test_sites_of_a_transformer_are_tokens_by_channels() -> None:
    figure = draw_policy(TOKENS, 20)
    shown = texts(figure)
    assert shown[0] == "8 random placements per site in sequences of 20 tokens, with 20 channels"
    assert shown[1:5] == [
        "layers.0.query",
        "depth 0, query",
        "token: size 4, stride 12, rate 0.4, share_t (tokens down, channels across)",
        "expected rate 10%",
    ]
    assert shown[7].endswith("share_t, share_c (keys down, queries across)")
    assert shown[11] == "bernoulli: rate 0.25 (tokens down, channels across)"
    assert shown[15] == "off: nothing is dropped"
    panels = {axes.get_label(): np.asarray(axes.images[0].get_array()) for axes in figure.axes}
    expected = SPANS.mask(PLACEMENTS, 20, 20, seed=0).numpy()
    assert all(np.array_equal(panels[f"0.{j}"], expected[j]) for j in range(PLACEMENTS))
    runs = [np.diff(column).nonzero()[0].size for column in panels["0.0"].T]
    assert max(runs) <= 4, "a span is a vertical bar: at most two begin and end in 20 tokens"
    both = Policy((*MIXED.sites, *TOKENS.sites))
    assert texts(draw_policy(both, 20))[0] == "8 random placements per site on 20\u00d720 cells, or tokens by channels"


@pytest.mark.parametrize(
    ("policy", "side"), [(MIXED, 8), (TOKENS, 8), (TOKENS, 512), (Policy((*MIXED.sites, *TOKENS.sites)), 512)]
)
def test_nothing_leaves_the_page_or_overlaps(policy: Policy, side: int) -> None:
    figure = draw_policy(policy, side)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.texts]
    boxes += [axes.get_window_extent() for axes in figure.axes]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 :]:
            assert not one.overlaps(other)


def test_drawing_needs_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from autodropout.draw import save_figure; from autodropout.policy import load_policy; "
        "assert 'matplotlib' not in sys.modules; save_figure(load_policy('hand-v0'), sys.argv[1], 8); "
        "assert 'matplotlib.figure' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.png")], check=True, timeout=120)


def test_png_and_pdf_files(tmp_path: Path) -> None:
    policy = load_policy("hand-v0")
    for suffix, magic in ((".png", b"\x89PNG\r\n\x1a\n"), (".PDF", b"%PDF-")):
        first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
        save_figure(policy, first)
        save_figure(policy, str(second))
        assert first.read_bytes().startswith(magic)
        assert first.read_bytes() == second.read_bytes()
    from matplotlib.image import imread

    height, width = imread(tmp_path / "first.png").shape[:2]
    inches = draw_policy(policy).get_size_inches()
    assert abs(width - inches[0] * DPI) < 1
    assert abs(height - inches[1] * DPI) < 1


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^path must end in one of \.png, \.pdf, got '.*policy\.jpg'$"):
        save_figure(MIXED, tmp_path / "policy.jpg")
    for size in (0, 513):
        with pytest.raises(ValueError, match=rf"^map_size must be an integer in \[1, 512\], got {size}$"):
            draw_policy(MIXED, size)
    with pytest.raises(TypeError, match=r"^map_size must be an integer in \[1, 512\], got 8\.5 of type float$"):
        draw_policy(MIXED, 8.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^policy must be a Policy, got 'hand-v0' of type str$"):
        draw_policy("hand-v0")  # type: ignore[arg-type]


def test_one_cell_is_a_map() -> None:
    draw_policy(MIXED, 1).canvas.draw()


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^drawing needs matplotlib: pip install autodropout\[draw\]$"):
        draw_policy(MIXED)
