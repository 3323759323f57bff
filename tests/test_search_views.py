"""What is shown of a search: history, progress, TensorBoard's scalars, distributions of the proposals, charts."""

from __future__ import annotations

import io
import random
import re
import sys
from html.parser import HTMLParser
from importlib.abc import MetaPathFinder
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.textpath import TextPath
from search_toys import RATES
from search_toys import ToySpace

from autodropout.search.charts import Series
from autodropout.search.charts import share_chart
from autodropout.search.charts import xy_chart
from autodropout.search.history import History
from autodropout.search.history import posix
from autodropout.search.marginals import marginals
from autodropout.search.marginals import window_edges
from autodropout.search.progress import Progress
from autodropout.search.progress import clock_time
from autodropout.search.report import _metric_charts
from autodropout.search.report import _searcher_charts
from autodropout.search.tensorboard import FOLDER
from autodropout.search.tensorboard import TensorBoard

Record = dict[str, Any]


def at(second: float, record: str, **fields: Any) -> Record:
    minutes, seconds = divmod(second, 60)
    return {"record": record, "time": f"2026-01-01T00:{minutes:02.0f}:{seconds:06.3f}Z", **fields}


def run(direction: str = "max", trials: int = 6) -> Record:
    recipe = {"name": "toy", "path": "/toy.py", "sha256": "0"}
    command, runner = ["autodropout", "search"], {"kind": "in-process", "workers": 1}
    return at(0, "run", recipe=recipe, direction=direction, trials=trials, runner=runner, command=command)


def ask(second: float, trial: int, choices: tuple[int, ...] = (0, 0)) -> Record:
    return at(second, "ask", trial=trial, choices=list(choices), log_prob=None, update=0)


def tell(second: float, trial: int, metric: float, stopped: int | None = None) -> Record:
    return at(second, "tell", trial=trial, metric=metric, seconds=2.0, stopped=stopped)


def fail(second: float, trial: int, final: bool, attempt: int = 0) -> Record:
    message = "Traceback\n  File x\nValueError: too much\n"
    return at(second, "fail", trial=trial, attempt=attempt, kind="raised", message=message, seconds=1.0, final=final)


def update(second: float, **figures: Any) -> Record:
    return at(second, "update", update=0, trials=[0, 1], ages=[0, 3], figures=figures)


RECORDS = [
    run(),
    ask(0, 0, (1, 0)),
    ask(0, 1, (1, 1)),
    tell(2, 1, 0.5),
    ask(2, 2, (1, 1)),
    tell(3, 0, 0.7),
    update(3, entropy=1.25, entropy_by_kind={"on": 0.5}, weights=[1.0, 2.0], baseline=0.6),
    fail(4, 2, final=False),
    fail(5, 2, final=True, attempt=1),
    at(100, "resume", trials=8, runner={"kind": "processes", "workers": 2}, command=["autodropout", "resume"]),
    ask(100, 3, (0, 0)),
    ask(100, 4, (1, 0)),
    tell(103, 3, 0.9, stopped=5),
    tell(104, 4, 0.6),
]


def test_history() -> None:
    history = History.of(RECORDS)
    assert (history.budget, len(history.trials), len(history.told), history.failed, history.unfinished) == (
        8,
        5,
        4,
        1,
        0,
    )
    assert [trial.number for trial in history.told] == [1, 0, 3, 4]
    assert history.best is history.trials[0]  # trial 3 has no final metric
    assert (History.of(RECORDS[:9]).runner["workers"], history.runner["workers"]) == (1, 2)
    # The 95 s between the last record of the first sitting and the second one are no time of searching.
    assert [trial.ended for trial in history.trials] == [3, 2, 5, 8, 9]
    assert history.trials[2].failed == "raised"
    # Trial 3 was stopped early; trial 4 has the choices of trial 0, which is better.
    assert [trial.number for trial in history.leaders(5)] == [0, 1]
    assert [trial.number for trial in history.leaders(1)] == [0]
    assert posix("2026-01-01T00:00:00.250Z") - posix("2026-01-01T00:00:00.000Z") == 0.25


