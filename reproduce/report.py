"""Statistics over seeds, the table for an 80 column terminal, and the plot."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.special import stdtrit

WIDTH = 80
LABEL = 46
DASH = "-"


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` values and half the width of its 95% interval; None for what has no interval: one value, or values
    that are not all finite, as after a training that diverged."""

    n: int
    mean: float
    half_width: float | None


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Student's t-interval of the mean: sound for few values if they are about normal.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values must hold at least one number, got none")
    n = len(values)
    if not all(map(math.isfinite, values)):
        return Estimate(n, sum(values) / n, None)  # not `fmean`, which refuses inf - inf
    mean = statistics.fmean(values)
    if n == 1:
        return Estimate(1, mean, None)
    quantile = float(stdtrit(n - 1, (1 + confidence) / 2))
    return Estimate(n, mean, quantile * statistics.stdev(values) / n**0.5)


def paired(values: Sequence[float], base: Sequence[float]) -> tuple[Estimate, float | None]:
    """Of the differences `values - base`, seed by seed: the estimate, and the p-value of the two-sided paired t-test.

    None where the test does not exist: for one difference, where all are equal, and where one is not finite.

    Raises:
        ValueError: unequal numbers of values, or none.
    """
    # Here, because it takes most of a second to import, and few tables compare pairs.
    from scipy import stats

    differences = [value - other for value, other in zip(values, base, strict=True)]
    testable = len(set(differences)) > 1 and all(map(math.isfinite, differences))
    return estimate(differences), float(stats.ttest_rel(values, base).pvalue) if testable else None


def shown(mean: float, sign: str = "") -> str:
    """With two decimals; a dash for inf - inf."""
    return DASH if math.isnan(mean) else f"{mean:{sign}.2f}"


@dataclass(frozen=True)
class Row:
    """One method: final accuracies in percent by seed, and the paper's number as printed there, if one is known."""

    label: str
    strength: float | None
    values: tuple[float, ...]
    paper: str | None


def table(title: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table as text, at most 80 columns wide; `title` and `notes` are paragraphs, wrapped here."""
    rule = "-" * WIDTH
    lines = [line for paragraph in title for line in _wrap(paragraph)]
    lines += [rule, _line("Method", "tuned", "n", "mean and 95% int.", "paper"), rule]
    for row in rows:
        found = estimate(row.values)
        half = DASH if found.half_width is None else f"{found.half_width:.2f}"
        strength = DASH if row.strength is None else f"{row.strength:g}"
        *above, label = _wrap(row.label, LABEL)
        lines += above
        lines.append(_line(label, strength, str(found.n), f"{shown(found.mean)} +- {half:>5}", row.paper or DASH))
    lines.append(rule)
    lines += [line for paragraph in notes for line in _wrap(paragraph)]
    return "\n".join(lines)


def _line(label: str, strength: str, n: str, interval: str, paper: str) -> str:
    return f"{label:<{LABEL}} {strength:>5} {n:>2} {interval:>17} {paper:>5}".rstrip()


def _wrap(text: str, width: int = WIDTH) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def plot(path: Path, title: Sequence[str], rows: Sequence[Row], axis: str) -> None:
    """A PNG: for each method a dot per seed, the mean and its 95% interval; the first row's mean as a line across.

    What is not finite has no place on the axis: it is written beside it, and the dots of the other seeds stay.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 1.7 + 0.55 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(rows), 0, -1)
    for place, row in zip(places, rows, strict=True):
        found = estimate(row.values)
        dots = [value for value in row.values if math.isfinite(value)]
        axes.plot(dots, [place - 0.17] * len(dots), "o", color="C0", markersize=5, alpha=0.55, markeredgewidth=0)
        if math.isfinite(found.mean):
            half_width = found.half_width
            axes.errorbar(found.mean, place + 0.12, xerr=half_width, fmt="D", color="black", markersize=5, capsize=4)
        half = "" if found.half_width is None else f" ± {found.half_width:.2f}"
        axes.annotate(
            f"{shown(found.mean)}{half}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
        )
        if row.paper is not None:
            axes.plot(float(row.paper), place + 0.12, "*", color="C1", markersize=10)
    first = estimate(rows[0].values).mean
    if math.isfinite(first):
        axes.axvline(first, color="0.6", linewidth=1, linestyle="--", zorder=0)
    labels = ["\n".join(_wrap(_with_strength(row), 28)) for row in rows]
    axes.set_yticks(list(places), labels, parse_math=False)  # a dollar sign in a name is a dollar sign
    axes.set_ylim(0.5, len(rows) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(axis, parse_math=False)
    heading = "\n".join(line for paragraph in title for line in _wrap(paragraph, 112))
    figure.suptitle(heading, fontsize=8.5, ha="left", x=0.01, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)


def _with_strength(row: Row) -> str:
    return row.label if row.strength is None else f"{row.label}, {row.strength:g}"
