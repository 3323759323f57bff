"""Charts as inline SVG: no library, no script. `STYLE` has their colours, for light and dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 40
COLOURS = 12
TICKS = 6
MARGIN = 0.03  # of the range of y
NAME, GAP = 16, 6  # what the name of the y axis takes at the left, and what is between labels and axis
ROOM = 46  # for labels of y: wider ones get exponents, if that makes them less wide
# Widths of what is not as wide as a digit, in digits. A digit has 0.64 em in the widest of the usual fonts.
DIGIT, WIDTHS = 0.64 * 12, {",": 0.5, ".": 0.5, "\u2212": 1.32}
# Values count as one if they differ by less in relation, which is mostly rounding, and as 0 if they are smaller: floats
# have too few digits there for an axis.
SAME, ZERO = 1e-12, 1e-300

STYLE = """
:root { --ink: #1c2128; --muted: #5b6572; --line: #d8dee6; --paper: #ffffff; --panel: #f6f8fa;
  --c0: #1f6feb; --c1: #d9730d; --c2: #2a8a4a; --c3: #b83280; --c4: #6f42c1; --c5: #0e8a8a;
  --c6: #a8890b; --c7: #8a5a44; --c8: #c62f3b; --c9: #5b8c00; --c10: #55677d; --c11: #9c6ade; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e4e9ef; --muted: #9aa5b1; --line: #39424d; --paper: #12161b; --panel: #1b2128;
  --c0: #6cb0ff; --c1: #f0a35e; --c2: #6bc98a; --c3: #f08ac0; --c4: #b79af5; --c5: #57c9c9;
  --c6: #dcc04f; --c7: #c99a84; --c8: #ff8a80; --c9: #a8d65c; --c10: #9fb3c8; --c11: #d7b8ff; } }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--muted); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); stroke-width: 1; fill: none; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .dots { fill: none; stroke-width: 4.5; stroke-linecap: round; stroke-opacity: 0.55; }
svg .marks { fill: none; stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 2px 0 0; font-size: 13px; color: var(--muted); }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 5px; }
""" + "".join(
    f"svg .s{i} {{ stroke: var(--c{i}); }} svg .f{i} {{ fill: var(--c{i}); }} .b{i} {{ background: var(--c{i}); }}\n"
    for i in range(COLOURS)
)


@dataclass(frozen=True)
class Series:
    """What is drawn in one colour.

    Args:
        label: for the legend.
        x, y: the points, in order of x.
        form: "line", "step" (the value holds until the next), "dots", or "marks" (crosses on the axis; y is ignored).
        colour: index of a class of `STYLE`.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    form: str
    colour: int


def xy_chart(series: Sequence[Series], x_label: str, y_label: str, zero: bool = False) -> str:
    """A chart of series that share their axes, with its legend. `zero`: the y axis begins at 0.

    A chart without points is a sentence that says so.
    """
    drawn = [one for one in series if one.x]
    xs = [x for one in drawn for x in one.x]
    ys = [y for one in drawn if one.form != "marks" for y in one.y] + ([0.0] if zero else [])
    if not xs or len(ys) <= zero:
        return f"<p class='none'>{html.escape(y_label)}: nothing yet.</p>"
    margin = MARGIN * (max(ys) - min(ys))  # so that no dot is cut
    y_axis = _Axis(min(ys) - (0 if zero else margin), max(ys) + margin, HEIGHT - BOTTOM, TOP)
    left = max(LEFT, NAME + max(_width(label) for _, label in y_axis.ticks(ROOM)) + GAP)
    x_axis = _Axis(min(xs), max(xs), left, WIDTH - RIGHT, whole=all(x == int(x) for x in xs))
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    for one in drawn:
        points = [(x_axis(x), y_axis(y)) for x, y in zip(one.x, one.y, strict=True)]
        parts.append(f"<path class='{_CLASSES[one.form]} s{one.colour}' d='{_PATHS[one.form](points)}'/>")
    return _svg(parts, y_label) + legend([(one.label, one.colour, 1.0) for one in drawn])


def share_chart(
    labels: Sequence[str], shares: Sequence[Sequence[float]], edges: Sequence[float], x_label: str, ordered: bool
) -> str:
    """Stacked shares of labelled values, a column for each window.

    Args:
        labels: of the values, from the bottom to the top.
        shares: for each window the share of each value; they add up to 1, or are all 0 where there is nothing.
        edges: of the windows on the x axis, one more than there are windows.
        x_label: of the x axis.
        ordered: the values are numbers: shades of one colour instead of many colours.
    """
    x_axis = _Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT, whole=True)
    y_axis = _Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    tones = [_tone(i, len(labels), ordered) for i in range(len(labels))]
    parts = [_frame(x_axis, y_axis, x_label, "share")]
    for i, column in enumerate(shares):
        left, right, bottom = x_axis(edges[i]), x_axis(edges[i + 1]), 0.0
        for share, (colour, opacity) in zip(column, tones, strict=True):
            if share:
                box = f"x='{left:.1f}' y='{y_axis(bottom + share):.1f}' width='{max(0.5, right - left - 1):.1f}'"
                height = y_axis(bottom) - y_axis(bottom + share)
                parts.append(f"<rect class='f{colour}' fill-opacity='{opacity:.2f}' {box} height='{height:.1f}'/>")
            bottom += share
    return _svg(parts, x_label) + legend([(label, *tone) for label, tone in zip(labels, tones, strict=True)])


