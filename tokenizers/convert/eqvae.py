"""Official weights of `tokenizers/models/eqvae.py`, in the names of latent-diffusion or of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import ldm_kl
from .compvis import is_diffusers, parameters

TABLE, IGNORE = ldm_kl.TABLE, ldm_kl.IGNORE

# Of the regularization in training; the authors' code never reads the second.
_TRAINING = ("anisotropic", "uniform_sample_scale", "p_prior", "p_prior_s")


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from diffusers' ``config.json`` or the authors' training config (YAML or its parameters)."""
    if is_diffusers(config):
        return ldm_kl.fields_from_official(config)
    found, _ = parameters(config)
    network = {key: value for key, value in found.items() if key not in _TRAINING}
    # The authors' generators see latents with Stable Diffusion's factor; the training config does not say it.
    return ldm_kl.fields_from_official(network) | {"scaling_factor": 0.18215}
