"""Registers the ops of this folder with PyTorch, once a process.

The folder can be imported under two names, `autodropout.kernels` when installed and `kernels` inside a checkout. Both
must reach the same ops, so the second import finds them registered and leaves them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import torch

from .unwatched import is_unwatched

_LIBRARY = torch.library.Library("autodropout", "FRAGMENT")


def register_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> Callable[..., Any]:
    """Define `autodropout::<schema>`: one implementation for all devices, its fake, backward and vmap rule.

    An op with `fields`, the numbers of a pattern, reads them on the host at every call. In a CUDA graph it would read
    them once: Inductor is told to leave it out of those that it makes.

    Returns:
        The op as a function of the same arguments, to be called by position where nothing is differentiated.
    """
    name = schema.partition("(")[0]
    if not hasattr(torch.ops.autodropout, name):
        _register(schema, implementation, fake, setup_context, backward, vmap, tags)

    def op(*args: Any) -> Any:
        return implementation(*args) if is_unwatched(args) else getattr(torch.ops.autodropout, name)(*args)

    return op


def _register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., Any] | None,
    backward: Callable[..., Any] | None,
    vmap: Callable[..., Any] | None,
    tags: Sequence[torch.Tag],
) -> None:
    name = schema.partition("(")[0]
    if "Tensor fields" in schema and hasattr(torch.Tag, "cudagraph_unsafe"):
        tags = (*tags, torch.Tag.cudagraph_unsafe)
    _LIBRARY.define(schema, tags=tuple(tags))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autodropout::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"autodropout::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    if vmap is not None:
        torch.library.register_vmap(f"autodropout::{name}", vmap, lib=_LIBRARY)