def legend(entries: Sequence[tuple[str, int, float]]) -> str:
    """Labels with their colour and its opacity."""
    items = (
        f"<span><i class='b{colour}' style='opacity:{opacity:.2f}'></i>{html.escape(label)}</span>"
        for label, colour, opacity in entries
    )
    return f"<p class='legend'>{''.join(items)}</p>"


class _Axis:
    """Values to places, and ticks at round numbers; `whole`: at integers only."""

    def __init__(self, low: float, high: float, begin: float, end: float, whole: bool = False) -> None:
        size = max(abs(low), abs(high))
        if size < ZERO:
            low, high = 0.0, 1.0
        elif high - low <= SAME * size:  # one value
            low, high = low - 0.01 * size, high + 0.01 * size
        self.low, self.high, self.begin, self.end = low, high, begin, end
        rough = max((high - low) / TICKS, 1.0 if whole else 0.0)
        scale = math.floor(math.log10(rough))
        steps = ((1, scale), (2, scale), (5, scale), (1, scale + 1))
        self.step = next(step for step in steps if step[0] * 10.0 ** step[1] >= rough * 0.999)

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self, room: float) -> list[tuple[float, str]]:
        """Places and labels; these are wider than the room only if they differ too little for anything else."""
        nice, exponent = self.step
        step = nice * 10.0**exponent
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        plain = [f"{i * step:,.{max(0, -exponent)}f}".replace("-", "\u2212") for i in range(first, last + 1)]
        short = [_with_exponent(i * nice, exponent) for i in range(first, last + 1)]
        widest = [max(_width(label) for label in labels) for labels in (plain, short)]
        labels = plain if widest[0] <= max(room, widest[1]) else short
        return [(self(i * step), label) for i, label in enumerate(labels, first)]


def _with_exponent(units: int, exponent: int) -> str:
    """All digits of units * 10**exponent, one of them before the point."""
    digits = str(abs(units))
    kept = digits.rstrip("0")
    if not kept:
        return "0"
    mantissa = kept[0] + ("." + kept[1:] if kept[1:] else "")
    return f"{'-' if units < 0 else ''}{mantissa}e{len(digits) - 1 + exponent}".replace("-", "\u2212")


def _width(label: str) -> float:
    return DIGIT * sum(WIDTHS.get(character, 1.0) for character in label)


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    parts = []
    left = x_axis.begin
    for place, label in y_axis.ticks(ROOM):
        parts.append(f"<path class='grid' d='M{left:.1f} {place:.1f}H{WIDTH - RIGHT}'/>")
        parts.append(f"<text x='{left - GAP:.1f}' y='{place + 4:.1f}' text-anchor='end'>{label}</text>")
    for place, label in x_axis.ticks((x_axis.end - left) / TICKS - GAP):
        parts.append(f"<text x='{place:.1f}' y='{HEIGHT - BOTTOM + 16}' text-anchor='middle'>{label}</text>")
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(f"<text x='{middle:.0f}' y='{HEIGHT - 6}' text-anchor='middle'>{html.escape(x_label)}</text>")
    upright = f"transform='translate(12 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)' text-anchor='middle'"
    parts.append(f"<text {upright}>{html.escape(y_label)}</text>")
    return "".join(parts)


def _svg(parts: Sequence[str], title: str) -> str:
    name = html.escape(title, quote=True)
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{name}'>{''.join(parts)}</svg>"


def _tone(index: int, count: int, ordered: bool) -> tuple[int, float]:
    """Colour and opacity of a value."""
    if ordered:
        return 0, 0.15 + 0.85 * index / max(1, count - 1)
    return index % COLOURS, 0.85 * 0.5 ** (index // COLOURS)


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _step(points: Sequence[tuple[float, float]]) -> str:
    (x, y), *rest = points
    return f"M{x:.1f} {y:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)


def _dots(points: Sequence[tuple[float, float]]) -> str:
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)


def _marks(points: Sequence[tuple[float, float]]) -> str:
    base = HEIGHT - BOTTOM - 4
    return "".join(f"M{x - 3:.1f} {base - 3}l6 6m0 -6l-6 6" for x, _ in points)


_PATHS = {"line": _line, "step": _step, "dots": _dots, "marks": _marks}
_CLASSES = {"line": "line", "step": "line", "dots": "dots", "marks": "marks"}
