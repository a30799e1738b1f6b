"""Official weights of `tokenizers/models/omnitokenizer.py` (FoundationVision/OmniTokenizer)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import errors
from .engine import Rule
from .vivit import LAYER, UNUSED, layer_name, patch_rules, transformer_rules


def _ones(match: re.Match, state: Mapping[str, np.ndarray], leaf: Any) -> np.ndarray:
    return np.ones(leaf.shape, leaf.dtype)


def _codes(match: re.Match, state: Mapping[str, np.ndarray], leaf: Any) -> np.ndarray:
    return np.asarray(state["codebook.embeddings"])


def _window_rules(ours: str, official: str) -> tuple[Rule, ...]:
    """Attention inside windows, in a `Transformer`."""
    layers = (
        ("bias", "relative_position_bias_table"),
        ("windows/qkv/kernel", "qkv.weight"),
        ("windows/out/kernel", "proj.weight"),
        ("windows/out/bias", "proj.bias"),
    )
    return tuple(
        Rule(f"params/{ours}/{LAYER}attention/{path}", layer_name(f"{official}.layers.{{number}}.1.{name}"))
        for path, name in layers
    )


TABLE = (
    *patch_rules("encoder.", "decoder."),
    *_window_rules("encoder_space", "encoder.enc_spatial_transformer"),
    *_window_rules("decoder_space", "decoder.dec_spatial_transformer"),
    *transformer_rules("encoder_space", "encoder.enc_spatial_transformer"),
    *transformer_rules("encoder_time", "encoder.enc_temporal_transformer"),
    *transformer_rules("decoder_time", "decoder.dec_temporal_transformer"),
    *transformer_rules("decoder_space", "decoder.dec_spatial_transformer"),
    Rule(r"params/to_codes/\w+", "pre_vq_conv.1.{leaf}"),
    Rule(r"params/from_codes/\w+", "post_vq_conv.1.{leaf}"),
    Rule("codebook/bottleneck/codes", "codebook.embeddings"),
    Rule("codebook/bottleneck/cluster_size", "codebook.N", absent=_ones),
    Rule("codebook/bottleneck/embed_avg", "codebook.z_avg", absent=_codes),
    Rule("codebook/bottleneck/initialised", None, absent=_ones),
)
IGNORE = (
    *UNUSED,
    r".*\.relative_position_index",
    # Biases that are computed and dropped: all over time, and those over space where attention is fused.
    r".*\.spatial_rel_pos_bias\.net\..*",
    # A VAE has the codebook of the stage before; its usage is for the log.
    r"codebook\.(embeddings|N|z_avg|codebook_usage)",
    # Networks of training.
    r"(image_discriminator|video_discriminator|perceptual_model)\..*",
)

_REQUIRED = (
    "patch_size", "temporal_patch_size", "temporal_depth", "embedding_dim", "enc_block", "dec_block",
    "twod_window_size", "dim_head", "heads", "spatial_pos", "n_codes", "codebook_dim",
)  # fmt: skip
# What the network does not know in any other way, and what it is without the flag.
_FIXED = {
    "patch_embed": "linear",
    "use_external_codebook": False,
    "ff_mult": 4.0,
    "attn_dropout": 0.0,
    "ff_dropout": 0.0,
}
_FLAGS = {
    "causal_in_temporal_transformer": False,
    "causal_in_peg": False,
    "l2_code": False,
    "use_vae": False,
    "defer_temporal_pool": False,
    "defer_spatial_pool": False,
    "no_random_restart": False,
    "restart_thres": 1.0,
    # Not one of their arguments: their code fuses attention, and drops its biases, where PyTorch is 2.1 or later.
    "sdpa": True,
}
# Of the loss, the discriminators, the data and the run. The number of layers over space is that of their letters.
_TRAINING = (
    "spatial_depth", "resolution", "sequence_length", "image_channels", "norm_type", "padding_type", "disc_channels",
    "disc_layers", "disc_loss_type", "discriminator_iter_start", "disloss_check_thres", "perceptual_weight",
    "image_gan_weight", "video_gan_weight", "gan_feat_weight", "l1_weight", "kl_weight", "commitment_weight",
    "recon_loss_type", "logitslaplace_weight", "apply_noise", "apply_blur", "apply_diffaug", "apply_allframes",
    "resolution_scale", "grad_clip_val", "grad_clip_val_disc", "grad_accumulates", "force_alternation", "lr", "lr_min",
    "warmup_steps", "warmup_lr_init", "dis_lr_multiplier", "dis_minlr_multiplier", "dis_warmup_steps", "max_steps",
    "initialize_vit", "init_vgen", "init_idis", "init_vdis", "no_init_idis",
)  # fmt: skip
# Saved arguments of the released files spell it so.
_MISSPELT = {"casual_in_temporal_transformer": "causal_in_temporal_transformer"}


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields from the authors' command line arguments, and ``sdpa`` for the code they ran in.

    Raises:
      ValueError: for an argument or value that the model does not know, and for a missing argument.
    """
    config = {_MISSPELT.get(key, key): value for key, value in config.items()}
    known = [*_REQUIRED, *_FIXED, *_FLAGS, *_TRAINING]
    for key in config:
        if key not in known:
            raise errors.unknown("argument of OmniTokenizer", key, known)
    for key in _REQUIRED:
        if key not in config:
            raise ValueError(f"the arguments of OmniTokenizer lack {key!r}; they have: {', '.join(sorted(config))}.")
    for key, only in _FIXED.items():
        if config.get(key, only) != only:
            raise errors.unknown(key, config[key], (only,))
    found = _FLAGS | config
    spatial, temporal = _positions(found)
    side = found["patch_size"]
    return {
        **_bottleneck(found),
        "patch": (found["temporal_patch_size"], side, side),
        "pool": (1 + bool(found["defer_temporal_pool"]), 1 + bool(found["defer_spatial_pool"])),
        "width": found["embedding_dim"],
        "encoder_blocks": _blocks(found, "enc_block"),
        "decoder_blocks": _blocks(found, "dec_block"),
        "temporal_depth": found["temporal_depth"],
        "heads": found["heads"],
        "head_dim": found["dim_head"],
        "window": found["twod_window_size"],
        "spatial_positions": spatial,
        "temporal_positions": temporal,
        "causal_attention": bool(found["causal_in_temporal_transformer"]),
        "causal_positions": bool(found["causal_in_peg"]),
        "layout": "scrambled",
    }


