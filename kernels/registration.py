"""Registers the ops of this folder with PyTorch, once a process.

The folder can be imported under two names, `autodropout.kernels` when installed and `kernels` inside a checkout. Both
must reach the same ops, so the second import finds them registered and leaves them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import torch

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
) -> None:
    """Define `autodropout::<schema>`: one implementation for all devices, its fake, backward and vmap rule.

    An op with `fields`, the numbers of a pattern, reads them on the host at every call. In a CUDA graph it would read
    them once: Inductor is told to leave it out of those that it makes.
    """
    name = schema.partition("(")[0]
    if hasattr(torch.ops.autodropout, name):
        return
    if "Tensor fields" in schema and hasattr(torch.Tag, "cudagraph_unsafe"):
        tags = (*tags, torch.Tag.cudagraph_unsafe)
    _LIBRARY.define(schema, tags=tuple(tags))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autodropout::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"autodropout::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    if vmap is not None:
        torch.library.register_vmap(f"autodropout::{name}", vmap, lib=_LIBRARY)
