"""Schedules: patterns that grow or shrink while a model trains.

Scheduled DropBlock raises the rate linearly from 0 (Ghiasi et al. 2018), ScheduledDropPath likewise (Zoph et al. 2018).
A schedule here sets `module.pattern`, whose numbers are an input of a compiled graph: no step ever recompiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from dataclasses import replace
from numbers import Integral
from typing import Any

from torch import nn

from .fused import BatchNormPatternReLU2d
from .nn import PatternDropout
from .patterns import Pattern
from .patterns.checks import integer
from .patterns.checks import real

STRENGTH = "strength"
MAX_STEPS = 2**53  # up to here a step is a float without rounding
SCHEDULED = (PatternDropout, BatchNormPatternReLU2d)


class LinearSchedule:
    """Moves one field of the patterns of a model linearly from `start` to `end`, then leaves it there.

    Used as the schedulers of `torch.optim.lr_scheduler`: it sets `start` when it is made; call `step()` after each
    optimizer step; put `state_dict()` into the checkpoint.

        schedule = LinearSchedule(model, start=0.0, end=0.1, steps=10_000)                    # DropBlock, DropPath
        schedule = LinearSchedule(model, start=0.0, end=1.0, steps=10_000, field="strength")  # any policy

    After t steps the value is `start + (end - start) * t / steps`, rounded to the nearest integer (halves up) where the
    field is one. The schedule holds the modules that it found, as an optimizer holds parameters: make it after
    `apply_policy`, before or after `torch.compile` and the distributed wrappers. Schedules of several fields of one
    model go together; one of the strength sets each pattern from the one that it found, so it goes alone.

    Do not step between a forward pass that is checkpointed and its backward pass: the recomputation would read the new
    pattern. A captured CUDA graph keeps the pattern of its capture; see docs/training.md.

    Args:
        model: any module with a `PatternDropout` or a `BatchNormPatternReLU2d` in it, or one itself. All that it holds
            are scheduled.
        start, end: values of the field, each of them allowed by every pattern.
        steps: from `start` to `end`, at least 1.
        field: a numeric field that all patterns have, as `"rate"`, `"size"` or `"block_size"`; or `"strength"`, which
            multiplies the strength of each pattern by the value, as `Pattern.scaled` does.

    Attributes:
        last_step: steps made so far.
        value: what the field is now; before it is rounded, for an integer field.

    Raises:
        TypeError: an argument is of another type than stated above.
        ValueError: there is none of these modules, a pattern has no such field or refuses a value; the message names
            it. What a pattern drops of a map is not looked at, for the maps are not known here: the limit of
            `apply_policy` is one of the patterns that it is given.
    """

    def __init__(self, model: nn.Module, start: float, end: float, steps: int, field: str = "rate") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self._modules = {name: m for name, m in model.named_modules() if isinstance(m, SCHEDULED)}
        if not self._modules:
            kinds = " or ".join(kind.__name__ for kind in SCHEDULED)
            raise ValueError(f"model must have a {kinds}, got {type(model).__name__} without one")
        self._set(start, end, steps, field, 0, [module.pattern for module in self._modules.values()])

    @property
    def value(self) -> float:
        return self._value_at(self.last_step)

    def step(self) -> None:
        """Moves on by one step and sets the patterns.

        Raises:
            ValueError: a module has a pattern of another kind by now, which lacks the field or refuses the value.
                Nothing is changed.
        """
        self._move_to(self.last_step + 1)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, in types that `torch.load(weights_only=True)` and JSON know."""
        return {
            "start": self.start,
            "end": self.end,
            "steps": self.steps,
            "field": self.field,
            "last_step": self.last_step,
            # What a strength is relative to, also where a model was saved with the patterns of the moment.
            "patterns": [pattern.to_json() for pattern in self._own] if self.field == STRENGTH else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where the schedule that made `state` was: its arguments, its step; sets the patterns.

        Raises:
            TypeError, ValueError: not a state of a schedule, or not of one that fits this model. Nothing is changed.
        """
        known = ("start", "end", "steps", "field", "last_step", "patterns")
        if not isinstance(state, Mapping) or set(state) != set(known):
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state must be a mapping with the keys {', '.join(known)}, got {got}")
        own = [module.pattern for module in self._modules.values()]
        if state["field"] == STRENGTH:
            patterns = state["patterns"]
            if not isinstance(patterns, list) or len(patterns) != len(own):
                raise ValueError(f"state must be of a model with {len(own)} patterns, got patterns={patterns!r}")
            own = [
                _like(module.pattern, Pattern.from_json(data, f"state.patterns[{i}]"), f"state.patterns[{i}]", name)
                for i, (data, (name, module)) in enumerate(zip(patterns, self._modules.items(), strict=True))
            ]
        last_step = integer("last_step", state["last_step"], 0, MAX_STEPS)
        self._set(state["start"], state["end"], state["steps"], state["field"], last_step, own)

    def __repr__(self) -> str:
        arguments = f"start={self.start!r}, end={self.end!r}, steps={self.steps}, field={self.field!r}"
        return f"LinearSchedule({arguments}, last_step={self.last_step})"

    def _set(self, start: float, end: float, steps: int, field: str, last_step: int, own: list[Pattern]) -> None:
        """Checks everything, then takes it over."""
        steps = integer("steps", steps, 1, MAX_STEPS)
        for name, pattern in zip(self._modules, own, strict=True):
            site = name or "model"
            allowed = (STRENGTH, *_numeric(pattern))
            if field not in allowed:
                raise ValueError(f"field must be one of {', '.join(allowed)}, which {site} has, got {field!r}")
            for argument, value in (("start", start), ("end", end)):
                try:
                    _changed(pattern, field, value)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{argument} must be allowed by the pattern of {site}: {error}") from error
        self.start, self.end = _number("start", start), _number("end", end)
        self.steps, self.field, self._own = steps, field, own
        self._move_to(last_step)

    def _value_at(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * (step / self.steps)

    def _move_to(self, step: int) -> None:
        """All patterns are made before the first is set."""
        value = self._value_at(step)
        patterns = [self._moved(name, own, value) for name, own in zip(self._modules, self._own, strict=True)]
        for module, pattern in zip(self._modules.values(), patterns, strict=True):
            module.pattern = pattern
        self.last_step = step

    def _moved(self, name: str, own: Pattern, value: float) -> Pattern:
        if self.field == STRENGTH:
            return _changed(own, STRENGTH, value)
        pattern = self._modules[name].pattern
        site = name or "model"
        if self.field not in _numeric(pattern):
            raise ValueError(f"pattern of {site} must have a field {self.field!r}, got {pattern!r}")
        if isinstance(getattr(own, self.field), int):
            value = math.floor(value + 0.5)
        try:
            return _changed(pattern, self.field, value)
        except ValueError as error:
            raise ValueError(f"value must be allowed by the pattern of {site}: {error}") from error


def _like(own: Pattern, pattern: Pattern, path: str, name: str) -> Pattern:
    """`pattern` if it is of the kind that the module of this name has: another model's would be taken over silently."""
    if type(pattern) is not type(own):
        raise ValueError(f"{path} must be a {type(own).__name__}, which {name or 'model'} has, got {pattern!r}")
    return pattern


def _number(name: str, value: float) -> float:
    """Integers stay integers: a field that is one would refuse 1.0 when a state is loaded."""
    number = real(name, value)
    return int(value) if isinstance(value, Integral) else number


def _changed(pattern: Pattern, field: str, value: float) -> Pattern:
    if field == STRENGTH:
        return pattern.scaled(value)
    changed: dict[str, Any] = {field: value}
    return replace(pattern, **changed)


def _numeric(pattern: Pattern) -> list[str]:
    """The fields of a pattern that are numbers: flags are not, though Python counts them among the integers."""
    values = {field.name: getattr(pattern, field.name) for field in fields(pattern)}
    return [name for name, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
