"""The commands `search`, `resume`, `report` and `export`: their arguments, and what they print."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from .recipe import find_recipe
from .recipe import shipped_recipes
from .searchers import SEARCHERS

if TYPE_CHECKING:
    from .asha import Asha
    from .driver import SearchResult
    from .export import Export
    from .replay import Observer

INTERRUPTED = 130  # the exit code of shells after Ctrl-C
TRIALS = 200
TOP, SEEDS = 8, 8  # of `export`
GIB = 2**30

# Receives the parsed arguments and the words of the command, and returns the exit code.
Command = Callable[[argparse.Namespace, Sequence[str]], int]


def add_commands(commands: Any) -> dict[str, Command]:
    """Adds the parsers to what `add_subparsers` returned, and returns the functions by name."""
    recipes = ", ".join(shipped_recipes())
    search = commands.add_parser(
        "search",
        help="search for policies",
        description="Propose policies and train each once, as the recipe says. Everything is kept in the folder of the "
        "run; whenever it is interrupted or killed, `autodropout resume DIR` goes on.",
    )
    search.add_argument("recipe", help=f"a Python file, or one of the shipped recipes: {recipes}")
    search.add_argument("--run", type=Path, metavar="DIR", help="folder (default: runs/RECIPE-SEARCHER-SEED)")
    search.add_argument(
        "--trials", type=_integer(1), default=TRIALS, metavar="N", help="policies to propose (default: %(default)s)"
    )
    search.add_argument(
        "--workers",
        type=_integer(1),
        default=1,
        metavar="N",
        help="trainings at a time, each in a process of its own; a single one without limits is trained in this "
        "process (default: %(default)s)",
    )
    search.add_argument("--searcher", choices=SEARCHERS, default=SEARCHERS[0], help="default: %(default)s")
    search.add_argument("--seed", type=_integer(0), default=0, metavar="S", help="default: %(default)s")
    search.add_argument(
        "--retries", type=_integer(0), default=1, metavar="N", help="of a failed training (default: %(default)s)"
    )
    search.add_argument("--timeout", type=_above_zero, metavar="SECONDS", help="of a training; then it is killed")
    search.add_argument(
        "--memory-limit",
        type=_above_zero,
        metavar="GIB",
        help="of a training's data, of which Python with torch takes about 0.8 (Linux)",
    )
    search.add_argument(
        "--early-stopping",
        type=_integer(1),
        metavar="STEP",
        help="stop trainings that are not among the best quarter (ASHA) at this step of the recipe's reports, four "
        "times as late, and so on (default: none is stopped, as in the paper)",
    )
    search.add_argument(
        "--ray", metavar="ADDRESS", help="train on a Ray cluster: auto, HOST:PORT, or local for one of this machine"
    )
    search.add_argument("--cpus-per-trial", type=_above_zero, metavar="X", help="with --ray (default: 1)")
    search.add_argument("--gpus-per-trial", type=_above_zero, metavar="X", help="with --ray (default: 0)")

    resume = commands.add_parser("resume", help="go on with a search", description="Go on with a search.")
    _add_folder(resume)
    resume.add_argument("--trials", type=_integer(1), metavar="N", help="more policies than before, in all")
    resume.add_argument("--workers", type=_integer(1), metavar="N", help="default: as before")

    report = commands.add_parser(
        "report",
        help="write a page about a search",
        description="Write report.html, one self-contained page, into the folder of a finished or running search.",
    )
    _add_folder(report)

    export = commands.add_parser(
        "export",
        help="retrain the best policies of a search and write the best as files",
        description="Train the best policies of a search again with new seeds, the same for each, and write them to "
        "DIR/policies: best.json has the best mean. What is trained already is not trained again.",
    )
    _add_folder(export)
    export.add_argument(
        "--top", type=_integer(1), default=TOP, metavar="K", help="policies to retrain (default: %(default)s)"
    )
    export.add_argument(
        "--seeds", type=_integer(1), default=SEEDS, metavar="S", help="trainings of each (default: %(default)s)"
    )
    export.add_argument("--workers", type=_integer(1), metavar="N", help="default: as in the search")
    return {"search": _search, "resume": _resume, "report": _report, "export": _export}


def _search(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    from .asha import Asha
    from .driver import start_search
    from .journal import FILE
    from .run_folder import make_runner
    from .run_folder import open_recipe
    from .searchers import make_searcher

    settings = _runner_settings(arguments)
    path = find_recipe(arguments.recipe)
    folder = arguments.run or Path("runs", f"{path.stem}-{arguments.searcher}-{arguments.seed}")
    # Not left to TensorBoard's writer, which is the first to write there: its error would not name the option.
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"--run must be a folder, or a path for one, got {folder}: {part} is a file")
    if (folder / FILE).exists():
        raise ValueError(f"{folder} holds a search already: go on with autodropout resume {shlex.quote(str(folder))}")
    recipe, space = open_recipe(path)
    searcher = make_searcher(arguments.searcher, space, arguments.seed)
    stopper = None if arguments.early_stopping is None else Asha(recipe.direction, arguments.early_stopping)
    runner = make_runner(settings, folder)
    with ExitStack() as stack:
        result = start_search(
            folder,
            recipe,
            searcher,
            runner,
            trials=arguments.trials,
            seed=arguments.seed,
            retries=arguments.retries,
            stopper=stopper,
            observers=_observers(stack, folder, runner.slots),
            searcher_name=arguments.searcher,
            runner_settings=settings,
            command=command,
        )
    return _conclude(result, stopper)


def _resume(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    from .driver import resume_search
    from .run_folder import make_runner
    from .run_folder import open_search
    from .run_folder import searcher_again
    from .run_folder import stopper_again

    folder = arguments.folder
    history, recipe, space = open_search(folder)
    settings = _other_workers(history.runner, arguments.workers)
    runner = make_runner(settings, folder)
    stopper = stopper_again(history)
    with ExitStack() as stack:
        result = resume_search(
            folder,
            recipe,
            searcher_again(history, space),
            runner,
            trials=arguments.trials,
            stopper=stopper,
            observers=_observers(stack, folder, runner.slots),
            searcher_name=history.header["searcher"]["name"],
            runner_settings=settings,
            command=command,
        )
    return _conclude(result, stopper)


def _report(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    from .report import write_report

    print(write_report(arguments.folder))
    return 0


def _export(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    from .export import BEST
    from .export import FOLDER
    from .export import export_policies
    from .history import read_history
    from .run_folder import make_runner

    folder = arguments.folder
    settings = _other_workers(read_history(folder).runner, arguments.workers)
    end = "\r" if sys.stderr.isatty() else "\n"

    def show(done: int, total: int) -> None:
        print(f"{done} of {total} trainings are done", end="\n" if done == total else end, file=sys.stderr, flush=True)

    try:
        result = export_policies(
            folder, make_runner(settings, folder), arguments.top, arguments.seeds, command, on_progress=show
        )
    except KeyboardInterrupt:
        print("\nautodropout: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    print(_table(result))
    print(f"wrote {folder / FOLDER / BEST}", file=sys.stderr)
    return 0


def _observers(stack: ExitStack, folder: Path, workers: int) -> list[Observer]:
    """Progress, and TensorBoard's scalars where it is installed; they end with the stack."""
    from . import tensorboard
    from .progress import Progress

    found: list[Observer] = [stack.enter_context(Progress(sys.stderr, workers))]
    if tensorboard.available():
        found.append(stack.enter_context(tensorboard.TensorBoard(folder)))
    return found


