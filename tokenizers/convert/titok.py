"""Official weights of `tokenizers/models/titok.py`: TiTok and TA-TiTok (bytedance/1d-tokenizer).

Configs do not say whether the decoder reads text; the tensors do. Models of the authors' configs do not learn by
``clustering_vq``, which only training needs; those with ``learning="clustering"`` have its statistics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import errors
from .engine import Rule, dense_from_conv, reshape

_conv = dense_from_conv(2)
_TRANSFORMER = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "mlp/fc1": "mlp.c_fc",
    "mlp/fc2": "mlp.c_proj",
    "attention/out": "attn.out_proj",
}
_CODERS = (("encode_tokens", "encoder"), ("decode_tokens", "decoder"))


def _coder(ours: str, official: str) -> tuple[Rule, ...]:
    block = rf"params/{ours}/transformer/layers/(\d+)"
    return (
        Rule(rf"params/{ours}/class_token", f"{official}.class_embedding"),
        Rule(rf"params/{ours}/positions", f"{official}.positional_embedding"),
        Rule(rf"params/{ours}/latent_positions", f"{official}.latent_token_positional_embedding"),
        Rule(rf"params/{ours}/transformer/norm_in/\w+", f"{official}.ln_pre.{{leaf}}"),
        Rule(rf"params/{ours}/norm_out/\w+", f"{official}.ln_post.{{leaf}}"),
        Rule(rf"{block}/attention/qkv/kernel", rf"{official}.transformer.\1.attn.in_proj_weight"),
        Rule(rf"{block}/attention/qkv/bias", rf"{official}.transformer.\1.attn.in_proj_bias"),
        *(
            Rule(rf"{block}/{part}/\w+", rf"{official}.transformer.\1.{name}.{{leaf}}")
            for part, name in _TRANSFORMER.items()
        ),
    )


def _zeros(match: re.Match, state: Mapping[str, np.ndarray], leaf: Any) -> np.ndarray:
    return np.zeros(leaf.shape, leaf.dtype)


_PIXELS = "params/to_pixels/pixels"
TABLE = (
    *(rule for pair in _CODERS for rule in _coder(*pair)),
    Rule("params/encode_tokens/latent_tokens", "latent_tokens"),
    Rule(r"params/encode_tokens/patches/\w+", "encoder.patch_embed.{leaf}"),
    Rule(r"params/encode_tokens/conv_out/kernel", "encoder.conv_out.weight", _conv),
    Rule(r"params/encode_tokens/conv_out/bias", "encoder.conv_out.bias"),
    Rule(r"params/decode_tokens/mask_token", "decoder.mask_token", reshape((1, 1, -1), (1, -1))),
    Rule(r"params/decode_tokens/embed/\w+", "decoder.decoder_embed.{leaf}"),
    Rule(r"params/decode_tokens/text/\w+", "decoder.text_guidance_proj.{leaf}"),
    Rule(r"params/decode_tokens/text_positions", "decoder.text_guidance_positional_embedding"),
    Rule(r"params/to_pixels/(?:to_pixels|hidden|proxies/hidden)/kernel", "decoder.ffn.0.weight", _conv),
    Rule(r"params/to_pixels/(?:to_pixels|hidden|proxies/hidden)/bias", "decoder.ffn.0.bias"),
    Rule(r"params/to_pixels/(?:logits|proxies/logits)/kernel", "decoder.ffn.2.weight", _conv),
    Rule(r"params/to_pixels/(?:logits|proxies/logits)/bias", "decoder.ffn.2.bias"),
    Rule(r"params/to_pixels/conv_out/\w+", "decoder.conv_out.{leaf}"),
    Rule(r"params/to_pixels/codebook", "pixel_quantize.embedding.weight"),
    Rule(rf"{_PIXELS}/(conv_in|norm_out|conv_out)/\w+", r"pixel_decoder.\1.{leaf}"),
    Rule(rf"{_PIXELS}/up(\d+)_block(\d+)/shortcut/\w+", r"pixel_decoder.up.\1.block.\2.nin_shortcut.{leaf}"),
    Rule(rf"{_PIXELS}/up(\d+)_block(\d+)/(\w+)/\w+", r"pixel_decoder.up.\1.block.\2.\3.{leaf}"),
    Rule(rf"{_PIXELS}/mid_block(\d+)/(\w+)/\w+", r"pixel_decoder.mid.\1.\2.{leaf}"),
    Rule(rf"{_PIXELS}/up(\d+)_upsample/\w+", r"pixel_decoder.up.\1.upsample_conv.{leaf}"),
    Rule(r"params/bottleneck/codebook", "quantize.embedding.weight"),
    # Of clustering_vq; their codes themselves move, in place.
    Rule(r"codebook/bottleneck/usage", "quantize.embed_prob", absent=_zeros),
    Rule(r"codebook/bottleneck/moved", None, absent=_zeros),
)
# A model that only encodes and decodes needs no statistics.
IGNORE = (r"quantize\.embed_prob",)

# The two smallest are not released: test cases of the authors' code use them.
_SIZES = {
    "small": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "tiny": (32, 2, 4),
    "tiny3": (48, 3, 3),
}
_KEYS = {
    "quantize_mode": "vq",
    "codebook_size": None,
    "token_size": None,
    "use_l2_norm": False,
    "vit_enc_model_size": None,
    "vit_dec_model_size": None,
    "vit_enc_patch_size": None,
    "vit_dec_patch_size": None,
    "num_latent_tokens": None,
    "finetune_decoder": True,
    "is_legacy": True,
    "text_context_length": None,
    "text_embed_dim": None,
}
_TRAINING = ("commitment_cost", "clustering_vq", "pretrained_tokenizer_weight")


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields from a config tree: ``model.vq_model`` and ``dataset.preprocessing.crop_size`` of it."""
    given = config["model"]["vq_model"]
    for name in given:
        if name not in _KEYS and name not in _TRAINING:
            raise errors.unknown("key of an official titok config", name, [*_KEYS, *_TRAINING])
    found = {name: given.get(name, default) for name, default in _KEYS.items()}
    patch, size = found["vit_enc_patch_size"], config["dataset"]["preprocessing"]["crop_size"]
    if patch != found["vit_dec_patch_size"]:
        raise errors.unknown("vit_dec_patch_size beside vit_enc_patch_size", found["vit_dec_patch_size"], (patch,))
    return {
        "bottleneck": _bottleneck(found),
        "latent_channels": found["token_size"],
        "tokens": found["num_latent_tokens"],
        "input_size": (size, size),
        "patch": patch,
        "encoder": errors.pick("vit_enc_model_size", found["vit_enc_model_size"], _SIZES),
        "decoder": errors.pick("vit_dec_model_size", found["vit_dec_model_size"], _SIZES),
        "head": _head(found),
        "swapped": bool(found["is_legacy"]),
    }


def _bottleneck(found: Mapping[str, Any]) -> dict[str, Any]:
    if found["quantize_mode"] == "vae":
        return {"name": "gaussian"}
    if found["quantize_mode"] != "vq":
        raise errors.unknown("quantize_mode", found["quantize_mode"], ("vq", "vae"))
    distance = "cosine" if found["use_l2_norm"] else "euclidean"
    table = {"codebook_size": found["codebook_size"], "code_dim": found["token_size"]}
    return {"name": "vq", "distance": distance, **table}


def _head(found: Mapping[str, Any]) -> str:
    if not found["is_legacy"]:
        if found["finetune_decoder"]:
            raise ValueError(
                "finetune_decoder=True, the second of two stages, needs is_legacy=True, got is_legacy=False."
            )
        return "patches"
    return "proxy_pixels" if found["finetune_decoder"] else "proxies"


def fields_from_weights(module: Any, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Whether the decoder reads text: number and channels of its features."""
    positions = state_dict.get("decoder.text_guidance_positional_embedding")
    projection = state_dict.get("decoder.text_guidance_proj.weight")
    if positions is None or projection is None:
        return {}
    return {"text": (int(np.shape(positions)[0]), int(np.shape(projection)[1]))}
