"""How one matrix that makes query, key and value is divided among them, in classes of timm and `transformers` where the
parts are not equal thirds one after the other. What a module's numbers mean is read in its code, never in shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Layout = Callable[[Any], "QkvLayout | None"]  # from the attention


@dataclass(frozen=True)
class QkvLayout:
    """The last dimension is `groups` equal runs of channels, and in each run there are parts in these proportions.

    Examples: equal thirds, `QkvLayout()`; heads first, each with its query, key and value, `QkvLayout(groups=heads)`;
    8 heads of queries, then 2 of keys and 2 of values, `QkvLayout((8, 2, 2))`.

    Args:
        shares: of the parts, in the order of `places`; whole numbers.
        groups: how often all parts come one after the other.
        places: what the parts are; some of "query", "key", "value".

    Raises:
        ValueError: a share or a number of groups below 1; not as many shares as places; another place, or one twice.
    """

    shares: tuple[int, ...] = (1, 1, 1)
    groups: int = 1
    places: tuple[str, ...] = ("query", "key", "value")

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups!r}")
        if not self.shares or min(self.shares) < 1:
            raise ValueError(f"shares must be whole numbers from 1, got {self.shares!r}")
        if len(set(self.places)) != len(self.shares) or not set(self.places) <= {"query", "key", "value"}:
            raise ValueError(
                "places must be some of 'query', 'key', 'value', each once, as many as there are shares, got "
                f"{self.places!r} for {self.shares!r}"
            )

    def split(self, x: Tensor) -> list[Tensor]:
        """From (..., C) the parts (..., c), in the order of `places`; channels of a part in the order of its heads.

        Raises:
            ValueError: C is no multiple of all shares of all groups.
        """
        if x.shape[-1] % (self.groups * sum(self.shares)):
            raise ValueError(f"channels must be a multiple of {self.groups} * {self.shares}, got {x.shape[-1]}")
        grouped = x.unflatten(-1, (self.groups, sum(self.shares), -1))
        return [part.flatten(-3) for part in grouped.split(self.shares, -2)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        grouped = [p.unflatten(-1, (self.groups, n, -1)) for p, n in zip(parts, self.shares, strict=True)]
        return torch.cat(grouped, -2).flatten(-3)


KEY_AND_VALUE = QkvLayout((1, 1), places=("key", "value"))


def _heads_first(attention: Any) -> QkvLayout:
    return QkvLayout(groups=attention.num_heads)


def _fewer_keys(attention: Any) -> QkvLayout:
    heads, keys = attention.num_heads, attention.num_key_value_heads
    return QkvLayout((heads, keys, keys))


def _phi(attention: Any) -> QkvLayout:
    keys = attention.num_key_value_heads
    return QkvLayout((attention.config.num_attention_heads, keys, keys))


def _falcon(attention: Any) -> QkvLayout:
    if attention.new_decoder_architecture:  # each head of keys and values after the queries that it serves
        return QkvLayout((attention.num_heads // attention.num_kv_heads, 1, 1), attention.num_kv_heads)
    return QkvLayout((attention.num_heads, 1, 1)) if attention.multi_query else _heads_first(attention)


def _big_code(attention: Any) -> QkvLayout:
    if attention.is_cross_attention:
        return KEY_AND_VALUE
    return QkvLayout((attention.num_heads, 1, 1)) if attention.multi_query else _heads_first(attention)


def _narrow_keys(attention: Any) -> QkvLayout | None:
    """By head, with keys of another width than values; where it convolves there are no tokens."""
    if getattr(attention, "use_conv", False):
        return None
    return QkvLayout((attention.key_dim, attention.key_dim, attention.val_dim), attention.num_heads)


def _narrow_keys_alone(attention: Any) -> QkvLayout | None:
    if attention.use_conv:
        return None
    return QkvLayout((attention.key_dim, attention.val_dim), attention.num_heads, ("key", "value"))


# By class, found through the MRO: the matrix, and its layout; None if its output has no tokens.
KNOWN: dict[tuple[str, str], tuple[str, Layout]] = {
    ("transformers.models.gpt_neox.modeling_gpt_neox", "GPTNeoXAttention"): (
        "query_key_value",
        lambda attention: QkvLayout(groups=attention.config.num_attention_heads),
    ),
    ("transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese", "GPTNeoXJapaneseAttention"): (
        "query_key_value",
        lambda attention: QkvLayout(groups=attention.num_attention_heads),
    ),
    ("transformers.models.bloom.modeling_bloom", "BloomAttention"): ("query_key_value", _heads_first),
    ("transformers.models.persimmon.modeling_persimmon", "PersimmonAttention"): ("query_key_value", _heads_first),
    ("transformers.models.falcon.modeling_falcon", "FalconAttention"): ("query_key_value", _falcon),
    ("transformers.models.phi3.modeling_phi3", "Phi3Attention"): ("qkv_proj", _phi),
    ("transformers.models.phi4_multimodal.modeling_phi4_multimodal", "Phi4MultimodalAttention"): ("qkv_proj", _phi),
    ("transformers.models.dbrx.modeling_dbrx", "DbrxAttention"): ("Wqkv", _fewer_keys),
    ("transformers.models.gpt_bigcode.modeling_gpt_bigcode", "GPTBigCodeAttention"): ("c_attn", _big_code),
    ("transformers.models.codegen.modeling_codegen", "CodeGenAttention"): (
        "qkv_proj",
        lambda attention: QkvLayout(groups=attention.mp_num, places=("query", "value", "key")),
    ),
    ("timm.models.levit", "Attention"): ("qkv", _narrow_keys),
    ("timm.models.levit", "AttentionDownsample"): ("kv", _narrow_keys_alone),
    ("timm.models.efficientformer", "Attention"): ("qkv", _narrow_keys),
    ("timm.models.tiny_vit", "Attention"): ("qkv", _narrow_keys),
    ("timm.models.maxxvit", "AttentionCl"): (
        "qkv",
        lambda attention: _heads_first(attention) if attention.head_first else QkvLayout(),
    ),
    ("timm.models.gcvit", "WindowAttentionGlobal"): (  # whose queries are made elsewhere, for all windows
        "qkv",
        lambda attention: KEY_AND_VALUE if attention.use_global else QkvLayout(),
    ),
}
