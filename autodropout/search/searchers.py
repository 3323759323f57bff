"""The search algorithms that come with the package, by name."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from .searcher import Searcher
from .space import SearchSpace

# Module and class: a module is imported when its searcher is made, so that nobody needs Optuna who does not use it.
_CLASSES = {
    "controller": ("reinforce", "ControllerSearcher"),
    "random": ("random_search", "RandomSearcher"),
    "evolution": ("evolution", "EvolutionSearcher"),
    "tpe": ("tpe", "TPESearcher"),
}
SEARCHERS = tuple(_CLASSES)


def make_searcher(name: str, space: SearchSpace, seed: int = 0, **settings: Any) -> Searcher:
    """A fresh searcher.

    Args:
        name: one of `SEARCHERS`.
        space: what is searched.
        seed: of the searcher.
        settings: further arguments of its class.

    Raises:
        ValueError: an unknown name, or a setting that the class does not have, or whose value it refuses.
        ImportError: "tpe" without Optuna.
    """
    if name not in _CLASSES:
        raise ValueError(f"searcher must be one of {', '.join(SEARCHERS)}, got {name!r}")
    module, attribute = _CLASSES[name]
    try:
        made: type[Searcher] = getattr(import_module(f".{module}", __package__), attribute)
    except ImportError as error:
        if error.name != "optuna":
            raise
        raise ImportError("the searcher tpe needs Optuna: pip install 'autodropout[search]'", name="optuna") from error
    known = [parameter for parameter in inspect.signature(made).parameters if parameter not in ("space", "seed")]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"settings of the searcher {name} are {', '.join(known) or 'none'}, got {setting!r}")
    return made(space, seed, **settings)
