"""What the journal of a run says of its parts, made again: recipe, space, searcher, early stopping, runner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from traceback import walk_tb
from typing import Any

from .asha import Asha
from .history import History
from .history import read_history
from .recipe import Recipe
from .recipe import load_recipe
from .runners.base import Runner
from .searcher import Searcher
from .searchers import make_searcher
from .space import SearchSpace

LOGS = "logs"  # what worker processes print


def open_recipe(path: Path) -> tuple[Recipe, SearchSpace]:
    """The recipe of a file and its space.

    Raises:
        ValueError: it is no recipe, or running it fails.
        OSError: the file cannot be read.
    """
    try:
        recipe = load_recipe(path)
        space = recipe.space()
    except Exception as error:  # whatever a user's file raises
        if isinstance(error, ValueError | OSError) and not _running(error):
            raise
        raise ValueError(f"the recipe {path} fails with {type(error).__name__}: {error}") from error
    if not isinstance(space, SearchSpace):
        raise ValueError(f"space() of the recipe {path} must return a SearchSpace, got {space!r}")
    return recipe, space


def _running(error: Exception) -> bool:
    """Whether the recipe's file or its `space` raised it, and not `load_recipe`, whose messages name the file."""
    code = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    return load_recipe.__code__ not in code or any(one.co_name == "exec_module" for one in code)


def open_search(folder: Path) -> tuple[History, Recipe, SearchSpace]:
    """The history of a run, its recipe and its space.

    Raises:
        ValueError: the recipe's file is gone or has another space now; the journal is missing or damaged.
        OSError: a file cannot be read.
    """
    history = read_history(folder)
    path = Path(history.recipe["path"])
    if not path.is_file():
        raise ValueError(f"the recipe of this search must be where it was, but {path} is gone")
    recipe, space = open_recipe(path)
    if json.loads(json.dumps(space.to_json())) != history.header["space"]:
        raise ValueError(f"the recipe's space must be that of the search, but {path} has another one now")
    return history, recipe, space


def searcher_again(history: History, space: SearchSpace) -> Searcher:
    """A fresh searcher like that of the search."""
    settings = dict(history.header["searcher"])
    name, seed = settings.pop("name"), settings.pop("seed", history.header["seed"])
    return make_searcher(name, space, seed, **settings)


def stopper_again(history: History) -> Asha | None:
    """A fresh stopper like that of the search, if it has one."""
    settings = history.header["stopper"]
    return None if settings is None else Asha(settings["direction"], settings["grace"], settings["reduction"])


def make_runner(settings: Mapping[str, Any], folder: Path) -> Runner:
    """The runner of these settings, which are those that a journal holds.

    Args:
        settings: "kind" is "in-process", "processes" or "ray"; the others are the arguments of the runner's class.
        folder: of the run, for the logs of worker processes.

    Raises:
        ValueError: a value is refused, or the kind is another.
        ImportError: Ray is needed and not installed.
    """
    arguments = dict(settings)
    kind, workers = arguments.pop("kind", None), arguments.pop("workers", 1)
    if kind == "in-process":
        from .runners.in_process import InProcessRunner

        return InProcessRunner()
    if kind == "ray":
        from .runners.ray_cluster import RayRunner

        return RayRunner(workers, **arguments)
    if kind == "processes":
        from .runners.processes import ProcessRunner

        return ProcessRunner(workers, **arguments, logs=folder / LOGS)
    raise ValueError(
        f"runner.kind must be in-process, processes or ray, got {kind!r}: a search that was begun in Python without "
        "`runner_settings` goes on there, by `resume_search`"
    )
