"""Models of torchvision, timm and `transformers`, small and with random weights: what of a policy each of them takes.

`python tests/model_matrix.py > docs/models.md` writes the page of them.
"""

from __future__ import annotations

import contextlib
import textwrap
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import nn

from autodropout.policy import TOKEN_PLACES

SIDE = 64
TINY = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 8,
    "d_kv": 8,
    "embedding_size": 32,
    "d_ff": 64,
    "intermediate_size": 64,
    "hidden_dim": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "vocab_size": 100,
    "image_size": SIDE,
    "patch_size": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

MAPS = ("batch_norm",)
ALL = TOKEN_PLACES
RESIDUAL = ("residual",)
NO_NORM = "no batch normalisation, and no Transformer's layer of known names"
# By library: name -> places, and why not all of them.
MODELS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "torchvision": dict.fromkeys(
        [
            "resnet18",
            "efficientnet_b0",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "mnasnet0_5",
            "shufflenet_v2_x0_5",
            "regnet_y_400mf",
            "googlenet",
        ],
        (MAPS, ""),
    )
    | {
        "swin_t": (ALL, ""),
        "swin_v2_t": (ALL, ""),
        "vit_b_16": (ALL, ""),
    },
    "timm": dict.fromkeys(
        [
            "resnet10t",
            "seresnet18",
            "skresnet18",
            "mixnet_s",
            "mobilenetv3_small_050",
            "mobilenetv4_conv_small",
            "fbnetc_100",
            "tinynet_e",
            "ghostnet_050",
            "regnetx_002",
            "repvgg_a0",
            "rexnet_100",
            "darknet17",
            "lcnet_035",
            "hardcorenas_a",
            "fasternet_t0",
        ],
        (MAPS, ""),
    )
    | dict.fromkeys(
        ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "pit_ti_224", "swin_tiny_patch4_window7_224"], (ALL, "")
    )
    | {
        "edgenext_xx_small": (ALL, "its convolutional blocks have the residual place alone"),
        "convit_tiny": (ALL, "its gated attentions have the residual place alone"),
        "levit_128s": ((*MAPS, *ALL[:-1]), "its feed-forward parts have names of their own"),
        "eva02_tiny_patch14_224": (ALL, ""),
        "beit_base_patch16_224": (ALL, ""),
        "swinv2_cr_tiny_ns_224": (ALL, ""),
        "tiny_vit_5m_224": ((*MAPS, *ALL), ""),
        "twins_pcpvt_small": (ALL, ""),
        "mixer_s32_224": (RESIDUAL, "no attention; what mixes its tokens has channels for tokens and is no place"),
        "gmlp_ti16_224": (RESIDUAL, "no attention"),
        "pvt_v2_b0": (ALL, ""),
    },
    "transformers": dict.fromkeys(
        [
            "GPT2Model",
            "BertModel",
            "RobertaModel",
            "DistilBertModel",
            "ElectraModel",
            "AlbertModel",
            "DebertaV2Model",
            "MPNetModel",
            "ModernBertModel",
            "LlamaModel",
            "MistralModel",
            "Qwen2Model",
            "Qwen3Model",
            "GemmaModel",
            "Gemma2Model",
            "PhiModel",
            "GPTNeoModel",
            "GPTJModel",
            "MptModel",
            "StableLmModel",
            "OlmoModel",
            "CohereModel",
            "T5Model",
            "BartModel",
            "ViTModel",
            "DeiTModel",
            "BeitModel",
            "CLIPVisionModel",
            "Dinov2Model",
            "SiglipVisionModel",
            "Phi3Model",
            "GPTNeoXModel",
            "BloomModel",
            "FalconModel",
            "PersimmonModel",
            "CodeGenModel",
            "GPTBigCodeModel",
        ],
        (ALL, ""),
    )
    | {
        "OPTModel": (ALL[:-1], "its feed-forward parts see samples and tokens as one dimension"),
        "MixtralModel": (ALL[:-1], "its experts are one module"),
    },
}
REFUSED: dict[str, dict[str, str]] = {
    "torchvision": {"convnext_tiny": NO_NORM, "alexnet": NO_NORM},
    "timm": {"convnext_atto": NO_NORM, "nf_resnet50": NO_NORM, "poolformer_s12": NO_NORM},
    "transformers": {"XLNetModel": "its projections are parameters without a module"},
}


