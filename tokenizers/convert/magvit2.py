"""Official weights of `tokenizers/models/magvit2.py`: Open-MAGVIT2's image and video tokenizers.

Weights of four networks go by the name of MAGVIT; `system_of` tells from a config which one it describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .compvis import check_keys, check_value, weight_averages
from .engine import Rule


def _table(conv: str) -> tuple[Rule, ...]:
    """``conv`` is what the name of a convolution is followed by: the video network wraps them."""
    coder, block = r"params/(encoder|decoder)/", r"(down|up)(\d+)_block(\d+)/"
    return (
        Rule(coder + r"(conv_in|conv_out)/\w+", rf"\1.\2{conv}.{{leaf}}"),
        Rule(coder + r"norm_out/\w+", r"\1.norm_out.{leaf}"),
        Rule(coder + block + r"shortcut/\w+", rf"\1.\2.\3.block.\4.nin_shortcut{conv}.{{leaf}}"),
        Rule(coder + block + r"(conv\d)/\w+", rf"\1.\2.\3.block.\4.\5{conv}.{{leaf}}"),
        Rule(coder + block + r"(norm\d)/\w+", r"\1.\2.\3.block.\4.\5.{leaf}"),
        Rule(coder + r"mid_block(\d+)/(conv\d)/\w+", rf"\1.mid_block.\2.\3{conv}.{{leaf}}"),
        Rule(coder + r"mid_block(\d+)/(norm\d)/\w+", r"\1.mid_block.\2.\3.{leaf}"),
        Rule(r"params/encoder/down(\d+)_downsample/\w+", rf"encoder.down.\1.downsample{conv}.{{leaf}}"),
        Rule(r"params/decoder/up(\d+)_upsample/conv/\w+", rf"decoder.up.\1.upsample.conv1{conv}.{{leaf}}"),
        Rule(r"params/decoder/up(\d+)_adaptive/(gamma|beta)/\w+", r"decoder.adaptive.\1.\2.{leaf}"),
    )


_WRAPPED = ".conv_1"
TABLE, _VIDEO = _table(""), _table(_WRAPPED)
# Training losses, and tables that the quantizer computes.
IGNORE = (r"loss\..*", r"quantize\.(mask|zero|codebook)")


def table_of(module: Any) -> tuple[Rule, ...]:
    """The table of a family."""
    return TABLE if module.family == "image" else _VIDEO


def official_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checkpoints hold moving averages beside the weights; all published figures are those of the averages."""
    return weight_averages(state_dict)


def fields_from_weights(module: Any, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Configs of the image and of the video network may look the same; the names of their weights do not."""
    wrapped = f"encoder.conv_in{_WRAPPED}.weight" in state_dict
    return {"family": "video"} | _times(module.multipliers) if wrapped and module.family == "image" else {}


def _times(multipliers: tuple[int, ...]) -> dict[str, Any]:
    # The rule of the authors' code.
    return {"time_levels": tuple(i for i, factor in enumerate(multipliers[:-1]) if factor != 1)}


# --------------------------------------------------------------------------------------------------------------- config

TRAINING = (
    "lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "learning_rate",
    "sample_minimization_weight", "batch_maximization_weight", "scheduler_type", "warmup_epochs", "min_learning_rate",
    "use_ema", "stage", "resume_lr", "lr_drop_epoch", "lr_drop_iter", "lr_drop_rate", "sche_type", "wpe", "wp", "wp0",
    "max_iter", "wp_iter",
)  # fmt: skip
_FACTORS = ("token_factorization", "factorized_bits")
_DDCONFIG = (
    "double_z", "z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks",
)  # fmt: skip


def init_args(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The constructor's arguments and the class ("" if not said): of a whole file, of its ``model``, or bare."""
    config = config.get("model", config)
    for key in ("init_args", "params"):
        if key in config:
            return config[key], str(config.get("class_path", config.get("target", "")))
    return config, ""


def system_of(config: Mapping[str, Any]) -> str:
    """Which of our systems a config belongs to: magvit2, ibq, magvit or magvit2_pytorch."""
    if "vqvae" in config or "filters" in config:
        return "magvit"
    found, name = init_args(config)
    if "ddconfig" in found:
        attends = "attn_resolutions" in found["ddconfig"]
        return "ibq" if attends or "beta" in found or ".IBQ." in name else "magvit2"
    if "layers" in found or "init_dim" in found:
        return "magvit2_pytorch"
    raise ValueError(
        f"a magvit2 config has 'ddconfig' (Open-MAGVIT2, IBQ), 'vqvae' (MAGVIT) or 'layers' (magvit2-pytorch); got "
        f"{sorted(found)}."
    )


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from the arguments of ``VQModel``, or from the YAML file that holds them."""
    found, name = init_args(config)
    what = "an Open-MAGVIT2 config"
    check_keys(what, found, ("ddconfig", "n_embed", "embed_dim", *TRAINING, *_FACTORS))
    network = found["ddconfig"]
    check_keys("ddconfig", network, _DDCONFIG)
    check_value("ddconfig", network, "double_z", (False,))
    if network["in_channels"] != network["out_ch"]:
        raise ValueError(f"in_channels={network['in_channels']} and out_ch={network['out_ch']} must be equal.")
    bits = network["z_channels"]
    if found["embed_dim"] != bits or found["n_embed"] != 2**bits:
        raise ValueError(
            f"z_channels={bits}, embed_dim={found['embed_dim']} and n_embed={found['n_embed']} do not fit: LFQ has one "
            "channel per bit, n_embed = 2^embed_dim, and nothing between it and the networks."
        )
    loss = found.get("lossconfig") or {}
    video = "video" in name or "video" in str(loss.get("target", loss.get("class_path", "")))
    multipliers = tuple(network["ch_mult"])
    return {
        "bottleneck": _bottleneck(found, bits),
        "latent_channels": bits,
        "pixel_channels": network["in_channels"],
        "channels": network["ch"],
        "multipliers": multipliers,
        "blocks": network["num_res_blocks"],
        **({"family": "video"} | _times(multipliers) if video else {}),
    }


def _bottleneck(found: Mapping[str, Any], bits: int) -> dict[str, Any]:
    if not found.get("token_factorization"):
        return {"name": "lfq", "bits": bits}
    factors = tuple(found.get("factorized_bits", (9, 9)))
    if len(factors) != 2 or sum(factors) != bits:
        raise ValueError(f"factorized_bits={list(factors)} must be two numbers whose sum is embed_dim={bits}.")
    return {"name": "lfq", "bits": bits, "factors": factors}
