"""Official weights of `tokenizers/models/ibq.py` (SEED-Voken's `src/IBQ`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .compvis import autoencoder_table, check_keys, check_value, network_fields, weight_averages
from .engine import Rule
from .magvit2 import TRAINING, init_args

TABLE = (*autoencoder_table((), ()), Rule(r"params/bottleneck/codebook", "quantize.embedding.weight"))
IGNORE = (r"loss\..*",)

# The first two change nothing in the authors' code: ``l2_normalize`` goes to the quantizer of the parent class, which
# theirs replaces, and nobody reads ``cosine_similarity``.
_QUANTIZER = ("l2_normalize", "cosine_similarity", "use_entropy_loss", "entropy_temperature", "beta")


def official_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checkpoints hold moving averages beside the weights; all published figures are those of the averages."""
    return weight_averages(state_dict)


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from the arguments of ``IBQ``, or from the YAML file that holds them."""
    found, _ = init_args(config)
    what = "an IBQ config"
    check_keys(what, found, ("ddconfig", "n_embed", "embed_dim", "remap", "sane_index_shape", *_QUANTIZER, *TRAINING))
    check_value(what, found, "remap", (None,))
    temperature = found.get("entropy_temperature", 0.01)
    bottleneck = {
        "name": "ibq",
        "codebook_size": found["n_embed"],
        "code_dim": found["embed_dim"],
        "entropy": "smoothed" if found.get("use_entropy_loss", False) else None,
        "inverse_temperature": 1.0 / temperature,
    }
    return network_fields(found["ddconfig"], double_z=False) | {
        "bottleneck": bottleneck,
        "latent_channels": found["embed_dim"],
    }
