"""Official weights of `tokenizers/generators/lightningdit.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import errors
from .engine import Rule, identity, kernel, part

_LAYER = r"params/layers/(\d+)/"
TABLE = (
    Rule(r"params/patches/\w+", "x_embedder.proj.{leaf}"),
    Rule(r"params/condition/time_in/\w+", "t_embedder.mlp.0.{leaf}"),
    Rule(r"params/condition/time_out/\w+", "t_embedder.mlp.2.{leaf}"),
    Rule(r"params/condition/label/embedding", "y_embedder.embedding_table.weight"),
    Rule(_LAYER + r"(norm[12])/\w+", r"blocks.\1.\2.{leaf}"),
    Rule(_LAYER + r"attention/qkv/\w+", r"blocks.\1.attn.qkv.{leaf}"),
    Rule(_LAYER + r"attention/out/\w+", r"blocks.\1.attn.proj.{leaf}"),
    Rule(_LAYER + r"attention/query_norm/\w+", r"blocks.\1.attn.q_norm.{leaf}"),
    Rule(_LAYER + r"attention/key_norm/\w+", r"blocks.\1.attn.k_norm.{leaf}"),
    Rule(_LAYER + r"mlp/gate/kernel", r"blocks.\1.mlp.w12.weight", part(0, 2, kernel)),
    Rule(_LAYER + r"mlp/gate/bias", r"blocks.\1.mlp.w12.bias", part(0, 2, identity)),
    Rule(_LAYER + r"mlp/up/kernel", r"blocks.\1.mlp.w12.weight", part(1, 2, kernel)),
    Rule(_LAYER + r"mlp/up/bias", r"blocks.\1.mlp.w12.bias", part(1, 2, identity)),
    Rule(_LAYER + r"mlp/down/\w+", r"blocks.\1.mlp.w3.{leaf}"),
    Rule(_LAYER + r"mlp/(fc[12])/\w+", r"blocks.\1.mlp.\2.{leaf}"),
    Rule(_LAYER + r"modulation/\w+", r"blocks.\1.adaLN_modulation.1.{leaf}"),
    Rule(r"params/modulation_out/\w+", "final_layer.adaLN_modulation.1.{leaf}"),
    Rule(r"params/norm_out/\w+", "final_layer.norm_final.{leaf}"),
    Rule(r"params/out/\w+", "final_layer.linear.{leaf}"),
)
# Tables of positions, which are computed.
IGNORE = ("pos_embed", r"feat_rope\.freqs_(cos|sin)")

# depth, width, heads; the number after the slash of a model type is the patch.
_SIZES = {
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}
_KEYS = {
    "model_type": None,
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 32,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": False,
    "use_qknorm": False,
    "use_swiglu": False,
    "use_rope": False,
    "use_rmsnorm": False,
    "wo_shift": False,
}
_WITHOUT_EFFECT = ("use_checkpoint",)


def official_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The averaged weights of a training checkpoint, without the prefix of data-parallel training."""
    if any(name.startswith("ema.") for name in state_dict):
        state_dict = {name[4:]: value for name, value in state_dict.items() if name.startswith("ema.")}
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields from arguments of the class ``LightningDiT``, or from ``model_type`` and the other ones."""
    for name in config:
        if name not in _KEYS and name not in _WITHOUT_EFFECT:
            raise errors.unknown("key of an official lightningdit config", name, [*_KEYS, *_WITHOUT_EFFECT])
    found = {name: config.get(name, default) for name, default in _KEYS.items()}
    patch, size = found["patch_size"], (found["depth"], found["hidden_size"], found["num_heads"])
    if found["model_type"] is not None:
        kinds = {f"LightningDiT-{name}/{p}": (size, p) for name, size in _SIZES.items() for p in (1, 2)}
        size, patch = errors.pick("model_type", found["model_type"], kinds)
    wide = int(size[1] * found["mlp_ratio"])
    return {
        "channels": found["in_channels"],
        "grid": (found["input_size"],) * 2,
        "patch": patch,
        "size": size,
        "classes": found["num_classes"],
        "hidden": int(2 / 3 * wide) if found["use_swiglu"] else wide,
        "norm": "rms" if found["use_rmsnorm"] else "layer",
        "qk_norm": found["use_qknorm"],
        "swiglu": found["use_swiglu"],
        "rotary": found["use_rope"],
        "shift": not found["wo_shift"],
        "sigma": found["learn_sigma"],
        "label_dropout": found["class_dropout_prob"],
    }
