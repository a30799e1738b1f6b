"""Official weights of `tokenizers/models/vitok.py`: the paper's code (PyTorch), and its successor's (flax).

Names of the successor's parameters are those of its flax modules, joined by dots; arrays have flax's layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import errors
from .engine import Rule, identity, reshape, squeeze, transpose

_LAYER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "mlp/gate": "mlp.fc1",
    "mlp/up": "mlp.fc2",
    "mlp/down": "mlp.fc3",
}


def _coder(ours: str, official: str, table: str, frequencies: str) -> tuple[Rule, ...]:
    transformer = f"params/{ours}/transformer"
    return (
        Rule(f"params/{ours}/positions/table", table, squeeze(0)),
        Rule(f"{transformer}/frequencies", frequencies),
        Rule(rf"{transformer}/norm/\w+", f"{official}.norm.{{leaf}}"),
        *(
            Rule(rf"{transformer}/layers/(\d+)/{part}/\w+", rf"{official}.blocks.\1.{name}.{{leaf}}")
            for part, name in _LAYER.items()
        ),
    )


TABLE = (
    *_coder("encode_patches", "encoder", "posemb", "enc_freqs"),
    *_coder("decode_codes", "decoder", "dec_posemb", "dec_freqs"),
    Rule(r"params/encode_patches/embed/\w+", "tubelet_embed.proj.{leaf}"),
    Rule(r"params/encode_patches/to_code/\w+", "encoder_to_code.{leaf}"),
    Rule(r"params/decode_codes/from_code/\w+", "code_to_decoder.{leaf}"),
    # A transposed convolution (in, out, t, h, w) whose patches do not overlap.
    Rule(r"params/decode_codes/to_pixels/kernel", "tubelet_decode.proj.weight", transpose(0, 2, 3, 4, 1)),
    Rule(r"params/decode_codes/colour", "tubelet_decode.proj.bias"),
    Rule(r"params/mask_token", "mask_token", squeeze(0, 1)),
)
# Tables that are made and not learned, and the successor's temperature of a contrastive loss that it does not have.
IGNORE = ("posemb", "dec_posemb", "code", "t")

_NAFLEX_LAYER = {
    "norm1": "LayerNorm_0",
    "norm2": "LayerNorm_1",
    "attention/query": "FlashGQAAttention_0.q_proj",
    "attention/key": "FlashGQAAttention_0.k_proj",
    "attention/value": "FlashGQAAttention_0.v_proj",
    "attention/out": "FlashGQAAttention_0.out_proj",
    "mlp/gate": "T5_MLP_0.Dense_0",
    "mlp/up": "T5_MLP_0.Dense_1",
    "mlp/down": "T5_MLP_0.Dense_2",
}


def table_of(module: Any) -> tuple[Rule, ...]:
    """The paper's table, or its successor's, whose patches are flat."""
    if module.style == "vitok":
        return TABLE
    patch = (*module.patch, 3)
    rules = []
    for ours, official in (("encode_patches", "img"), ("decode_codes", "decoder_image")):
        transformer, names = f"params/{ours}/transformer", f"{official}.Transformer"
        rules += [
            Rule(f"params/{ours}/positions/table", f"{official}.pos_embedding"),
            Rule(rf"{transformer}/norm/(\w+)", rf"{names}.encoder_norm.\1"),
            *(
                Rule(rf"{transformer}/layers/(\d+)/{part}/(\w+)", rf"{names}.encoderblock_\1.{name}.\2", identity)
                for part, name in _NAFLEX_LAYER.items()
            ),
        ]
    flat = int(np.prod(patch))
    return (
        *rules,
        Rule("params/encode_patches/embed/kernel", "img.embedding.kernel", reshape((flat, -1), (*patch, -1))),
        Rule("params/encode_patches/embed/bias", "img.embedding.bias"),
        Rule(r"params/encode_patches/to_code/(\w+)", r"Dense_0.\1", identity),
        Rule(r"params/decode_codes/from_code/(\w+)", r"decoder_image.embedding.\1", identity),
        Rule("params/decode_codes/to_pixels/kernel", "final_proj.kernel", reshape((-1, flat), (-1, *patch))),
        Rule("params/decode_codes/to_pixels/bias", "final_proj.bias", reshape((flat,), patch)),
    )


# ------------------------------------------------------------------------------------------------------------- configs

_KEYS = {
    "channels": 3,
    "img_size": None,
    "num_frames": 1,
    "patch_size": None,
    "tubelet_size": 1,
    "width": None,
    "encoder_depth": None,
    "decoder_depth": None,
    "num_heads": None,
    "code_length": None,
    "code_width": 16,
    "variational": True,
    "rope_theta": 10000.0,
    "rope_style": "1d_axial",
    "simple": True,
    "posemb": "nope",
    "lengths": None,
}
# Recomputation; a mask that is made and handed to nothing; another name that only some configs use for code_length.
_WITHOUT_EFFECT = ("checkpoint", "block_casual", "max_code_length")
_ROTARY = {"1d_axial": "sequence", "2d_axial": "axial", "2d_mixed": "mixed"}
_POSITIONS = {
    "nope": ("none", "none"),
    "dec": ("none", "learned"),
    "learned": ("learned", "learned"),
    **{f"sincos{axes}d": (f"sincos{axes}d",) * 2 for axes in (1, 2, 3)},
}


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields from arguments of the class ``AE``, or from a config of the successor (``image_model``)."""
    if "image_model" in config:
        return _naflex_fields(config)
    found = _known("vitok", config, _KEYS, _WITHOUT_EFFECT)
    if found["channels"] != 3:
        raise errors.unknown("channels", found["channels"], (3,))
    patch, tubelet = found["patch_size"], found["tubelet_size"]
    side = found["img_size"] // patch
    length = found["code_length"] or config.get("max_code_length")
    return {
        "bottleneck": {"name": "gaussian" if found["variational"] else "identity"},
        "latent_channels": found["code_width"],
        "patch": (tubelet, patch, patch),
        "encoder": (found["width"], found["encoder_depth"], found["num_heads"]),
        "decoder": (found["width"], found["decoder_depth"], found["num_heads"]),
        "tokens": None if found["simple"] else length,
        "lengths": tuple(found["lengths"] or ()),
        "positions": errors.pick("posemb", found["posemb"], _POSITIONS),
        "rotary": errors.pick("rope_style", found["rope_style"], _ROTARY) if found["rope_theta"] else "none",
        "theta": float(found["rope_theta"] or 1.0),
        "grid": (found["num_frames"] // tubelet, side, side),
        "video": max(found["num_frames"], tubelet) > 1,
    }


_NAFLEX_KEYS = {"channel_dim": None, "patch_size": 16, "image": None, "decoder_image": None, "layernorm_code": False}
# The module; widths of heads that this model does not have; of training.
_NAFLEX_WITHOUT_EFFECT = ("image_model", "out_dims", "freeze_encoder")
_VIT_KEYS = {
    "width": None,
    "depth": None,
    "num_heads": None,
    "head_dim": None,
    "kv_groups": 2,
    "local_ws": (128, 128),
    "posemb": None,
    "nposemb": None,
    "use_t5_mlp": True,
}
# How it is computed; the compute dtype is chosen here by who loads the model.
_VIT_WITHOUT_EFFECT = ("use_splash", "use_seq_parallel", "dtype_mm", "scan", "remat_policy")


def _naflex_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    found = _known("vitok naflex", config, _NAFLEX_KEYS, _NAFLEX_WITHOUT_EFFECT)
    if found["layernorm_code"]:
        raise errors.unknown("layernorm_code", found["layernorm_code"], (False,))
    vits = [
        _known(f"vitok naflex {part}", found[part], _VIT_KEYS, _VIT_WITHOUT_EFFECT)
        for part in ("image", "decoder_image")
    ]
    for vit in vits:
        vit["head_dim"] = vit["head_dim"] or vit["width"] // vit["num_heads"]
        vit["nposemb"] = vit["nposemb"] or 2048 // found["patch_size"] + 1
        vit["local_ws"] = tuple(vit["local_ws"]) if vit["local_ws"] else None
        expected = {"use_t5_mlp": True, "head_dim": vit["width"] // vit["num_heads"]}
        expected["posemb"] = f"learn_2d({vit['nposemb']})"
        for key, value in expected.items():
            if vit[key] not in (value, None):
                raise errors.unknown(key, vit[key], (value,))
    first, second = vits
    for key in ("kv_groups", "local_ws", "nposemb"):
        if first[key] != second[key]:
            raise errors.unknown(f"{key} of decoder_image beside that of image", second[key], (first[key],))
    return {
        "bottleneck": {"name": "gaussian", "min_logvar": -1e30, "max_logvar": 1e30},
        "latent_channels": found["channel_dim"],
        "patch": (1, found["patch_size"], found["patch_size"]),
        "encoder": tuple(first[key] for key in ("width", "depth", "num_heads")),
        "decoder": tuple(second[key] for key in ("width", "depth", "num_heads")),
        "positions": ("resampled", "resampled"),
        "rotary": "none",
        "grid": (1, first["nposemb"], first["nposemb"]),
        "style": "naflex",
        "kv_groups": first["kv_groups"],
        "window": first["local_ws"],
    }


def _known(what: str, config: Mapping[str, Any], keys: Mapping[str, Any], others: tuple[str, ...]) -> dict[str, Any]:
    """The values of keys, defaults included; another key is refused."""
    for name in config:
        if name not in keys and name not in others:
            raise errors.unknown(f"key of an official {what} config", name, [*keys, *others])
    return {name: config.get(name, default) for name, default in keys.items()}