def _conclude(result: SearchResult, stopper: Asha | None) -> int:
    folder = shlex.quote(str(result.folder))
    if result.interrupted:
        print(f"autodropout: interrupted; autodropout resume {folder} goes on", file=sys.stderr)
        return INTERRUPTED
    best = "" if result.best is None else f"; best metric {result.metrics[result.best]:.5g} in trial {result.best}"
    print(f"{result.trials} trials: {len(result.metrics)} finished, {len(result.failed)} failed{best}")
    if stopper is not None and result.metrics and not stopper.compared:
        print(f"early stopping had nothing to compare: the recipe reports nothing at step {stopper.grace} or later")
    try:
        page = importlib.import_module(".report", __package__).write_report(result.folder)
        print(f"report: {page}")
    except ImportError as error:
        print(f"no report: {error}")
    if result.failed and not result.metrics:
        raise ValueError(f"no trial of {folder} finished, all {len(result.failed)} failed: see above or the report")
    print(f"next: autodropout export {folder}")
    return 0


def _table(result: Export) -> str:
    """Finalists, best first, then the reference."""
    from .export import difference
    from .statistics import mean_and_half_width

    def interval(mean: float, half_width: float | None, form: str) -> str:
        return f"{mean:{form}}" + ("" if half_width is None else f" +- {half_width:.4f}")

    count = len(result.seeds)
    lines = [
        f"Retrained with {count} new seed{'s' if count > 1 else ''}: mean, 95% interval, and paired difference",
        f"{'policy':<16}{'trial':>6}{'in the search':>15}{'retrained':>20}{'over none':>21}",
    ]
    for rank, finalist in enumerate(result.finalists, 1):
        assert finalist.trial is not None
        mean = interval(*mean_and_half_width(finalist.metrics), ".4f")
        gain = interval(*difference(finalist, result.off), "+.4f")
        metric = f"{finalist.trial.metric:.4f}"
        lines.append(f"{f'finalist-{rank}':<16}{finalist.trial.number:>6}{metric:>15}{mean:>20}{gain:>21}")
    off = interval(*mean_and_half_width(result.off.metrics), ".4f")
    lines.append(f"{'nothing dropped':<16}{'-':>6}{'-':>15}{off:>20}")
    lines += [f"trial {trial.number} is out: a retraining of it failed" for trial in result.lost]
    best, half_width = difference(result.finalists[0], result.off)
    if result.sign * best <= 0:
        lines.append("no finalist is better than nothing dropped")
    elif half_width is None or result.sign * best <= half_width:
        lines.append("so few seeds do not show that the best is better than nothing dropped")
    return "\n".join(lines)


