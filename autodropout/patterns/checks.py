"""Checks of the values that patterns and policies are made of.

Every message begins with the name of the argument, so that `prefixed` can turn it into the path of a JSON field.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from numbers import Real
from typing import Any

import numpy as np

MAX_SIDE = 2**31 - 1


def real(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float in [low, high]; NaN, infinities and bools are refused, integers and NumPy numbers are not."""
    allowed = f"in [{low:g}, {high:g}]"
    if high == math.inf:
        allowed = "a finite number" if low == -math.inf else f"finite and at least {low:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number + 0.0  # -0.0 becomes 0.0: equal patterns should also look equal


def integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int in [low, high]; bools and floats are refused, NumPy integers are not."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer in [{low}, {high}], got {value!r} of type {type(value).__name__}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {number}")
    return number


def sides(height: object, width: object) -> tuple[int, int]:
    """The sides of a map, in cells."""
    return integer("height", height, 1, MAX_SIDE), integer("width", width, 1, MAX_SIDE)


def shape_of(**sizes: object) -> tuple[int, ...]:
    """The sizes by name as a shape; a tensor may be empty."""
    return tuple(integer(name, size, 0, MAX_SIDE) for name, size in sizes.items())


def flag(name: str, value: object) -> bool:
    """`value` as a bool; 0 and 1 are refused."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return bool(value)


def choice(name: str, value: object, allowed: Collection[str]) -> str:
    """`value`, one of the allowed strings."""
    if isinstance(value, str) and value in allowed:
        return value
    names = ", ".join(repr(a) for a in allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {names}, got {value!r} of type {type(value).__name__}")
    raise ValueError(f"{name} must be one of {names}, got {value!r}")


def json_object(path: str, data: object) -> dict[str, Any]:
    """`data` if it is a JSON object; else a ValueError that begins with the path."""
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be an object, got {data!r}")
    return data


def json_fields(path: str, data: dict[str, Any], required: Collection[str], optional: Collection[str] = ()) -> None:
    """Refuses missing and unknown fields of a JSON object, with a ValueError that begins with the field's path."""
    for name in data:
        if name not in required and name not in optional:
            raise ValueError(f"{join(path, name)}: unknown field, known are {', '.join([*required, *optional])}")
    for name in required:
        if name not in data:
            raise ValueError(f"{join(path, name)}: missing")


def join(path: str, name: str) -> str:
    """The path of field `name` of the object at `path` ("" for the whole file)."""
    return f"{path}.{name}" if path else name


@contextmanager
def prefixed(path: str) -> Iterator[None]:
    """Turns the complaint of a constructor, `size must be ...`, into the one about a file, `path.size: must be ...`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, _, problem = str(error).partition(" ")
        raise ValueError(f"{join(path, name)}: {problem}") from error
