"""Official weights of `tokenizers/models/vqgan.py`: taming-transformers, and the VQ models of latent-diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import ar_prior
from .compvis import autoencoder_table, check_keys, check_value, network_fields, parameters
from .engine import Rule, dense_from_conv

TABLE = (
    *autoencoder_table((), ()),
    Rule(r"params/bottleneck/codebook", "quantize.embedding.weight"),
    Rule(r"params/bottleneck/proj/kernel", "quantize.proj.weight", dense_from_conv(2)),
    Rule(r"params/bottleneck/proj/bias", "quantize.proj.bias"),
    Rule(r"params/bottleneck/embedding", "quantize.embed.weight"),
)

# The training loss, latent-diffusion's weight averages, and the random colours in which segmentations are shown.
IGNORE = (r"loss\..*", r"model_ema\..*", r"colorize")

# Of training and logging only; they change no weight and no output.
_TRAINING = (
    "lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "batch_resize_range",
    "scheduler_config", "lr_g_factor", "use_ema", "sane_index_shape",
)  # fmt: skip
_GUMBEL = ("kl_weight", "temperature_scheduler_config")


def system_of(config: Mapping[str, Any]) -> str:
    """``vqgan``, or ``ar_prior`` for the transformer of the second stage."""
    return "ar_prior" if ar_prior.describes(config) else "vqgan"


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from the parameters of ``VQModel`` or ``GumbelVQ``, or from the YAML file that holds them."""
    found, name = parameters(config)
    gumbel = name == "GumbelVQ" or any(key in found for key in _GUMBEL)
    check_keys("a VQGAN config", found, ("ddconfig", "n_embed", "embed_dim", "remap", *_TRAINING, *_GUMBEL))
    check_value("a VQGAN config", found, "remap", (None,))
    fields = network_fields(found["ddconfig"], double_z=False)
    codes, dim = found["n_embed"], found["embed_dim"]
    if not gumbel:
        return fields | {
            "bottleneck": {"name": "vq", "codebook_size": codes, "code_dim": dim},
            "latent_channels": dim,
        }
    if dim != fields["z_channels"]:
        raise ValueError(
            f"embed_dim={dim} of GumbelVQ must equal z_channels={fields['z_channels']}: its projection to logits is "
            "built for z_channels and reads embed_dim."
        )
    bottleneck = {"name": "gumbel", "codebook_size": codes, "code_dim": dim, "project": True, "hard": True}
    return fields | {"bottleneck": bottleneck, "latent_channels": dim}
