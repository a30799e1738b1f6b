"""Weights of `tokenizers/models/magvit.py` in the names of the authors' Flax code, joined by dots or slashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import errors
from .compvis import check_keys, check_value
from .engine import Rule
from .maskgit_vqgan import flax_table

IGNORE = ()


def TABLE(paths: Sequence[str], official: Sequence[str]) -> tuple[Rule, ...]:
    """Flax numbers the layers of one kind in the order of their use, see `engine`."""
    return tuple(flax_table(paths, ""))


def official_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Slashes, and no ``params`` in front."""
    return {name.replace(".", "/").removeprefix("params/"): value for name, value in state_dict.items()}


_NETWORK = (
    "architecture", "codebook_size", "filters", "num_enc_res_blocks", "num_dec_res_blocks", "channel_multipliers",
    "temporal_downsample", "embedding_dim", "conv_downsample", "deconv_upsample", "activation_fn", "norm_type",
    "latent_normalize",
)  # fmt: skip
# They change losses and memory, not what comes out.
_TRAINING = (
    "entropy_loss_ratio", "entropy_temperature", "entropy_loss_type", "entropy_loss_enlarge_ratio",
    "entropy_loss_enlarge_steps", "commitment_cost", "embedding_loss_ratio", "num_enc_remat_blocks",
    "num_dec_remat_blocks",
)  # fmt: skip


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from a config with ``vqvae`` in it, or from that part alone."""
    found, what = config.get("vqvae", config), "vqvae"
    check_keys(what, found, (*_NETWORK, *_TRAINING))
    for key, accepted in (
        ("architecture", "3dcnn"),
        ("conv_downsample", False),
        ("deconv_upsample", False),
        ("activation_fn", "swish"),
        ("norm_type", "GN"),
    ):
        check_value(what, found, key, (accepted,))
    codes, dim, factors = found["codebook_size"], found["embedding_dim"], tuple(found["channel_multipliers"])
    halved = tuple(found["temporal_downsample"])
    if len(halved) != len(factors) - 1:
        raise ValueError(
            f"temporal_downsample={list(halved)} must have one entry between any two levels of "
            f"channel_multipliers={list(factors)}."
        )
    distance = "direction" if found.get("latent_normalize", False) else "euclidean"
    bottleneck = {"name": "vq", "codebook_size": codes, "code_dim": dim, "distance": distance, "entropy": None}
    if found.get("entropy_loss_ratio", 0.0):
        forms = {"softmax": "smoothed", "argmax": "smoothed_argmax"}
        bottleneck["entropy"] = errors.pick("entropy_loss_type", found.get("entropy_loss_type", "softmax"), forms)
        bottleneck["inverse_temperature"] = 1.0 / found.get("entropy_temperature", 0.01)
    return {
        "bottleneck": bottleneck,
        "latent_channels": dim,
        "widths": tuple(found["filters"] * factor for factor in factors),
        "time_levels": tuple(level for level, time in enumerate(halved) if time),
        "encoder_blocks": found["num_enc_res_blocks"],
        "decoder_blocks": found["num_dec_res_blocks"],
    }
