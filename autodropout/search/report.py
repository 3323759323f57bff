"""`report`: one HTML page about a search, finished or running, that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import io
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..draw import MAX_MAP
from ..draw import draw_policy
from ..files import write_atomically
from ..policy import Policy
from .charts import COLOURS
from .charts import STYLE
from .charts import Series
from .charts import share_chart
from .charts import xy_chart
from .export import exported
from .history import History
from .history import total_entropy
from .marginals import Marginals
from .marginals import marginals
from .marginals import window_edges
from .progress import clock_time
from .progress import last_line
from .run_folder import open_search
from .space import SearchSpace

FILE = "report.html"
WINDOWS, WINDOW = 24, 5  # at most so many windows of at least so many trials, for the distributions over time
MEAN_OF = 20  # trials of the moving mean
BEST = 3  # policies that are drawn
FAILURES = 20  # failed attempts that are listed
DOTS = 100  # per inch of the drawings
MAP = 32  # side of the map for drawings, where the space knows no maps

PAGE_STYLE = """
body { margin: 0 auto; max-width: 1060px; padding: 20px 16px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 8px; } h3 { font-size: 14px; margin: 0 0 6px; }
p { margin: 4px 0 10px; } .muted, .none { color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 220px), 1fr)); gap: 10px;
  margin: 16px 0; }
