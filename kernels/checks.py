"""Arguments that the ops have in common: what is allowed, and how a refusal reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

NORMALIZE = ("expected", "mask", "none")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_activation(x: object, name: str = "x") -> None:
    """Refuses what is not a strided tensor of a floating dtype that the ops know (TypeError)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a strided tensor, got {'a nested one' if x.is_nested else x.layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {x.dtype}")


def check_maps(x: torch.Tensor) -> None:
    """Refuses what is no activation (TypeError), or not one of maps (N, C, H, W) (ValueError)."""
    check_activation(x)
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuses a string argument that is none of `allowed`: ValueError, or TypeError if it is no string."""
    if isinstance(value, str) and value in allowed:
        return
    stated = " or ".join(repr(choice) for choice in allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {stated}, got {value!r} of type {type(value).__name__}")
    raise ValueError(f"{name} must be {stated}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Refuses what is no bool (TypeError)."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")


def check_real(name: str, value: object, low: float, high: float) -> float:
    """A Python number in [low, high] as a float; TypeError or ValueError otherwise."""
    allowed = f"[{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in {allowed}, got {value!r} of type {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {allowed}, got {value}")
    return float(value)


def check_fields(fields: torch.Tensor, names: Sequence[str], stated: str = "fields must be") -> None:
    """Refuses what is not a float64 CPU tensor with one number a name (ValueError). Reads no value: traceable.

    `stated` begins the message, for an argument of another name or that may be something else as well.
    """
    if fields.dtype != torch.float64 or fields.shape != (len(names),) or not fields.is_cpu:
        raise ValueError(
            f"{stated} a float64 CPU tensor ({', '.join(names)}), "
            f"got {fields.dtype}, shape {tuple(fields.shape)}, on {fields.device}"
        )
