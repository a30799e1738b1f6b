"""Official weights of `tokenizers/models/vavae.py` (LightningDiT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .compvis import autoencoder_table, check_keys, check_value, network_fields, parameters

TABLE = autoencoder_table((), ())

# Of training: its loss with LPIPS and discriminator, and what aligns the latents with a foundation model.
IGNORE = (r"loss\..*", r"foundation_model\..*", r"linear_proj\..*")

_TRAINING = (
    "lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "use_vf", "reverse_proj",
    "proj_fix", "foundation",
)  # fmt: skip
# The defaults of the class that LightningDiT loads the tokenizer with; it is given embed_dim and ch_mult alone.
_DEFAULTS = {
    "double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 2, "attn_resolutions": (16,), "dropout": 0.0, "resamp_with_conv": True,
}  # fmt: skip
_CLASS = ("embed_dim", "z_channels", *_DEFAULTS)


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from the authors' training config (YAML or its parameters), or from the arguments of their tokenizer.

    The latter are ``{"embed_dim": 32, "ch_mult": [1, 1, 2, 2, 4]}``; z_channels is embed_dim there.
    """
    found, _ = parameters(config)
    if "ddconfig" in found:
        check_keys("a VA-VAE training config", found, ("ddconfig", "embed_dim", *_TRAINING))
        ddconfig = found["ddconfig"]
    else:
        # The file that weights come from; without a variational bottleneck it would be another network.
        check_keys("a VA-VAE config", found, (*_CLASS, "ckpt_path", "use_variational", "model_type"))
        check_value("a VA-VAE config", found, "use_variational", (True,))
        check_value("a VA-VAE config", found, "model_type", ("vavae",))
        given = {key: value for key, value in found.items() if key in _CLASS and key != "embed_dim"}
        ddconfig = {**_DEFAULTS, "z_channels": found["embed_dim"], **given}
    return network_fields(ddconfig, double_z=True) | {"latent_channels": found["embed_dim"]}