.tiles div { background: var(--panel); border-radius: 8px; padding: 9px 12px; }
.tiles b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.tiles span { font-size: 13px; color: var(--muted); }
.grid2 { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 22px 26px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 500; } .number { text-align: right; }
.heat td { text-align: center; padding: 3px 7px; border: 1px solid var(--paper); }
.heat th { padding-right: 8px; border: 0; }
.heat .cell { background: color-mix(in srgb, var(--c0) calc(var(--share) * 70%), var(--panel)); }
pre { background: var(--panel); border-radius: 8px; padding: 10px 12px; overflow-x: auto; font-size: 13px; }
figure { margin: 0 0 18px; } figure img { max-width: 100%; background: #fff; border-radius: 8px; display: block; }
figcaption { margin-bottom: 6px; } summary { cursor: pointer; margin: 8px 0; }
"""


def write_report(folder: Path) -> Path:
    """Writes the page of the run in `folder` into it, and returns its path. Whether the search is running or not.

    Raises:
        ValueError, OSError: as `open_search`; the page cannot be written.
        ImportError: matplotlib is not installed.
    """
    history, _, space = open_search(folder)
    path = folder / FILE
    text = page(history, space, exported(folder, history, space))
    # A message can hold what no encoding has: half of a surrogate pair, for a byte of a file name that is not UTF-8.
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))
    return path


def page(history: History, space: SearchSpace, finalists: Sequence[Policy]) -> str:
    """The page as text; the same history gives the same page."""
    title = f"Search: {history.recipe['name']}"
    shares = marginals(space, [trial.choices for trial in history.trials], _edges(history), _last(history))
    sections = [
        _summary(history),
        _section("Metric", _metric_charts(history)),
        _section("Exported policies", _finalists(finalists)) if finalists else "",
        _section(f"Best {_counted(BEST, 'policy', 'policies')} of single trials", _best(history, space)),
        _section("The searcher", _searcher_charts(history)),
        _section("What is proposed, over time", _share_charts(shares, history)),
        _section("What is proposed, site by site", _site_tables(shares, space, _last(history))),
        _section("Failures", _failures(history)),
        _section("How to reproduce it", _reproduce(history, space)),
    ]
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{_text(title)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><style>{STYLE}{PAGE_STYLE}</style></head>\n"
        f"<body><h1>{_text(title)}</h1>\n{''.join(sections)}</body></html>\n"
    )


def _summary(history: History) -> str:
    header, best, over = history.header, history.best, len(history.told) + history.failed
    state = "complete" if over == history.budget else f"{over} of {history.budget} trials are over so far"
    begun = f"begun {header['time'][:16].replace('T', ' ')} UTC"
    runner = history.runner  # of a search begun in Python: whatever that says of it
    workers = _counted(runner["workers"], "worker", "workers") if "workers" in runner else "unknown number of workers"
    kind = runner.get("kind", "unknown runner")
    line = f"Searcher {header['searcher']['name']}; {workers} ({kind}); {begun}; {state}."
    seconds = [trial.seconds for trial in history.told]
    ages = [age for update in history.updates for age in update["ages"]]
    stopped = sum(trial.stopped is not None for trial in history.told)
    tiles = [
        ("best metric", _number(None)) if best is None else (f"best metric, trial {best.number}", _number(best.metric)),
        (f"mean of the last {min(MEAN_OF, len(history.told))}", _number(_mean(_metrics(history)[-MEAN_OF:]))),
        ("finished trials" if not stopped else f"finished trials, {stopped} of them early", str(len(history.told))),
        ("failed trials", str(history.failed)),
        ("updates of the searcher", str(len(history.updates))),
        ("mean age of a sample", _number(_mean(ages), 3)),
        ("mean time of a trial", "\u2013" if not seconds else f"{statistics.fmean(seconds):.3g} s"),
        ("time of the search", clock_time(history.elapsed)),
    ]
    cells = "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in tiles)
    return f"<p class='muted'>{_text(line)}</p><div class='tiles'>{cells}</div>"


def _metric_charts(history: History) -> str:
    told = history.told
    better = "larger" if history.sign > 0 else "smaller"
    scale, unit = next((s, u) for s, u in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if _span(history, s))

    def chart(x: Sequence[float], failed: Sequence[float], order: Sequence[int], x_label: str) -> str:
        y = [float(told[i].metric or 0.0) for i in order]
        # What was stopped has no final metric: it is not the best, and before the first whole training none is.
        whole = [
            value if told[i].stopped is None else -history.sign * math.inf for i, value in zip(order, y, strict=True)
        ]
        best = [
            (at, b)
            for at, b in zip(x, accumulate(whole, max if history.sign > 0 else min), strict=True)
            if math.isfinite(b)
        ]
        means = [statistics.fmean(y[max(0, i + 1 - MEAN_OF) : i + 1]) for i in range(len(y))]
        series = [
            Series("a trial", x, y, "dots", 0),
            Series(f"mean of {MEAN_OF}", x, means, "line", 1),
            Series("best so far", [at for at, _ in best], [b for _, b in best], "step", 2),
            Series("failed", failed, [0.0] * len(failed), "marks", 3),
        ]
        return f"<div>{xy_chart(series, x_label, 'metric')}</div>"

    lost = [trial for trial in history.trials if trial.failed is not None]
    by_number = sorted(range(len(told)), key=lambda i: told[i].number)
    numbers = [float(told[i].number) for i in by_number]
    times = [(trial.ended or 0.0) / scale for trial in told]
    return (
        f"<p class='muted'>As the recipe returns it; {better} is better.</p><div class='grid2'>"
        + chart(numbers, [float(trial.number) for trial in lost], by_number, "trial")
        + chart(times, [(trial.ended or 0.0) / scale for trial in lost], range(len(told)), f"{unit} of searching")
        + "</div>"
    )


def _searcher_charts(history: History) -> str:
    updates = history.updates
    if not updates:
        return "<p class='none'>No update yet.</p>"
    x = [float(update["update"]) for update in updates]
    kinds = dict.fromkeys(kind for update in updates for kind in update["figures"].get("entropy_by_kind", {}))
    charts = []
    series = [
        _series(kind, "line", i % COLOURS, [u["figures"].get("entropy_by_kind", {}).get(kind) for u in updates])
        for i, kind in enumerate(kinds)
    ]
    if kinds:
        charts.append(("Entropy of a token, by kind", xy_chart(series, "update", "nats", zero=True)))
    if any(total_entropy(update) is not None for update in updates):
        total = _series("sum over the tokens of a policy", "line", 0, [total_entropy(update) for update in updates])
        charts.append(("Entropy of a policy", xy_chart([total], "update", "nats", zero=True)))
    ages = [
        Series("oldest", x, [float(max(update["ages"])) for update in updates], "line", 1),
        Series("mean", x, [statistics.fmean(update["ages"]) for update in updates], "line", 0),
    ]
    charts.append(("Age of the samples, in updates", xy_chart(ages, "update", "updates", zero=True)))
    # A weight that is not finite is null in the journal.
    weights = [[w for w in update["figures"].get("weights", ()) if w is not None] for update in updates]
    if any(weights):
        drawn = [
            _series("largest", "line", 1, [max(w) if w else None for w in weights]),
            _series("median", "line", 0, [statistics.median(w) if w else None for w in weights]),
            _series("smallest", "line", 2, [min(w) if w else None for w in weights]),
        ]
        charts.append(("Importance weights, before clipping", xy_chart(drawn, "update", "weight", zero=True)))
    if not kinds:
        searcher = history.header["searcher"]["name"]
        charts.append(
            ("Entropy", f"<p class='none'>The searcher {_text(searcher)} has no distribution of its own.</p>")
        )
    return _grid(charts)


def _share_charts(shares: Sequence[Marginals], history: History) -> str:
    edges = _edges(history)
    if len(edges) < 2 or not history.trials:
        return "<p class='none'>No proposal yet.</p>"
    note = f"Shares of the values among the tokens that were asked, in {len(edges) - 1} windows of trials, all sites."
    charts = [
        (one.kind, share_chart([_value(v) for v in one.values], one.windows, edges, "trial", one.ordered))
        for one in shares
    ]
    return f"<p class='muted'>{note}</p>{_grid(charts)}"


def _site_tables(shares: Sequence[Marginals], space: SearchSpace, last: int) -> str:
    names = [site.name for site in space.decode((0,) * len(space.tokens)).sites]
    blocks = []
    for one in shares:
        rows = [["", *(f"<th>{_text(_value(v))}</th>" for v in one.values), "<th>asked</th>"]]
        for site, (row, asked) in one.sites.items():
            cells = [f"<th>{_text(names[site] if site < len(names) else str(site))}</th>"]
            for share in row:
                if share is None:
                    cells.append("<td></td>")
                elif not asked:
                    cells.append("<td>\u2013</td>")
                else:
                    cells.append(f"<td class='cell' style='--share:{share:.2f}'>{100 * share:.0f}</td>")
            rows.append([*cells, f"<td>{asked}</td>"])
        rows[0][0] = "<th>site</th>"
        body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
        blocks.append((one.kind, f"<div class='scroll'><table class='heat'>{body}</table></div>"))
    return f"<p class='muted'>Shares in % in the last {_counted(last, 'trial', 'trials')}.</p>{_grid(blocks)}"


def _best(history: History, space: SearchSpace) -> str:
    leaders = history.leaders(BEST)
    if not leaders:
        return "<p class='none'>No trial is finished.</p>"
    side = max((site.side for site in getattr(space, "conv_sites", ())), default=MAP)
    parts = [
        "<p class='muted'>The best of many noisy metrics is mostly a lucky one: <code>autodropout export</code> "
        "trains the best few again before it chooses.</p>"
    ]
    for rank, trial in enumerate(leaders):
        caption = f"trial {trial.number}: metric {_number(trial.metric)}"
        source = _png(space.decode(trial.choices), min(side, MAX_MAP))
        drawing = f"<figure><img alt='{_text(caption)}' src='{source}'></figure>"
        opened = " open" if rank == 0 else ""
        parts.append(f"<details{opened}><summary>{_text(caption)}</summary>{drawing}</details>")
    return "".join(parts)


def _finalists(finalists: Sequence[Policy]) -> str:
    rows = []
    for rank, policy in enumerate(finalists, 1):
        found = policy.provenance
        retrained, gain = found["retrained"], found["gain_over_off"]
        cells = (f"finalist-{rank}", str(found["trial"]["number"]), _number(found["trial"]["metric"]))
        rows.append((*cells, _interval(retrained), _interval(gain, signed=True)))
    off = finalists[0].provenance["off"]
    rows.append(("nothing dropped", "\u2013", "\u2013", _interval(off), "\u2013"))
    seeds = len(finalists[0].provenance["retrained"]["seeds"])
    note = f"Trained again with {_counted(seeds, 'seed', 'seeds')} that the search has not used; mean and 95% interval."
    head = ("policy", "trial", "its metric", "retrained", "over nothing dropped, paired")
    return f"<p class='muted'>{note}</p>{_table(head, rows)}"


def _failures(history: History) -> str:
    if not history.failures:
        return "<p class='none'>None.</p>"
    kinds = Counter(record["kind"] for record in history.failures)
    counted = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common())
    rows = [
        (
            str(record["trial"]),
            str(record["attempt"]),
            record["kind"],
            f"{record['seconds']:.1f} s",
            "given up" if record["final"] else "tried again",
            record["message"],
        )
        for record in history.failures[-FAILURES:]
    ]
    head = ("trial", "attempt", "kind", "after", "then", "message")
    table = _table(head, [(*row[:-1], _message(row[-1])) for row in rows], raw_last=True)
    shown = f"; the last {FAILURES} of them" if len(history.failures) > FAILURES else ""
    total = _counted(len(history.failures), "failed attempt", "failed attempts")
    return f"<p>{total} ({_text(counted)}){shown}.</p>{table}"


def _reproduce(history: History, space: SearchSpace) -> str:
    header = history.header
    commands = "\n".join(shlex.join(command) for command in history.commands)
    rows = [
        ("recipe", f"{history.recipe['name']}, {history.recipe['path']}"),
        ("sha256 of the recipe", history.recipe["sha256"]),
        ("space", f"{len(space.tokens)} tokens, fingerprint {space.fingerprint()}"),
        ("seed", str(header["seed"])),
        ("searcher", _pairs(header["searcher"])),
        ("runner", _pairs(history.runner)),
        ("retries", str(header["retries"])),
        ("early stopping", "none" if header["stopper"] is None else _pairs(header["stopper"])),
        *header["versions"].items(),
    ]
    return f"<pre>{_text(commands)}</pre>{_table((), rows)}"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>\n"


def _grid(blocks: Iterable[tuple[str, str]]) -> str:
    return "<div class='grid2'>" + "".join(f"<div><h3>{_text(t)}</h3>{body}</div>" for t, body in blocks) + "</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], raw_last: bool = False) -> str:
    """Cells are text; those of the last column are HTML if `raw_last`."""
    parts = [f"<tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr>"] if head else []
    for row in rows:
        cells = [*map(_text, row[:-1]), row[-1] if raw_last else _text(row[-1])]
        parts.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<div class='scroll'><table>{''.join(parts)}</table></div>"


def _message(message: str) -> str:
    """The last line; the whole of a longer message folds out."""
    last = _text(last_line(message))
    if "\n" not in message.strip():
        return last
    return f"<details><summary>{last}</summary><pre>{_text(message)}</pre></details>"


def _png(policy: Policy, side: int) -> str:
    buffer = io.BytesIO()
    draw_policy(policy, side).savefig(buffer, format="png", dpi=DOTS, metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _series(label: str, form: str, colour: int, values: Sequence[float | None]) -> Series:
    """Against their indices, gaps left out."""
    points = [(float(i), value) for i, value in enumerate(values) if value is not None]
    return Series(label, [x for x, _ in points], [y for _, y in points], form, colour)


def _edges(history: History) -> list[int]:
    return window_edges(len(history.trials), min(WINDOWS, len(history.trials) // WINDOW))


def _last(history: History) -> int:
    """The trials that the tables by site are of: the last quarter, or a few more."""
    return min(len(history.trials), max(MEAN_OF, len(history.trials) // 4))


def _span(history: History, unit: int) -> bool:
    return unit == 1 or history.elapsed >= 2 * unit


def _metrics(history: History) -> list[float]:
    return [trial.metric for trial in history.told if trial.metric is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _number(value: float | None, digits: int = 5) -> str:
    return "\u2013" if value is None else f"{value:.{digits}g}"


def _interval(estimate: dict[str, Any], signed: bool = False) -> str:
    mean, half_width = estimate["mean"], estimate["half_width_95"]
    text = f"{mean:+.4f}" if signed else f"{mean:.4f}"
    return (text if half_width is None else f"{text} \u00b1 {half_width:.4f}").replace("-", "\u2212")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
