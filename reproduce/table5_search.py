"""The controller against random search, evolution and TPE, at equal budgets, on tasks whose answer is known.

    python reproduce/table5_search.py                    # demo: few repetitions, minutes
    python reproduce/table5_search.py --preset full      # what docs/search.md shows

Tasks: "digits", a table of 1,000 genuinely trained policies (digits_table.py), and three planted ones with a known
optimum and noise of 1.5% (planted.py). Simple regret is what the policy with the best observation so far lacks of the
optimum, in accuracy points; late regret what the last 50 proposals lack on average. `--preset staleness` measures what
the importance weights bring: the controller with and without them, as with 64 workers, paired by seed.

One JSON line a search goes to results/, the plot beside it; searches that are done are kept under runs/ and not
repeated. The numbering of the tables is ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scipy import stats
from tqdm import tqdm

from autodropout.files import write_atomically
from autodropout.provenance import commit
from autodropout.reproduce.benchmark_task import BenchmarkTask
from autodropout.reproduce.benchmark_task import play
from autodropout.reproduce.command import Parser
from autodropout.reproduce.command import count
from autodropout.reproduce.command import preset_parser
from autodropout.reproduce.command import some_of
from autodropout.reproduce.experiment import source_fingerprint
from autodropout.reproduce.experiment import versions
from autodropout.reproduce.planted import TASKS
from autodropout.reproduce.report import estimate
from autodropout.reproduce.tabular import TabularTask
from autodropout.search.searchers import SEARCHERS
from autodropout.search.searchers import make_searcher

NAME = "table5_search"
SCHEMA = 1
CHECKPOINTS = (50, 100, 200, 400)
TABULAR = TabularTask.name
NO_WEIGHTS = "controller, weights 1"
SETTINGS: dict[str, dict[str, Any]] = {NO_WEIGHTS: {"importance_weights": False}}
LABELS = {"tpe": "TPE"}
MEASURES = {"simple_regret": "simple regret", "late_regret": "late regret"}


@dataclass(frozen=True)
class Preset:
    """`repetitions`: on the tabular task and on each planted one; `workers`: trainings at a time, in virtual time."""

    tabular: int
    planted: int
    budget: int
    searchers: tuple[str, ...]
    workers: int
    cost: str


PRESETS = {
    "demo": Preset(10, 5, 200, SEARCHERS, 1, "100 searches of 200 trials, on all tasks"),
    "full": Preset(100, 30, 400, SEARCHERS, 1, "760 searches of 400 trials, on all tasks"),
    "staleness": Preset(100, 100, 400, ("controller", NO_WEIGHTS), 64, "800 searches of 400 trials, on all tasks"),
}


@dataclass(frozen=True)
class Job:
    """One search. `seed`: the same for all searchers of a repetition, so that they are paired."""

    task: str
    searcher: str
    seed: int
    budget: int
    workers: int


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    preset = PRESETS[arguments.preset]
    if arguments.searchers:
        preset = dataclasses.replace(preset, searchers=arguments.searchers)
    jobs = [
        Job(task, searcher, seed, preset.budget, preset.workers)
        for task in arguments.tasks
        for seed in range(_repetitions(arguments.repetitions, preset, task))
        for searcher in preset.searchers
    ]
    try:
        records, results = run(jobs, arguments.processes, Path())
    except KeyboardInterrupt:
        print(f"\n{NAME}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    print("\n\n".join(table(task, records) for task in arguments.tasks))
    picture = results.with_suffix(".png")
    plot(picture, arguments.tasks, records)
    print(f"one line per search: {results}\nplot: {picture}", file=sys.stderr)
    return 0


def _parser() -> Parser:
    known = (TABULAR, *TASKS)
    parser = preset_parser(NAME, str(__doc__), {name: preset.cost for name, preset in PRESETS.items()})
    parser.add_argument(
        "--tasks",
        type=some_of(known),
        default=known,
        metavar="A,B,...",
        help=f"from: {', '.join(known)} (default: all)",
    )
    parser.add_argument(
        "--searchers",
        type=some_of(SEARCHERS),
        metavar="A,B,...",
        help=f"from: {', '.join(SEARCHERS)}; the others are compared with the first (default: those of the preset)",
    )
    parser.add_argument("--repetitions", type=count, metavar="N", help="searches per task and searcher")
    parser.add_argument(
        "--processes", type=count, default=os.cpu_count() or 1, metavar="N", help="searches at a time (default: cores)"
    )
    return parser


def _repetitions(asked: int | None, preset: Preset, task: str) -> int:
    if asked is not None:
        return asked
    return preset.tabular if task == TABULAR else preset.planted


# ---- searches ------------------------------------------------------------------------------------------------------


@cache
def open_task(name: str) -> BenchmarkTask:
    """The task of this name."""
    return TabularTask() if name == TABULAR else TASKS[name]()


def search(job: Job) -> dict[str, Any]:
    """Runs one search; regrets are in accuracy points (per cent), by number of finished trials."""
    task = open_task(job.task)
    name = job.searcher.partition(",")[0]
    searcher = make_searcher(name, task.space, job.seed, **SETTINGS.get(job.searcher, {}))
    start = time.perf_counter()
    choices, observed, ages = play(task, searcher, job.budget, job.seed, job.workers)
    budgets = [budget for budget in CHECKPOINTS if budget <= job.budget]
    return {
        **dataclasses.asdict(job),
        "settings": searcher.settings(),
        "simple_regret": {str(b): 100 * task.simple_regret(choices[:b], observed[:b]) for b in budgets},
        "late_regret": {str(b): 100 * task.late_regret(choices[:b]) for b in budgets},
        "mean_age": statistics.fmean(ages) if ages else None,
        "seconds": round(time.perf_counter() - start, 3),
    }


def run(jobs: Sequence[Job], processes: int, folder: Path) -> tuple[list[dict[str, Any]], Path]:
    """The records of all jobs, in their order, and the file in results/ that holds them; goes on where it stopped."""
    shared = {"schema": SCHEMA, "source": source_fingerprint(), "versions": versions()}
    key = hashlib.sha256(json.dumps([shared, [dataclasses.asdict(job) for job in jobs]]).encode()).hexdigest()[:16]
    done = folder / "runs" / f"{NAME}-{key}.jsonl"
    done.parent.mkdir(parents=True, exist_ok=True)
    found: dict[Job, dict[str, Any]] = {}
    for line in done.read_text(encoding="utf-8").splitlines() if done.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # torn by a kill: that search is repeated
            continue
        found[Job(**{field.name: record[field.name] for field in dataclasses.fields(Job)})] = record
    missing = [job for job in jobs if job not in found]
    with (
        done.open("a", encoding="utf-8") as file,
        tqdm(total=len(jobs), initial=len(found), unit="search", smoothing=0.05) as bar,
        ProcessPoolExecutor(processes, get_context("spawn")) as pool,
    ):
        file.write("\n" if found else "")  # ends a torn line
        futures = {pool.submit(search, job): job for job in missing}
        try:
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                file.write(json.dumps(future.result()) + "\n")
                file.flush()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    records = [{"experiment": NAME, **shared, "commit": commit(), **found[job]} for job in jobs]
    results = folder / "results" / f"{NAME}-{key}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    write_atomically(results, lambda out: out.write(lines))
    return records, results


# ---- what they say -------------------------------------------------------------------------------------------------


def of_task(records: Sequence[dict[str, Any]], task: str, searcher: str) -> list[dict[str, Any]]:
    """The searches of one searcher on one task, by seed."""
    return [record for record in records if (record["task"], record["searcher"]) == (task, searcher)]


def searchers_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """In the order in which they were asked for."""
    return list(dict.fromkeys(record["searcher"] for record in records))


def budgets_of(records: Sequence[dict[str, Any]]) -> list[int]:
    """After how many trials the regrets were measured."""
    return [int(budget) for budget in records[0]["simple_regret"]]


def table(task: str, records: Sequence[dict[str, Any]]) -> str:
    """Regrets with 95% intervals, at most 80 columns wide, and the first searcher against the others, paired."""
    budgets, searchers = budgets_of(records), searchers_of(records)
    repetitions, workers = len(of_task(records, task, searchers[0])), records[0]["workers"]
    known = "1,000 trained policies" if task == TABULAR else "planted"
    lines = [
        f"Table 5 (the numbering is ours), task {task} ({known}): {repetitions} searches each,",
        f"{workers} training{'s' if workers > 1 else ''} at a time; regret in accuracy points",
    ]
    for measure, title in MEASURES.items():
        rule = "-" * 80
        lines += [rule, f"{title + ' after':<24}" + "".join(f"{b:>14}" for b in budgets), rule]
        for searcher in searchers:
            cells = []
            for budget in budgets:
                values = estimate([r[measure][str(budget)] for r in of_task(records, task, searcher)])
                half = "-" if values.half_width is None else f"{values.half_width:.2f}"
                cells.append(f"{values.mean:.2f} +- {half}".rjust(14))
            lines.append(f"{LABELS.get(searcher, searcher):<24}" + "".join(cells))
    lines.append("-" * 80)
    first, *others = searchers
    for other in others:
        for measure, title in MEASURES.items():
            mean, width, p = paired(records, task, measure, first, other, budgets[-1])
            interval = "-" if width is None else f"{width:.2f}"
            shown = "-" if p is None else f"{p:.2g}"
            lines.append(f"{first} minus {LABELS.get(other, other)}, {title}: {mean:+.2f} +- {interval} (p {shown})")
    if others:
        lines.append(f"p: paired t-test after {budgets[-1]} trials, one-sided: {first} has the smaller one")
    return "\n".join(lines)


def paired(
    records: Sequence[dict[str, Any]], task: str, measure: str, first: str, second: str, budget: int
) -> tuple[float, float | None, float | None]:
    """Mean difference of the regrets of two searchers, paired by seed; half its 95% interval; one-sided p of "less"."""
    pairs = zip(of_task(records, task, first), of_task(records, task, second), strict=True)
    differences = [a[measure][str(budget)] - b[measure][str(budget)] for a, b in pairs]
    found = estimate(differences)
    if found.half_width is None or found.half_width == 0:
        return found.mean, found.half_width, None
    return found.mean, found.half_width, float(stats.ttest_1samp(differences, 0, alternative="less").pvalue)


def plot(path: Path, tasks: Sequence[str], records: Sequence[dict[str, Any]]) -> None:
    """A PNG: regret over trials, a column per task, with 95% intervals; simple regret above, late regret below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    budgets, searchers = budgets_of(records), searchers_of(records)
    figure = Figure(figsize=(1.2 + 3.2 * len(tasks), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(tasks), squeeze=False, sharex=True)
    for column, task in enumerate(tasks):
        for row, (measure, title) in enumerate(MEASURES.items()):
            axes = grid[row][column]
            for i, searcher in enumerate(searchers):
                found = [estimate([r[measure][str(b)] for r in of_task(records, task, searcher)]) for b in budgets]
                axes.errorbar(
                    [budget * 1.03 ** (i - len(searchers) / 2) for budget in budgets],
                    [each.mean for each in found],
                    yerr=[each.half_width or 0.0 for each in found],
                    fmt="o-",
                    color=f"C{i}",
                    markersize=4,
                    capsize=3,
                    label=LABELS.get(searcher, searcher),
                )
            axes.set_xscale("log")
            axes.set_xticks(budgets, [str(b) for b in budgets])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axes.set_title(task if task == TABULAR else f"{task} (planted)", fontsize=10)
            else:
                axes.set_xlabel("finished trials")
            if column == 0:
                axes.set_ylabel(f"{title}, accuracy points")
    grid[0][0].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
