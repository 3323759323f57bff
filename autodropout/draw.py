"""A picture of a policy: for each site a row of random placements of its pattern, and its exact expected rate."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import torch

from .patterns import Pattern
from .patterns import TokenPattern
from .patterns.checks import integer
from .policy import LAYER_PLACES
from .policy import Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from .policy import Site

PLACEMENTS = 8  # panels of a row: the first channel of so many samples
MAX_MAP = 512  # more cells than a panel has dots
SUFFIXES = (".png", ".pdf")
DPI = 200

KEPT, DROPPED, EDGE, INK, MUTED = "#eef1f5", "#1d4e89", "#c3cad4", "#1a1a1a", "#5f6b7a"

# Inches. Everything is placed by hand: a row then looks the same in a policy of one site and in one of fifty.
MARGIN, LABEL, PANEL, GAP, TITLE, HEAD, BETWEEN = 0.1, 1.2, 0.86, 0.07, 0.2, 0.28, 0.13


def draw_policy(policy: Policy, map_size: int = 32) -> Figure:
    """Draws each site as a row of placements on a map of map_size x map_size cells.

    At the places of a Transformer, and of token patterns anywhere, these are sequences of map_size tokens, one a row,
    with map_size channels; at a softmax the tokens are keys, and the channels the queries of one head.

    The seeds are fixed (row i draws with seed i), so the same policy gives the same figure.

    Args:
        policy: what to draw. A single pattern is `Policy.uniform(pattern)`.
        map_size: side of the map in cells, in [1, 512].

    Returns:
        A matplotlib Figure that belongs to nobody: no pyplot, no display, no global state.

    Raises:
        TypeError, ValueError: `policy` is no policy; map_size is not such an integer.
        ImportError: matplotlib is not installed.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy, got {policy!r} of type {type(policy).__name__}")
    map_size = integer("map_size", map_size, 1, MAX_MAP)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise ImportError("drawing needs matplotlib: pip install autodropout[draw]", name="matplotlib") from error

    row = TITLE + PANEL
    width = 2 * MARGIN + LABEL + PLACEMENTS * PANEL + (PLACEMENTS - 1) * GAP
    height = 2 * MARGIN + HEAD + len(policy.sites) * row + (len(policy.sites) - 1) * BETWEEN
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    left = MARGIN + LABEL
    colours = ListedColormap([DROPPED, KEPT])

    def text(x: float, y: float, string: str, **style: Any) -> Text:
        # parse_math: a dollar sign in the name of a site is a dollar sign.
        return figure.text(x / width, 1 - y / height, string, parse_math=False, **style)

    heading = f"{PLACEMENTS} random placements per site {_canvas(policy, map_size)}"
    text(left, MARGIN, heading, size=9, weight="bold", color=INK, va="top")
    figure.legend(
        handles=[Patch(facecolor=DROPPED, label="dropped"), Patch(facecolor=KEPT, edgecolor=EDGE, label="kept")],
        loc="upper right",
        bbox_to_anchor=(1 - MARGIN / width, 1 - MARGIN / height),
        borderaxespad=0,
        borderpad=0,
        ncols=2,
        frameon=False,
        fontsize=8,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )
    for i, site in enumerate(policy.sites):
        top = MARGIN + HEAD + i * (row + BETWEEN)
        middle = top + TITLE + PANEL / 2
        name = text(MARGIN, middle - 0.02, site.name, size=8.5, weight="bold", color=INK, va="bottom")
        _cut(name, (LABEL - GAP) * figure.dpi)
        where = f"depth {site.depth:.3g}" if site.place == "batch_norm" else f"depth {site.depth:.3g}, {site.place}"
        text(MARGIN, middle + 0.04, where, size=7.5, color=MUTED, va="top")
        text(left, top + TITLE - 0.055, _describe(site), size=7.5, color=INK, va="baseline")
        label = f"expected rate {100 * _expected_rate(site.pattern, map_size):.3g}%"
        text(width - MARGIN, top + TITLE - 0.055, label, size=7.5, color=INK, ha="right", va="baseline")
        for j, mask in enumerate(_masks(site.pattern, map_size, seed=i)):
            corner = (left + j * (PANEL + GAP)) / width, 1 - (top + row) / height
            axes = figure.add_axes((*corner, PANEL / width, PANEL / height), label=f"{i}.{j}")
            axes.imshow(mask.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="equal")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=EDGE, linewidth=0.6)
    return figure


def save_figure(policy: Policy, path: str | os.PathLike[str], map_size: int = 32) -> None:
    """Writes the figure of `draw_policy` as PNG or PDF, whichever the suffix says.

    Raises:
        ValueError: another suffix.
        TypeError, ImportError: as `draw_policy`.
        OSError: the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"path must end in one of {', '.join(SUFFIXES)}, got {str(path)!r}")
    # Without a date the same policy gives the same bytes.
    metadata = {"CreationDate": None} if suffix == ".pdf" else {}
    draw_policy(policy, map_size).savefig(path, dpi=DPI, metadata=metadata)


def _masks(pattern: Pattern | None, map_size: int, seed: int) -> torch.Tensor:
    """Masks of the first channel of PLACEMENTS samples, bool (PLACEMENTS, map_size, map_size), True = kept.

    Of token patterns: tokens by channels.
    """
    if pattern is None:
        return torch.ones((PLACEMENTS, map_size, map_size), dtype=torch.bool)
    if isinstance(pattern, TokenPattern):
        return pattern.mask(PLACEMENTS, map_size, map_size, seed)
    return pattern.mask(PLACEMENTS, 1, map_size, map_size, seed)[:, 0]


def _expected_rate(pattern: Pattern | None, map_size: int) -> float:
    """On a map of map_size x map_size cells, of token patterns in sequences of map_size tokens."""
    if pattern is None:
        return 0.0
    if isinstance(pattern, TokenPattern):
        return pattern.expected_rate(map_size)
    return pattern.expected_rate(map_size, map_size)


def _of_tokens(site: Site) -> bool:
    return site.place in LAYER_PLACES or isinstance(site.pattern, TokenPattern)


def _canvas(policy: Policy, map_size: int) -> str:
    kinds = {_of_tokens(site) for site in policy.sites}
    if len(kinds) == 2:
        return f"on {map_size}\u00d7{map_size} cells, or tokens by channels"
    if True in kinds:
        return f"in sequences of {map_size} tokens, with {map_size} channels"
    return f"on a map of {map_size}\u00d7{map_size} cells"


def _describe(site: Site) -> str:
    """Kind, and the fields that differ from their defaults, as in `block: rate 0.1, block_size 7`."""
    pattern = site.pattern
    if pattern is None:
        return "off: nothing is dropped"
    shown = []
    for f in fields(pattern):
        value = getattr(pattern, f.name)
        if value == f.default:
            continue
        if isinstance(value, bool):
            shown.append(f.name)
        elif f.name == "repeat" and value == 0:
            shown.append("repeat unlimited")
        else:
            number = f"{value:.3g}".replace("-", "\u2212") if isinstance(value, (int, float)) else value
            shown.append(f"{f.name} {number}\u00b0" if f.name == "rotate" else f"{f.name} {number}")
    axes = "keys down, queries across" if site.place == "softmax" else "tokens down, channels across"
    return f"{pattern.op}: {', '.join(shown)}{f' ({axes})' if _of_tokens(site) else ''}"


def _cut(label: Text, width: float) -> None:
    """Cuts a name in front until it is at most `width` dots wide: the paths of modules differ at their ends."""
    name = label.get_text()
    while name and label.get_window_extent().width > width:
        name = name[1:]
        label.set_text(f"\u2026{name}")
