"""Official weights of `tokenizers/models/flux_vae.py`, in the names of diffusers or of the models' own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .compvis import autoencoder_table, check_keys, diffusers_fields, is_diffusers, network_fields
from .engine import Rule

IGNORE = (r"bn\.num_batches_tracked",)

_FLUX2 = ("batch_norm_eps", "batch_norm_momentum", "patch_size", "decoder_block_out_channels")
_ORIGINAL = (
    "resolution", "in_channels", "ch", "out_ch", "ch_mult", "num_res_blocks", "z_channels", "scale_factor",
    "shift_factor",
)  # fmt: skip


def TABLE(paths: Sequence[str], official: Sequence[str]) -> tuple[Rule, ...]:
    """The rules for the names of the file at hand, see `engine`."""
    return (
        *autoencoder_table(paths, official),
        Rule(r"batch_stats/patch_(mean|var)", r"bn.running_\1"),
    )


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from diffusers' ``config.json`` of ``AutoencoderKL(Flux2)``, or FLUX.1's own ``AutoEncoderParams``."""
    if not is_diffusers(config):
        check_keys("an AutoEncoderParams config", config, _ORIGINAL)
        network = {key: config[key] for key in _ORIGINAL[:-2]}
        fields = network_fields(network | {"double_z": True, "attn_resolutions": ()}, double_z=True)
        # These have neither 1x1 convolutions nor average pooling.
        fields = {key: value for key, value in fields.items() if key not in ("z_channels", "resample_conv")}
        return fields | {
            "latent_channels": config["z_channels"],
            "scaling_factor": config["scale_factor"],
            "shift_factor": config["shift_factor"],
        }
    fields = diffusers_fields(config, more_keys=_FLUX2)
    narrow = config.get("decoder_block_out_channels")
    if narrow is not None:
        if len(narrow) != len(fields["widths"]):
            raise ValueError(f"decoder_block_out_channels {tuple(narrow)} needs {len(fields['widths'])} entries.")
        fields["decoder_widths"] = tuple(narrow)
    if "patch_size" not in config:
        return fields
    return fields | {
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "patch_norm": tuple(config["patch_size"]),
        "patch_norm_epsilon": config.get("batch_norm_eps", 1e-4),
    }
