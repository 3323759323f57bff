"""Structured dropout as fused ops: tensors, an atlas and a seed go in, nothing of `autodropout` is needed.

The ops are imported when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from .atlas import Atlas
    from .attention import token_attention
    from .batch_norm import batch_norm_pattern_relu
    from .bernoulli import bernoulli_dropout
    from .block import block_dropout
    from .residual import drop_path_add
    from .residual import tiled_dropout_add
    from .softmax import softmax_token_dropout
    from .tiled import tiled_dropout
    from .token import token_dropout

__all__ = [
    "Atlas",
    "batch_norm_pattern_relu",
    "bernoulli_dropout",
    "block_dropout",
    "drop_path_add",
    "softmax_token_dropout",
    "tiled_dropout",
    "tiled_dropout_add",
    "token_attention",
    "token_dropout",
]

_HOMES = {
    "Atlas": "atlas",
    "batch_norm_pattern_relu": "batch_norm",
    "bernoulli_dropout": "bernoulli",
    "block_dropout": "block",
    "drop_path_add": "residual",
    "softmax_token_dropout": "softmax",
    "tiled_dropout": "tiled",
    "tiled_dropout_add": "residual",
    "token_attention": "attention",
    "token_dropout": "token",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