def made(library: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model and what it is called with."""
    torch.manual_seed(0)
    if library == "transformers":
        return _of_transformers(name)
    images = {"x": torch.randn(2, 3, SIDE, SIDE)}
    if library == "torchvision":
        options = {"googlenet": {"init_weights": False}, "vit_b_16": {"image_size": SIDE, "patch_size": 16}}.get(
            name, {}
        )
        if name == "vit_b_16":  # as large as the smallest of timm
            return torchvision.models.VisionTransformer(SIDE, 16, 2, 4, 32, 64), images
        return torchvision.models.get_model(name, num_classes=10, **options), images
    try:
        return timm.create_model(name, num_classes=10, img_size=SIDE), images
    except TypeError:
        return timm.create_model(name, num_classes=10), images


def _of_transformers(name: str) -> tuple[nn.Module, dict[str, Any]]:
    kind = getattr(transformers, name)
    if name == "GPTNeoModel":
        types = [[["global", "local"], 1]]
        config = kind.config_class(hidden_size=32, num_layers=2, attention_types=types, num_heads=4, vocab_size=100)
    else:
        config = kind.config_class()
        for key, value in TINY.items():
            # Some are computed from others, some models have none.
            with contextlib.suppress(AttributeError, NotImplementedError):
                getattr(config, key)
                setattr(config, key, value)
    model = kind(config)
    if model.main_input_name == "pixel_values":
        return model, {"pixel_values": torch.randn(2, 3, SIDE, SIDE)}
    ids = torch.arange(16).view(2, 8) + 3
    return model, {"input_ids": ids, **({"decoder_input_ids": ids[:, :6]} if config.is_encoder_decoder else {})}


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The first of what a model returns."""
    y = model(**inputs)
    first: torch.Tensor = y if isinstance(y, torch.Tensor) else y[0]
    return first


def page() -> str:
    """Markdown."""
    count = sum(map(len, MODELS.values()))
    places_of_all = ", ".join(f"`{place}`" for place in (*MAPS, *TOKEN_PLACES))
    paragraphs = (
        f"""`apply_policy` on {count} models of three libraries, with random weights and small inputs. Each is tested:
        the policy fits, what is dropped at every site is near its exact rate, a step of training works, evaluation is
        bitwise what it was, the keys of the `state_dict` stay, and the policy comes off again. Others of the same
        families work alike; `autodropout sites timm:NAME` lists what a model has.""",
        f"""Places: {places_of_all}; and ours, `feed_forward` ([Transformers](transformers.md)) and `branch`
        ([definitions](definitions.md)), which are not listed below. A policy for places that a model lacks is refused
        by `apply_policy`; `Policy.fit` leaves them out and says so. With `register_places` the places of a class of
        your own are said in a line.""",
        """How one matrix is divided among query, key and value is known class by class (autodropout/qkv_layouts.py), or
        the matrix has a name that means equal thirds; `nn.MultiheadAttention` is taken over while it trains.""",
        """Places are found by the names of modules, and names do not say everything: attention over something else than
        tokens (XCiT: channels; Longformer: a window around each query) gets the pattern along that dimension. Where
        time comes first, (T, N, C), is said in [Transformers](transformers.md).""",
    )
    lines = ["# Models", ""]
    for paragraph in paragraphs:
        lines += [textwrap.fill(" ".join(paragraph.split()), 150), ""]
    lines += ["| library | model | places | why not all |", "| --- | --- | --- | --- |"]
    for library, models in MODELS.items():
        for name, (places, reason) in models.items():
            which = "the six of a layer" if places == ALL else ", ".join(f"`{place}`" for place in places)
            lines.append(f"| {library} | `{name}` | {which} | {reason} |")
    lines += [
        "",
        "Refused, because a policy would do nothing there:",
        "",
        "| library | model | why |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {library} | `{name}` | {why} |" for library, models in REFUSED.items() for name, why in models.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
