"""What all patterns have in common: checked values, the tensor that an op reads, JSON, and their own mask."""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from dataclasses import MISSING
from dataclasses import dataclass
from dataclasses import fields
from typing import Any
from typing import ClassVar

import torch

from .checks import choice
from .checks import json_fields
from .checks import json_object
from .checks import prefixed
from .checks import shape_of

_KINDS: dict[str, type[Pattern]] = {}


@dataclass(frozen=True)
class Pattern(ABC):
    """What is dropped together. Patterns are frozen and hashable; equal fields make equal patterns.

    A kind of pattern is a frozen dataclass with the two class variables, the abstract methods, and a `__post_init__`
    that checks the fields and hands them to `_freeze`. It is known to `from_json` as soon as its class exists.
    """

    op: ClassVar[str]  # its name in JSON
    default_normalize: ClassVar[str]  # "mask" or "expected": the scale when none is asked for

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "op" in vars(cls):  # a subclass without a name of its own leaves its parent's alone
            _KINDS[cls.op] = cls

    def _freeze(self, numeric: tuple[float, ...], **checked: Any) -> None:
        """Stores the checked fields, and the numeric ones as the tensor behind `fields`.

        The tensor is made once, here: Dynamo then sees a graph input, guarded by type and shape only, where Python
        numbers would be constants to compile anew for.
        """
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_tensor", torch.tensor(numeric, dtype=torch.float64, device="cpu"))

    def fields(self) -> torch.Tensor:
        """The numeric fields, in the order in which the op wants them: float64, on the CPU, a fresh tensor.

        Under `torch.compile` they are an input of the graph, so that other values never recompile.
        """
        tensor: torch.Tensor = self._tensor  # type: ignore[attr-defined]
        return tensor.clone()

    @abstractmethod
    def expected_rate(self, height: int, width: int) -> float:
        """The exact expected share of dropped cells on a map of height x width cells, in [0, 1].

        Raises:
            TypeError, ValueError: a side is not a whole number >= 1; the message names it.
        """

    @abstractmethod
    def scaled(self, factor: float) -> Pattern:
        """The pattern with its strength multiplied by `factor` (finite, >= 0), clipped to the range of the field."""

    @abstractmethod
    def _drop(self, x: torch.Tensor, seed: int | torch.Tensor, rank: int) -> torch.Tensor:
        """x with zeros where this pattern drops, unscaled."""

    def mask(self, N: int, C: int, H: int, W: int, seed: int | torch.Tensor, rank: int = 0) -> torch.Tensor:
        """The mask that the op draws in a call with x of shape (N, C, H, W).

        Args:
            N, C, H, W: the shape.
            seed: integer in [-2^63, 2^64), or a 0-d int64 tensor.
            rank: the global rank to draw for.

        Returns:
            Bool tensor (N, C, H, W), True = kept, on the device of the seed; on the CPU if that is an integer.

        Raises:
            TypeError, ValueError: an argument is not what is stated above; the message names it.
        """
        shape = shape_of(N=N, C=C, H=H, W=W)
        device = seed.device if isinstance(seed, torch.Tensor) else "cpu"
        return self._drop(torch.ones(shape, dtype=torch.float32, device=device), seed, rank) != 0

    def to_json(self) -> dict[str, Any]:
        """The pattern as a JSON object: `op` and every field."""
        return {"op": self.op} | {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_json(data: object, path: str = "pattern") -> Pattern:
        """The pattern that `to_json` wrote. Fields with a default may be left out.

        Args:
            data: the decoded JSON.
            path: where it stands in its file, for messages.

        Raises:
            ValueError: unknown op, unknown or missing field, wrong type, value out of range. The message begins with
                the path of the field.
        """
        values = dict(json_object(path, data))
        with prefixed(path):
            kind = _KINDS[choice("op", values.pop("op", None), _KINDS)]
        required = [f.name for f in fields(kind) if f.default is MISSING]
        optional = [f.name for f in fields(kind) if f.default is not MISSING]
        json_fields(path, values, required, optional)
        with prefixed(path):
            return kind(**values)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles pass through the constructor: checked anew, and no tensor in the file.
        return type(self), tuple(getattr(self, f.name) for f in fields(self))
