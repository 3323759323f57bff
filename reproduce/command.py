"""What the scripts of the tables have in common: their command line and their progress bar."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import NoReturn

from tqdm import tqdm

from .experiment import Experiment
from .experiment import Job
from .experiment import Result


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
