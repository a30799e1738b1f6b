"""Official weights of `tokenizers/models/ldm_kl.py`, in the names of latent-diffusion or of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .compvis import autoencoder_table, check_keys, diffusers_fields, is_diffusers, network_fields, parameters

TABLE = autoencoder_table

# The training loss, weight averages, the random colours in which segmentations are shown, and what LightningDiT's copy
# of the class aligns the latents with.
IGNORE = (r"loss\..*", r"model_ema\..*", r"colorize", r"foundation_model\..*", r"linear_proj\..*")

# Of training and logging only; they change no weight and no output.
_TRAINING = (
    "lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "use_vf", "reverse_proj",
    "proj_fix",
)  # fmt: skip


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from diffusers' ``config.json``, or latent-diffusion's ``AutoencoderKL`` (YAML or parameters)."""
    if is_diffusers(config):
        return diffusers_fields(config)
    found, _ = parameters(config)
    check_keys("an AutoencoderKL config", found, ("ddconfig", "embed_dim", *_TRAINING))
    return network_fields(found["ddconfig"], double_z=True) | {
        "latent_channels": found["embed_dim"],
        "tile_size": found["ddconfig"]["resolution"],
    }
