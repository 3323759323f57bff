"""What the scripts of the tables have in common: their command line, their progress bar, and what they print."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import NoReturn

from tqdm import tqdm

from .data import DataError
from .experiment import Experiment
from .experiment import Job
from .experiment import Result
from .report import Row
from .report import plot
from .report import table

REFUSED, INTERRUPTED = 2, 130  # exit codes
Report = tuple[list[str], list[Row], list[str]]  # title, rows and notes of a table


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removesuffix('.py')}: error: {message}\n")


def preset_parser(name: str, description: str, costs: Mapping[str, str]) -> Parser:
    """The parser of the script `name`.py, with its option `--preset`; `costs`: what its help says of each preset."""
    width = max(map(len, costs))
    parser = Parser(
        prog=f"{name}.py",
        description=description,
        epilog="presets and their cost:\n" + "\n".join(f"  {preset:<{width}} {cost}" for preset, cost in costs.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=costs, default="demo", help="size of the experiment (default: demo)")
    return parser


def some_of(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A type for `add_argument`: names of these, separated by commas, each once."""

    def names(text: str) -> tuple[str, ...]:
        for name in text.split(","):
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"must be some of {', '.join(allowed)}, got {name!r}")
        return tuple(dict.fromkeys(text.split(",")))

    return names


def count(text: str) -> int:
    """A type for `add_argument`: an integer of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """A type for `add_argument`: a number above 0 and below 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"must be a share above 0 and below 1, such as 0.1, got {text!r}")
    return number


def add_experiment_options(parser: Parser) -> None:
    """`--seeds`, `--epochs` and `--dry-run`."""
    parser.add_argument("--seeds", type=count, metavar="N", help="final models per method, with seeds 0 to N-1")
    parser.add_argument("--epochs", type=count, metavar="N", help="epochs of every training")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and train nothing")


def refused(name: str, error: Exception) -> int:
    """Says in a line what the user can put right; the exit code."""
    print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return REFUSED


def refused_in_training(name: str, error: DataError, where: str = "") -> int:
    """The same for data that only a training has found damaged."""
    # A process that loads images puts its traceback in front.
    cause = str(error).rpartition(f"{DataError.__name__}: ")[2].strip()
    return refused(name, DataError(f"{cause}; the same command goes on{where}"))


def run_table(
    name: str, experiment: Experiment, metric: str, reports: Callable[[list[Result]], Sequence[Report]]
) -> int:
    """Trains what is not yet done, prints a table for each report, and draws the last, which is of `metric`.

    Returns:
        The exit code: 0, 2 for data that turn out to be damaged, or 130 after Ctrl-C.
    """
    with experiment:
        try:
            results = run_with_progress(experiment)
        except KeyboardInterrupt:
            print(f"\n{name}: interrupted; the same command goes on from {experiment.runs}", file=sys.stderr)
            return INTERRUPTED
        except DataError as error:
            return refused_in_training(name, error, f" from {experiment.runs}")
        for title, rows, notes in reports(results):
            print(table(title, rows, notes))
        picture = experiment.results.with_suffix(".png")
        axis = f"{metric}; a dot per seed, mean and 95% interval; dashed: {rows[0].label}"
        plot(picture, title, rows, axis + ("; star: the paper" if any(row.paper for row in rows) else ""))
        print(f"one line per trained model: {experiment.results}\nplot: {picture}", file=sys.stderr)
    return 0


def run_with_progress(experiment: Experiment) -> list[Result]:
    """All trainings, under one bar that counts epochs."""
    total = experiment.model_count() * experiment.settings.recipe.epochs
    with tqdm(total=total, unit="epoch", smoothing=0.05) as bar:

        def name(job: Job) -> None:
            strength = "" if job.strength is None else f" {job.strength:g}"
            bar.set_description(f"{job.phase} {job.method}{strength} seed {job.seed}")

        def advance() -> None:
            bar.update()

        results: list[Result] = experiment.run(name, advance)
        return results
