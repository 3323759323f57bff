"""Recipes: what a search trains. A Python file with a space, a training, and which way its metric is better.

    DIRECTION = "max"                          # or "min"

    def space() -> SearchSpace: ...

    def train(policy: Policy, seed: int, report: Callable[[int, float], None]) -> float:
        \"\"\"Trains with the policy and returns the metric on validation data.

        `report(step, value)` may be called on the way, for example once an epoch, with steps that grow and values of
        the same metric; it raises to end a training that is stopped early, and that must not be caught.
        \"\"\"

Shipped recipes are the files of `reproduce/recipes/`, found by name at run time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..loading import load_file
from ..policy import Policy
from .core import DIRECTIONS
from .space import SearchSpace

Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe. `sha256` (hex) is that of the file, so that a resumed search knows whether it has changed."""

    path: Path
    direction: str
    space: Callable[[], SearchSpace]
    train: Callable[[Policy, int, Report], float]
    sha256: str

    @property
    def name(self) -> str:
        return self.path.stem


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name; empty where `autodropout.reproduce` is not installed."""
    spec = importlib.util.find_spec("autodropout.reproduce")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [path for folder in folders for path in Path(folder, "recipes").glob("*.py")]
    return {path.stem: path for path in sorted(files) if path.stem != "__init__"}


def find_recipe(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a recipe: a shipped one by name, or else a path.

    Raises:
        ValueError: neither a shipped name nor a file.
    """
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[str(name_or_path)]
    path = Path(name_or_path)
    if not path.is_file():
        names = ", ".join(shipped) or "none is installed"
        raise ValueError(f"recipe must be a file or one of the shipped recipes ({names}), got {str(name_or_path)!r}")
    return path.resolve()


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Runs the file and checks that it is a recipe.

    Raises:
        ValueError: it lacks `space`, `train` or `DIRECTION`, or they are not what they should be.
        OSError: the file cannot be read.
        Exception: whatever the file itself raises.
    """
    path = Path(path).resolve()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"autodropout_recipe_{path.stem}_{digest[:8]}"
    module = load_file("recipe", path, name)
    for needed in ("space", "train"):
        if not callable(getattr(module, needed, None)):
            raise ValueError(f"recipe {path} must define a function {needed}")
    direction = getattr(module, "DIRECTION", None)
    if direction not in DIRECTIONS:
        raise ValueError(f"recipe {path} must set DIRECTION to {' or '.join(map(repr, DIRECTIONS))}, got {direction!r}")
    return Recipe(path, direction, module.space, module.train, digest)
