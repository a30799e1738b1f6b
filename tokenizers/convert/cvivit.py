"""Official weights of `tokenizers/models/cvivit.py`: ``CViViT`` of lucidrains/phenaki-pytorch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import errors
from .engine import Rule, Transform, squeeze
from .vivit import BIAS, UNUSED, patch_rules, transformer_rules


def _ones(match: re.Match, state: Mapping[str, np.ndarray], leaf: Any) -> np.ndarray:
    return np.ones(leaf.shape, leaf.dtype)


def _unit(codes: np.ndarray) -> np.ndarray:
    """Codes ``(1, K, D)`` as ours: their quantizer keeps unit vectors, too, but for those it was built with."""
    return codes[0] / np.linalg.norm(codes[0], axis=-1, keepdims=True)


def _codes(match: re.Match, state: Mapping[str, np.ndarray], leaf: Any) -> np.ndarray:
    return _unit(np.asarray(state["vq._codebook.embed"]))


TABLE = (
    *patch_rules("", ""),
    *(Rule(f"params/spatial_bias/{bias}", name) for bias, name in BIAS),
    *transformer_rules("encoder_space", "enc_spatial_transformer"),
    *transformer_rules("encoder_time", "enc_temporal_transformer"),
    *transformer_rules("decoder_time", "dec_temporal_transformer"),
    *transformer_rules("decoder_space", "dec_spatial_transformer"),
    Rule(r"params/to_codes/\w+", "vq.project_in.{leaf}"),
    Rule(r"params/from_codes/\w+", "vq.project_out.{leaf}"),
    Rule("codebook/bottleneck/codes", "vq._codebook.embed", Transform(_unit, lambda a: a[None])),
    Rule("codebook/bottleneck/cluster_size", "vq._codebook.cluster_size", squeeze(0), absent=_ones),
    Rule("codebook/bottleneck/embed_avg", "vq._codebook.embed_avg", squeeze(0), absent=_codes),
    Rule("codebook/bottleneck/initialised", None, absent=_ones),
)
IGNORE = (
    *UNUSED,
    # Constants of the quantizers.
    r"vq\.(mask|zero|codebook|_codebook\.initted)",
    # Networks of training.
    r"(discr|vgg)\..*",
)

_DEFAULTS = {
    "dim": None,
    "codebook_size": None,
    "image_size": None,
    "patch_size": None,
    "temporal_patch_size": None,
    "spatial_depth": None,
    "temporal_depth": None,
    "dim_head": 64,
    "heads": 8,
    "channels": 3,
    "lookup_free_quantization": True,
    "lookup_free_quantization_kwargs": {},
}
# Of training; the last two are rates of dropout.
_TRAINING = (
    "discr_base_dim",
    "discr_attn_res_layers",
    "use_hinge_loss",
    "use_vgg_and_gan",
    "vgg",
    "attn_dropout",
    "ff_dropout",
)


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields from the arguments of ``CViViT(...)``.

    Raises:
      ValueError: for an argument or value that the model does not know, and for a missing argument.
    """
    for key in config:
        if key not in _DEFAULTS and key not in _TRAINING:
            raise errors.unknown("argument of CViViT", key, [*_DEFAULTS, *_TRAINING])
    for key, default in _DEFAULTS.items():
        if default is None and key not in config:
            raise ValueError(f"the arguments of CViViT lack {key!r}; they have: {', '.join(sorted(config))}.")
    found = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    for key in ("attn_dropout", "ff_dropout"):
        if config.get(key, 0.0):
            raise ValueError(f"{key}={config[key]!r} is not supported. Accepted: 0.0.")
    if found["lookup_free_quantization_kwargs"]:
        raise ValueError(
            f"lookup_free_quantization_kwargs={found['lookup_free_quantization_kwargs']!r} is not supported. "
            "Accepted: {}."
        )
    height, width = _pair(found["patch_size"])
    for size, patch in zip(_pair(found["image_size"]), (height, width), strict=True):
        if size % patch:
            raise ValueError(f"patch_size={found['patch_size']!r} must divide image_size={found['image_size']!r}.")
    return {
        **_bottleneck(found),
        "patch": (found["temporal_patch_size"], height, width),
        "width": found["dim"],
        "spatial_depth": found["spatial_depth"],
        "temporal_depth": found["temporal_depth"],
        "heads": found["heads"],
        "head_dim": found["dim_head"],
        "channels": found["channels"],
        "layout": "scrambled",
    }


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _bottleneck(found: Mapping[str, Any]) -> dict[str, Any]:
    size, width = found["codebook_size"], found["dim"]
    if not found["lookup_free_quantization"]:
        table = {"name": "vq", "codebook_size": size, "code_dim": width, "distance": "cosine", "learning": "ema"}
        return {"bottleneck": table | {"decay": 0.8}, "latent_channels": width}
    bits = size.bit_length() - 1
    if size != 2**bits:
        raise ValueError(f"codebook_size={size} of lookup-free quantization must be a power of two.")
    lfq = {"name": "lfq", "bits": bits, "bit_order": "big", "entropy": "clamped"}
    return {"bottleneck": lfq, "latent_channels": bits}
