"""AutoDropout: structured dropout patterns, put on any network, and learned for it (Pham & Le, AAAI 2021).

Names and submodules are imported when first used: `import autodropout` loads neither Triton nor matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from .apply import AppliedSite
    from .apply import apply_policy
    from .apply import remove_policy
    from .functional import pattern_dropout
    from .patterns import BernoulliPattern
    from .patterns import BlockPattern
    from .patterns import Pattern
    from .patterns import TiledPattern
    from .patterns import TokenPattern
    from .policy import Policy
    from .policy import Site
    from .policy import load_policy

__all__ = [
    "AppliedSite",
    "BernoulliPattern",
    "BlockPattern",
    "Pattern",
    "Policy",
    "Site",
    "TiledPattern",
    "TokenPattern",
    "__version__",
    "apply_policy",
    "load_policy",
    "pattern_dropout",
    "remove_policy",
]

_HOMES = {
    "AppliedSite": "apply",
    "BernoulliPattern": "patterns",
    "BlockPattern": "patterns",
    "Pattern": "patterns",
    "Policy": "policy",
    "Site": "policy",
    "TiledPattern": "patterns",
    "TokenPattern": "patterns",
    "apply_policy": "apply",
    "load_policy": "policy",
    "pattern_dropout": "functional",
    "remove_policy": "apply",
}

_SUBMODULES = (
    "conventions",
    "draw",
    "functional",
    "fused",
    "kernels",
    "nn",
    "patterns",
    "policy",
    "qkv_layouts",
    "schedule",
    "search",
    "sites",
    "zoo",
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("autodropout")
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