def test_the_smallest_metric_is_best_where_the_recipe_says_so() -> None:
    history = History.of(
        [run("min"), ask(0, 0), ask(0, 1), ask(0, 2), tell(1, 0, 2.0), tell(1, 1, 1.0), tell(1, 2, 1.0)]
    )
    assert history.best is history.trials[1]  # the first of equals
    assert history.leaders(1)[0].metric == 1.0


def shown(records: list[Record], replayed: int = 0, live: bool = False) -> tuple[Progress, str]:
    stream, now = io.StringIO(), [0.0]
    with Progress(stream, workers=2, live=live, clock=lambda: now[0]) as progress:
        for i, record in enumerate(records):
            now[0] = posix(record["time"]) - posix(records[0]["time"])
            progress(record, i < replayed)
    return progress, stream.getvalue()


def test_plain_lines() -> None:
    _, text = shown(RECORDS)
    assert text.splitlines() == [
        "1 of 6 trials: best 0.5 (trial 1), mean of last 1 0.5, failed 0, about 0:00:10 left",
        "2 of 6 trials: best 0.7 (trial 0), mean of last 2 0.6, failed 0, about 0:00:06 left",
        "trial 2 failed and is tried again (raised): ValueError: too much",
        "trial 2 failed (raised): ValueError: too much",
        # No new best, but one half a minute later. One trial in the three seconds of this sitting, and four are left.
        "4 of 8 trials: best 0.7 (trial 0), mean of last 3 0.7, entropy 1.25 nats, age 1.5 (at most 3), failed 1, "
        "about 0:00:12 left",
        "5 of 8 trials: best 0.7 (trial 0), mean of last 4 0.675, entropy 1.25 nats, age 1.5 (at most 3), failed 1, "
        "about 0:00:06 left",
    ]


def test_plain_lines_of_what_was_before_are_not_repeated() -> None:
    _, text = shown(RECORDS, replayed=9)
    assert len(text.splitlines()) == 2
    _, text = shown(RECORDS[:9], replayed=9)
    assert text == ""


def test_a_plain_line_at_least_every_half_minute() -> None:
    asks = [ask(0, i) for i in range(6)]
    told = [tell(1, 0, 0.9), tell(20, 1, 0.1), tell(32, 2, 0.1), tell(50, 3, 0.1), tell(61.5, 4, 0.1)]
    lines = shown([run(), *asks, *told])[1].splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["1", "3", "5"]


def test_the_live_panel_fits_80_columns() -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    progress, text = shown(RECORDS, live=True)
    assert "ValueError: too much" in text
    long = {**RECORDS[0], "recipe": {"name": "a-recipe-with-a-rather-long-name", "path": "", "sha256": ""}}
    for records in (RECORDS, [long, *RECORDS[1:]]):
        for count in range(1, len(records) + 1):
            progress, _ = shown(records[:count], live=True)
            console = Console(width=200, file=io.StringIO(), force_terminal=True)
            lines = console.render_lines(progress._panel(), pad=False)
            texts = ["".join(segment.text for segment in line).rstrip() for line in lines]
            assert max(map(len, texts)) <= 80
            assert len(texts) <= 4
    words = " ".join(texts)
    for word in (
        "5 of 8",
        "best 0.7 (trial 0)",
        "entropy 1.25 nats",
        "age 1.5",
        "failed 1",
        "workers busy 0 of 2",
        "left",
    ):
        assert word in words


def test_weights_that_were_not_finite_are_left_out() -> None:
    """They are null in the journal."""

    def charts(*weights: list[float | None]) -> str:
        updates = [{**update(3, weights=values), "update": number} for number, values in enumerate(weights)]
        header = {**run(), "searcher": {"name": "controller"}}
        return _searcher_charts(History.of([header, *updates]))

    assert charts([1.0, None, 3.0, 4.0], [2.0]) == charts([1.0, 3.0, 4.0], [2.0])
    assert charts([1.0], [None, None], [2.0]) == charts([1.0], [], [2.0]) != charts([1.0], [0.0], [2.0])
    assert charts([None]) == charts([])