def _runner_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The runner that the arguments ask for, as the journal holds it.

    Raises:
        ValueError: arguments that do not go together, or a memory limit that no system takes.
    """
    settings: dict[str, Any] = {"kind": "processes", "workers": arguments.workers, "timeout": arguments.timeout}
    if arguments.ray is not None:
        if arguments.memory_limit is not None:
            raise ValueError("--memory-limit is for processes of this machine, not for --ray")
        settings |= {
            "kind": "ray",
            "address": None if arguments.ray == "local" else arguments.ray,
            "cpus_per_trial": arguments.cpus_per_trial or 1,
            "gpus_per_trial": arguments.gpus_per_trial or 0,
        }
        return settings
    for option in ("cpus_per_trial", "gpus_per_trial"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} needs --ray")
    if arguments.workers == 1 and arguments.timeout is None and arguments.memory_limit is None:
        return {"kind": "in-process", "workers": 1}
    from .runners.processes import LARGEST_LIMIT

    limit = arguments.memory_limit
    # Before it becomes an integer, which it cannot where the product is infinite.
    if limit is not None and not 1 <= limit * GIB < LARGEST_LIMIT + 1:
        raise ValueError(f"--memory-limit must be 1 to {LARGEST_LIMIT} bytes, got {limit:g} GiB")
    return {**settings, "memory_limit": None if limit is None else int(limit * GIB)}


def _other_workers(settings: dict[str, Any], workers: int | None) -> dict[str, Any]:
    """The same runner with another number of workers; None: the same number."""
    if workers is None:
        return settings
    if settings.get("kind") == "in-process" and workers > 1:
        return {"kind": "processes", "workers": workers}
    return {**settings, "workers": workers}


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the search")


def _integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return int(text)

    return parse


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value
