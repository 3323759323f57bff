"""The kinds of pattern: frozen, checked, readable and writable as JSON, and drawable (`autodropout show`)."""

from __future__ import annotations

from .base import Pattern
from .bernoulli import BernoulliPattern
from .block import BlockPattern
from .tiled import TiledPattern
from .token import TokenPattern

__all__ = ["BernoulliPattern", "BlockPattern", "Pattern", "TiledPattern", "TokenPattern"]