def _blocks(found: Mapping[str, Any], key: str) -> str:
    for letter in found[key]:
        if letter not in "tw":
            raise errors.unknown(f"letter of {key}={found[key]!r}", letter, ("t", "w"))
    return found[key]


def _positions(found: Mapping[str, Any]) -> tuple[str, str]:
    """How positions are told over space and over time."""
    biased = errors.pick("spatial_pos", found["spatial_pos"], {"rope": ("rotary", "rotary"), "rel": ("none", "bias")})
    # Without the mask that comes with it there is no bias over time either.
    alibi = not found["sdpa"] and found["causal_in_temporal_transformer"]
    return biased[not found["sdpa"]], "alibi" if alibi else "none"


def _bottleneck(found: Mapping[str, Any]) -> dict[str, Any]:
    channels = found["codebook_dim"]
    if found["use_vae"]:
        return {"bottleneck": {"name": "gaussian"}, "latent_channels": channels, "unit_codes": False}
    table = {"name": "vq", "codebook_size": found["n_codes"], "code_dim": channels, "learning": "ema", "epsilon": 1e-7}
    if not found["no_random_restart"]:
        table["dead_code_threshold"] = float(found["restart_thres"])
    return {"bottleneck": table, "latent_channels": channels, "unit_codes": bool(found["l2_code"])}
