"""Official weights of `tokenizers/models/vtp.py` (MiniMax-AI/VTP): safetensors of Hugging Face, and older names.

Periods of the rotary embedding are made, not loaded; teacher and head of self-distillation are not part of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import errors
from .engine import Rule, Transform, dense_from_conv

_LAYER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "attention/query_norm": "attn.q_norm",
    "attention/key_norm": "attn.k_norm",
    "mlp/gate": "mlp.w1",
    "mlp/up": "mlp.w2",
    "mlp/down": "mlp.w3",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
_TEXT_LAYER = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attention/out": "attn.out_proj",
    "mlp/fc1": "mlp.c_fc",
    "mlp/fc2": "mlp.c_proj",
}


def _blocks(part: str) -> tuple[Rule, ...]:
    layer = rf"params/{part}/layers/(\d+)"
    return (
        *(Rule(rf"{layer}/{ours}/\w+", rf"{part}.blocks.\1.{name}.{{leaf}}") for ours, name in _LAYER.items()),
        Rule(rf"{layer}/scale(\d)/scale", rf"{part}.blocks.\1.ls\2.gamma"),
    )


# Patches are cut in the order (height, width, colour), their convolution has (out, colour, height, width).
_patches = Transform(
    lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
    lambda a: np.moveaxis(a.reshape(_side(a), _side(a), 3, -1), (0, 1, 2, 3), (2, 3, 1, 0)),
)


def _side(kernel: np.ndarray) -> int:
    return int(round((kernel.shape[0] / 3) ** 0.5))


_conv = dense_from_conv(2)
_text = r"params/text_transformer"
_text_layer = rf"{_text}/layers/(\d+)"
TABLE = (
    Rule("params/trunk/class_token", "trunk.cls_token"),
    Rule("params/trunk/mask_token", "trunk.mask_token"),
    Rule("params/trunk/patches/kernel", "trunk.patch_embed.proj.weight", _patches),
    Rule("params/trunk/patches/bias", "trunk.patch_embed.proj.bias"),
    Rule(r"params/trunk_norm/\w+", "trunk.norm.{leaf}"),
    Rule("params/feature_bottleneck/kernel", "trunk.feature_bottleneck.weight"),
    *_blocks("trunk"),
    *_blocks("pixel_decoder"),
    Rule(r"params/pixel_decoder/(proj_in|proj_out)/kernel", r"pixel_decoder.\1.weight", _conv),
    Rule(r"params/pixel_decoder/(proj_in|proj_out)/bias", r"pixel_decoder.\1.bias"),
    Rule(r"params/pixel_decoder/norm/\w+", "pixel_decoder.norm.{leaf}"),
    Rule("params/visual_proj/kernel", "visual_proj.weight"),
    Rule(r"params/(logit_scale|logit_bias)", r"\1"),
    Rule(f"{_text}/tokens/embedding", "token_embedding.weight"),
    Rule(f"{_text}/positions", "positional_embedding"),
    Rule(f"{_text}/class_token", "cls_emb"),
    Rule(rf"{_text}/norm/\w+", "ln_final.{leaf}"),
    Rule(rf"{_text_layer}/attention/qkv/kernel", r"text_transformer.resblocks.\1.attn.in_proj_weight"),
    Rule(rf"{_text_layer}/attention/qkv/bias", r"text_transformer.resblocks.\1.attn.in_proj_bias"),
    *(
        Rule(rf"{_text_layer}/{ours}/\w+", rf"text_transformer.resblocks.\1.{name}.{{leaf}}")
        for ours, name in _TEXT_LAYER.items()
    ),
    Rule(rf"{_text_layer}/scale(\d)/scale", r"text_transformer.resblocks.\1.ls_\2.gamma"),
)
_PROJECTION = {  # with a bias it is a layer, without one a matrix that multiplies from the right
    True: (Rule(rf"{_text}/projection/\w+", "text_projection.{leaf}"),),
    False: (Rule(f"{_text}/projection/kernel", "text_projection", Transform(lambda a: a, lambda a: a)),),
}
IGNORE = (r".*rope_embed\.periods", r"teacher_.*", r"dino_head\..*")


def table_of(module: Any) -> tuple[Rule, ...]:
    """The table, with the projection of texts as this model has it."""
    return (*TABLE, *_PROJECTION[bool(dict(module.text_tower).get("projection_bias"))])


def official_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names of the training code as those of the published files."""
    old = {r"^transformer\.": "text_transformer.", r"^proj\.": "visual_proj."}
    renamed = {}
    for name, value in state_dict.items():
        for pattern, new in old.items():
            name = re.sub(pattern, new, name)
        renamed[name] = value
    return renamed


