"""Statistics against SciPy and numbers worked out by hand; the table and the plot as a reader sees them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image
from scipy import stats

from autodropout.reproduce.report import Estimate
from autodropout.reproduce.report import Row
from autodropout.reproduce.report import estimate
from autodropout.reproduce.report import paired
from autodropout.reproduce.report import plot
from autodropout.reproduce.report import shown
from autodropout.reproduce.report import table


def test_interval_by_hand() -> None:
    # Mean 3, standard deviation sqrt(10 / 4), t(0.975, 4) = 2.7764 from a printed table.
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.n, found.mean) == (5, 3.0)
    assert found.half_width == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)


@pytest.mark.parametrize("values", [[90.1, 93.4], [96.8, 97.0, 96.9, 97.3], [0.0] * 3 + [1.0] * 9])
def test_interval_is_scipys(values: list[float]) -> None:
    found = estimate(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    assert found.half_width is not None
    assert found.mean - found.half_width == pytest.approx(low, rel=1e-12)
    assert found.mean + found.half_width == pytest.approx(high, rel=1e-12)


def test_one_value_has_no_interval_and_none_no_estimate() -> None:
    assert estimate([93.0]).half_width is None
    with pytest.raises(ValueError, match="at least one number"):
        estimate([])


ROWS = [
    Row("none", None, (92.0, 93.0, 94.0), None),
    Row("Dropout", 0.05, (93.5,), None),
    Row("AutoDropout (hand-v0, hand-made, not searched)", 1.5, (96.0, 97.0), "96.8"),
    Row("AutoDropout (" + "a very long name of a policy " * 3 + ")", 0.5, (100.0, 100.0), None),
]


def test_table_says_everything_in_80_columns() -> None:
    text = table(["A title " * 20, "second"], ROWS, ["a note " * 30])
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= 80
    cells = {line.split("  ")[0]: line.split() for line in lines}
    # t(0.975, 2) = 4.30265, standard deviation 1: 4.30265 / sqrt(3) = 2.48414.
    assert cells["none"] == ["none", "-", "3", "93.00", "+-", "2.48", "-"]
    assert cells["Dropout"] == ["Dropout", "0.05", "1", "93.50", "+-", "-", "-"]
    # t(0.975, 1) = 12.7062; sd of (96, 97) is 1 / sqrt(2), over sqrt(2): 6.3531.
    last = next(line for line in lines if line.startswith("AutoDropout (hand-v0, hand-made, not searched)"))
    assert last.split()[-6:] == ["1.5", "2", "96.50", "+-", "6.35", "96.8"]
    assert " ".join(text.split()).count("a very long name of a policy") == 3
    assert any("100.00 +-  0.00" in line for line in lines)


def test_plot_is_a_picture_that_depends_on_the_values(tmp_path: Path) -> None:
    first, second, third = tmp_path / "new" / "1.png", tmp_path / "2.png", tmp_path / "3.png"
    plot(first, ["title"], ROWS, "accuracy in %")
    plot(second, ["title"], ROWS, "accuracy in %")
    plot(third, ["title"], [*ROWS[:-1], Row("other", 0.5, (99.0, 98.0), None)], "accuracy in %")
    with Image.open(first) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 400
    pixels = [Image.open(path).convert("RGB").tobytes() for path in (first, second, third)]
    assert pixels[0] == pixels[1] != pixels[2]
    assert list(first.parent.iterdir()) == [first]


def test_paired_differences_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 2 sqrt(3) with 2 degrees of freedom, whose two-sided
    # p is 1 - t / sqrt(2 + t^2) = 1 - sqrt(6 / 7).
    found, p = paired((5.0, 4.0, 9.0), (4.0, 2.0, 6.0))
    assert found == estimate((1.0, 2.0, 3.0))
    assert p == pytest.approx(1 - (6 / 7) ** 0.5)
    assert paired((5.0,), (4.0,))[1] is None
    assert paired((5.0, 4.0), (4.0, 3.0))[1] is None, "no variance, no test"
    with pytest.raises(ValueError, match="shorter"):
        paired((5.0, 4.0), (4.0,))


def test_a_training_that_diverged_has_no_interval() -> None:
    assert estimate([100.0, math.inf]) == estimate([math.inf, 100.0]) == Estimate(2, math.inf, None)
    opposite = estimate([math.inf, -math.inf])
    assert math.isnan(opposite.mean)
    assert opposite.half_width is None
    text = table(["title"], [Row("none", None, (100.0, math.inf), None), Row("other", 0.1, (math.inf,), "3")], [])
    cells = {line.split()[0]: line.split() for line in text.splitlines()}
    assert cells["none"] == ["none", "-", "2", "inf", "+-", "-", "-"]
    assert cells["other"] == ["other", "0.1", "1", "inf", "+-", "-", "3"]


def test_no_difference_of_two_trainings_that_diverged() -> None:
    assert paired((math.inf, 4.0, 5.0), (3.0, 2.0, 1.0)) == (Estimate(3, math.inf, None), None)
    found, p = paired((math.inf, 4.0, 5.0), (math.inf, 2.0, 1.0))
    assert math.isnan(found.mean)
    assert (found.half_width, p) == (None, None)
    assert [shown(mean, "+") for mean in (found.mean, math.inf, 2.0)] == ["-", "+inf", "+2.00"]


@pytest.mark.parametrize("values", [(100.0, math.inf), (math.inf, math.inf), (math.nan, 100.0)])
def test_plot_of_a_training_that_diverged(values: tuple[float, ...], tmp_path: Path) -> None:
    diverged = Row("diverged", 0.1, values, None)
    for rows in ([diverged, ROWS[0]], [ROWS[0], diverged], [diverged]):
        plot(tmp_path / "1.png", ["title"], rows, "perplexity")
        with Image.open(tmp_path / "1.png") as image:
            assert min(image.size) >= 200


@pytest.mark.parametrize("place", ["title", "label", "axis"])
def test_plot_takes_dollar_signs_as_they_are(place: str, tmp_path: Path) -> None:
    names = {"title": "title", "label": "label", "axis": "axis"} | {place: "a$_$"}  # no mathematics
    plot(tmp_path / "1.png", [names["title"]], [Row(names["label"], 0.5, (1.0, 2.0), None)], names["axis"])
    assert (tmp_path / "1.png").exists()
