"""Models of `transformers`, timm, torchvision and PyTorch that do not mark their places, tiny, with random weights and
without dropout of their own; and what they are called with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import nn
from torchvision.models.swin_transformer import SwinTransformerBlockV2

from autodropout import Pattern
from autodropout import Policy
from autodropout import Site
from autodropout import TokenPattern
from autodropout.policy import LAYER_PLACES

IDS = torch.arange(14).view(2, 7)
SEEN = (torch.arange(7) < torch.tensor([[5], [7]])).long()
SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
NO_OWN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PATTERN = TokenPattern(2, 1, rate=0.5)


def gpt2(attention: str = "sdpa") -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=100,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0,
        attn_pdrop=0,
        embd_pdrop=0,
    )
    return transformers.GPT2Model._from_config(config, attn_implementation=attention)


def bert(attention: str = "sdpa") -> nn.Module:
    config = transformers.BertConfig(**SMALL, **NO_OWN)
    return transformers.BertModel._from_config(config, attn_implementation=attention)


def llama(attention: str = "sdpa") -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
    return transformers.LlamaModel._from_config(config, attn_implementation=attention)


def t5(attention: str = "sdpa") -> nn.Module:
    config = transformers.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=3, num_heads=4, dropout_rate=0.0
    )
    return transformers.T5Model._from_config(config, attn_implementation=attention)


def vit(attention: str = "sdpa") -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    return model


def encoder(attention: str = "sdpa") -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2)


def swin(attention: str = "sdpa") -> nn.Module:
    return torchvision.models.SwinTransformer(
        [4, 4], 16, [2], [2], [4, 4], stochastic_depth_prob=0.0, num_classes=10, block=SwinTransformerBlockV2
    )


WORDS = {"input_ids": IDS}
MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "gpt2": (gpt2, WORDS),
    "bert": (bert, {**WORDS, "attention_mask": SEEN}),
    "llama": (llama, WORDS),
    "t5": (t5, {**WORDS, "decoder_input_ids": IDS[:, :5]}),
    "encoder": (encoder, {"src": torch.linspace(-1, 1, 2 * 7 * 32).view(2, 7, 32).sin()}),
    "swin": (swin, {"x": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}),
    "vit": (vit, {"x": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}),
}


def everywhere(pattern: Pattern, places: tuple[str, ...] = LAYER_PLACES) -> Policy:
    return Policy(tuple(Site(place, 0.0, place, pattern) for place in places))


def made(name: str, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0](attention)


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    y = model(**inputs)
    first: torch.Tensor = y if isinstance(y, torch.Tensor) else y[0]
    return first