# ------------------------------------------------------------------------------------------------------------- configs

_KEYS = {
    "train_clip": True,
    "train_reconstruction": True,
    "vision_patch_size": 16,
    "vision_embed_dim": 768,
    "vision_depth": 12,
    "vision_num_heads": 12,
    "vision_mlp_ratio": 4.0,
    "vision_ffn_layer": "swiglu",
    "vision_norm_layer": "rmsnorm",
    "vision_init_values": None,
    "vision_use_qk_norm": False,
    "vision_feature_bottleneck": 64,
    "vision_bottleneck_ae_only": True,
    "vision_clip_feat": "cls",
    "text_context_length": 77,
    "text_vocab_size": 49408,
    "text_embed_dim": 768,
    "text_num_heads": 12,
    "text_depth": 12,
    "text_mlp_ratio": 4.0,
    "text_ls_init_value": None,
    "text_embed_cls": False,
    "text_pad_id": 0,
    "text_no_causal_mask": False,
    "text_pool_type": "argmax",
    "text_proj_type": "linear",
    "text_proj_bias": False,
    "text_quick_gelu": False,
    "decoder_embed_dim": 768,
    "decoder_num_heads": 12,
    "decoder_depth": 12,
    "decoder_ffn_layer": "swiglu",
    "decoder_norm_layer": "layernorm",
    "decoder_init_values": None,
    "decoder_use_qk_norm": False,
    "init_logit_scale": None,
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
}
# The size of images in training, what a method returns besides, and what Hugging Face adds.
_WITHOUT_EFFECT = (
    "image_size",
    "text_output_tokens",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "model_type",
    "transformers_version",
)
_NORMS = ("rmsnorm", "layernorm", "layernormbf16")
_MLPS = ("swiglu", "swiglu32", "swiglu64", "swiglu128", "mlp")


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields from a ``config.json``."""
    for name in config:
        if name not in _KEYS and name not in _WITHOUT_EFFECT:
            raise errors.unknown("key of an official vtp config", name, [*_KEYS, *_WITHOUT_EFFECT])
    found = {name: config.get(name, default) for name, default in _KEYS.items()}
    accepted = {
        "vision_norm_layer": _NORMS,
        "decoder_norm_layer": _NORMS,
        "vision_ffn_layer": _MLPS,
        "decoder_ffn_layer": _MLPS,
        "vision_clip_feat": ("cls", "pooled"),
        "text_pool_type": ("argmax", "first", "last"),
        "text_proj_type": ("linear", "none"),
        "text_embed_cls": (False,),  # theirs does not run with it either
    }
    for key, values in accepted.items():
        if found[key] not in values:
            raise errors.unknown(key, found[key], values)

    def pair(key: str) -> tuple[Any, Any]:
        return found[f"vision_{key}"], found[f"decoder_{key}"]

    sizes = [
        tuple(found[f"{part}_{key}"] for key in ("embed_dim", "depth", "num_heads")) for part in ("vision", "decoder")
    ]
    scale, bias = found["init_logit_scale"], found["init_logit_bias"]
    return {
        "latent_channels": found["vision_feature_bottleneck"],
        "patch": found["vision_patch_size"],
        "encoder": sizes[0],
        "decoder": sizes[1] if found["train_reconstruction"] else None,
        "norm": pair("norm_layer"),
        "mlp": pair("ffn_layer"),
        "mlp_ratio": float(found["vision_mlp_ratio"]),
        "layer_scale": pair("init_values"),
        "qk_norm": pair("use_qk_norm"),
        "clip": bool(found["train_clip"]),
        "clip_feature": found["vision_clip_feat"],
        "bottleneck_ae_only": bool(found["vision_bottleneck_ae_only"]),
        "text_tower": _text_fields(found),
        **({} if scale is None else {"clip_scale": float(scale)}),
        "clip_bias": None if bias is None else float(bias),
        "scalar_scale": not found["nonscalar_logit_scale"],
    }


def _text_fields(found: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    width = found["text_embed_dim"]
    fields = {
        "vocabulary": found["text_vocab_size"],
        "context": found["text_context_length"],
        "width": width,
        "layers": found["text_depth"],
        "heads": found["text_num_heads"],
        "features": width if found["text_proj_type"] == "linear" else None,
        "mlp_ratio": float(found["text_mlp_ratio"]),
        "activation": "quick_gelu" if found["text_quick_gelu"] else "gelu",
        "layer_scale": found["text_ls_init_value"],
        "causal": not found["text_no_causal_mask"],
        "pool": found["text_pool_type"],
        "projection_bias": bool(found["text_proj_bias"]) and found["text_proj_type"] == "linear",
    }
    return tuple(fields.items())