def test_best_so_far_is_of_whole_trainings() -> None:
    """Trial 3, of the largest metric, was stopped."""
    drawn = Paths(_metric_charts(History.of(RECORDS)))  # the last chart, by time: trials 1, 0, 3, 4
    _, middle, top, _ = heights = [part.split()[1].split("h")[0] for part in drawn.found["dots s0"][1:].split("M")]
    assert float(top) < float(middle) < float(heights[0])
    assert re.findall(r"(?:M[\d.]+ |V)([\d.]+)", drawn.found["line s2"]) == [heights[0], middle, middle, middle]
    drawn = Paths(
        _metric_charts(History.of([run(), ask(0, 0), ask(0, 1), tell(1, 0, 0.9, stopped=3), tell(2, 1, 0.4)]))
    )
    assert drawn.found["line s2"] == "M" + drawn.found["dots s0"].split("M")[2].removesuffix("h0")


def test_live_progress_without_rich_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "rich":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for module in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"^live progress needs Rich: pip install 'autodropout\[search\]'$") as caught:
        shown(RECORDS, live=True)
    assert caught.value.name == "rich"
    assert shown(RECORDS)[1]


def test_times() -> None:
    assert [clock_time(s) for s in (0.4, 59.6, 3661, 100_000)] == ["0:00:00", "0:01:00", "1:01:01", "1 d 3:46:40"]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path) as board:
        for i, record in enumerate(RECORDS):
            board(record, i < 4)  # the first result was written by an earlier sitting
    events = EventAccumulator(str(tmp_path / FOLDER))
    events.Reload()
    scalars = {
        name: [(event.step, round(event.value, 6)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert scalars["trial/metric"] == [(2, 0.7), (4, 0.9), (5, 0.6)]
    assert scalars["trial/best"] == [(2, 0.7), (4, 0.7), (5, 0.7)]
    assert scalars["trial/failed"] == [(3, 1.0)]
    assert scalars["update/mean_age"] == [(0, 1.5)]
    assert scalars["update/entropy"] == [(0, 1.25)]
    assert scalars["update/baseline"] == [(0, 0.6)]
    assert scalars["entropy/on"] == [(0, 0.5)]
    assert "update/loss" not in scalars


def test_marginals_count_only_tokens_that_were_asked() -> None:
    space = ToySpace(2)
    # Site 0 is on in the first and third, site 1 in the second and third.
    proposals = [(1, 3, 0, 0), (0, 0, 1, 3), (1, 0, 1, 1), (0, 0, 0, 0)]
    on, rate = marginals(space, proposals, [0, 2, 4], last=2)
    assert (on.kind, on.values, on.ordered) == ("on", (False, True), False)
    assert on.windows == ((0.5, 0.5), (0.5, 0.5))
    assert on.sites == {0: ((0.5, 0.5), 2), 1: ((0.5, 0.5), 2)}
    assert (rate.kind, rate.values, rate.ordered) == ("rate", RATES, True)
    assert rate.windows == ((0.0, 0.0, 0.0, 1.0), (0.5, 0.5, 0.0, 0.0))
    assert rate.sites == {0: ((1.0, 0.0, 0.0, 0.0), 1), 1: ((0.0, 1.0, 0.0, 0.0), 1)}


def test_marginals_agree_with_a_count_by_hand() -> None:
    space, generator = ToySpace(3), random.Random(0)
    proposals = [space.sample(generator) for _ in range(50)]
    edges = window_edges(50, 7)
    assert (edges[0], edges[-1], len(edges)) == (0, 50, 8)
    assert {b - a for a, b in pairwise(edges)} == {7, 8}
    for one in marginals(space, proposals, edges, last=50):
        offset = ("on", "rate").index(one.kind)
        for (begin, end), shares in zip(pairwise(edges), one.windows, strict=True):
            seen = [p[2 * s + offset] for p in proposals[begin:end] for s in range(3) if offset == 0 or p[2 * s]]
            assert shares == tuple(seen.count(i) / len(seen) for i in range(len(one.values)))
    assert window_edges(3, 7) == [0, 1, 2, 3]
    assert window_edges(0, 7) == [0, 0]


class Paths(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.rectangles: list[dict[str, str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "path" and values["class"] != "grid":
            self.found[values["class"]] = values["d"]
        if tag == "rect":
            self.rectangles.append(values)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_chart_puts_points_where_they_belong() -> None:
    series = [Series("a", [0, 10], [0, 100], "line", 0), Series("<b>", [5], [50], "dots", 1)]
    drawn = Paths(xy_chart([*series, Series("c", [5], [0], "marks", 2)], "x", "y", zero=True))
    # x from 52 to 470; y from 210 up, with 3% of room above the largest value: 210 - 200 / 1.03 = 15.8.
    assert drawn.found["line s0"] == "M52.0 210.0L470.0 15.8"
    assert drawn.found["dots s1"] == "M261.0 112.9h0"
    assert drawn.found["marks s2"].startswith("M258.0 203")
    assert {"0", "20", "100", "2", "10", "x", "y", "a", "<b>"} <= set(drawn.text)


def test_a_chart_of_nothing_and_of_one_value() -> None:
    assert "nothing yet" in xy_chart([Series("a", [], [], "line", 0)], "x", "y", zero=True)
    for value in (0.0, 3.0, -2.0):
        assert "NaN" not in xy_chart([Series("a", [1], [value], "step", 0)], "x", "y")


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 100.0],
        [31.2, 88.5, 1.2e6],
        [0.91251, 0.91252, 0.912517],
        [2.1e-6, 3e-6],
        [-2.5e-7, -1e-7],
        [100_000.0, 105_000.0],
        [123_456_789.0, 123_456_790.0],
        [-1e100, 1e100],
        [1e100, 1.0000001e100],
        [0.1, 0.1 + 1e-11],
        [0.1, 0.1 + 1e-15],
        [1.0, 1.0 + 2**-52],
        [1e-300, 3e-300],
        [-5.0],
    ],
)
def test_labels_of_y_are_whole_different_and_true(values: list[float]) -> None:
    text = xy_chart([Series("a", list(range(len(values))), values, "dots", 0)], "trial", "metric")
    ticks = re.findall(r"<text x='([\d.]+)' y='([\d.]+)' text-anchor='end'>([^<]*)<", text)
    assert 2 <= len(ticks) <= 8
    for right, _, label in ticks:
        # Measured in a wide font. The name of the axis stands left of them, in the first 15 units.
        assert float(right) - TextPath((0, 0), label, size=12).get_extents().width >= 15
        assert float(right) < 160, "the chart is mostly chart"
    meant = [float(label.replace("\u2212", "-").replace(",", "")) for _, _, label in ticks]
    assert len({label for _, _, label in ticks}) == len(set(meant)) == len(ticks)
    # Ticks are equally far from each other, and so are what they say and where they are.
    heights = [float(height) for _, height, _ in ticks]
    for numbers, slack in ((meant, 1e-9 * abs(meant[-1] - meant[0]) + 1e-15 * abs(meant[-1])), (heights, 0.11)):
        gaps = [b - a for a, b in pairwise(numbers)]
        assert max(gaps) - min(gaps) <= 2 * slack


@pytest.mark.parametrize("values", [[0.0, 5e-324], [5e-324], [-5e-324, 5e-324], [5e-324, 1e-323], [0.0, 1e-322]])
def test_a_chart_of_values_next_to_zero(values: list[float]) -> None:
    drawn = Paths(xy_chart([Series("a", list(range(len(values))), values, "line", 0)], "x", "y"))
    assert "0" in drawn.text
    assert "nan" not in drawn.found["line s0"]


def test_a_wider_margin_moves_the_whole_chart() -> None:
    drawn = xy_chart([Series("a", [0, 10], [123_456_789, 123_456_790], "line", 0)], "x", "y")
    left = Paths(drawn).found["line s0"][1:].split()[0]
    assert float(left) > 52
    assert set(re.findall(r"class='grid' d='M([\d.]+) ", drawn)) == {left}
    assert f"<text x='{left}' y='226' text-anchor='middle'>0<" in drawn


def test_stacked_shares_fill_the_height() -> None:
    drawn = Paths(share_chart(["p", "q"], [[0.25, 0.75], [0.0, 0.0]], [0, 5, 10], "trial", ordered=True))
    lower, upper = drawn.rectangles
    assert (float(lower["height"]), float(upper["height"])) == (50, 150)
    assert (float(lower["y"]), float(upper["y"])) == (160, 10)
    assert float(lower["fill-opacity"]) < float(upper["fill-opacity"])
