"""Official weights of `tokenizers/models/maskgit_vqgan.py`: the JAX original's and those of its PyTorch port."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .compvis import check_keys, check_value
from .engine import Rule, identity

IGNORE = ()

_PYTORCH = (
    Rule(r"params/(encoder|decoder)/(conv_in|norm_out|conv_out)/\w+", r"\1.\2.{leaf}"),
    Rule(r"params/(encoder|decoder)/(down|up)(\d+)_block(\d+)/shortcut/\w+", r"\1.\2.\3.block.\4.nin_shortcut.{leaf}"),
    Rule(r"params/(encoder|decoder)/(down|up)(\d+)_block(\d+)/(\w+)/\w+", r"\1.\2.\3.block.\4.\5.{leaf}"),
    Rule(r"params/(encoder|decoder)/mid_block(\d+)/(\w+)/\w+", r"\1.mid.\2.\3.{leaf}"),
    Rule(r"params/decoder/up(\d+)_upsample/\w+", r"decoder.up.\1.upsample_conv.{leaf}"),
    Rule(r"params/bottleneck/(?:codebook|embedding)", "quantize.embedding.weight"),
)

# Flax counts the layers of one kind in the order of their use.
_LAYERS = {"norm1": "GroupNorm_0", "norm2": "GroupNorm_1", "conv1": "Conv_0", "conv2": "Conv_1", "shortcut": "Conv_2"}


def TABLE(paths: Sequence[str], official: Sequence[str]) -> tuple[Rule, ...]:
    """The rules for the names of the file at hand, see `engine`; Flax's have slashes."""
    if any("/" in name for name in official):
        prefix = "params/" if all(name.startswith("params/") for name in official) else ""
        return tuple(flax_table(paths, prefix))
    return _PYTORCH


def flax_table(paths: Sequence[str], prefix: str) -> list[Rule]:
    """Rules for the names of the authors' Flax modules, for MAGVIT's 3D networks as well."""
    levels = 1 + max(int(found[1]) for path in paths if (found := re.match(r"params/encoder/down(\d+)_", path)))
    blocks = {
        coder: 1 + max(int(found[1]) for path in paths if (found := re.match(rf"params/{coder}/mid_block(\d+)/", path)))
        for coder in ("encoder", "decoder")
    }
    order = {
        "encoder": [f"down{level}" for level in range(levels)] + ["mid"],
        "decoder": ["mid"] + [f"up{level}" for level in reversed(range(levels))],
    }
    convolutions = {
        "encoder": ["conv_in", "conv_out"],
        "decoder": ["conv_in", *(f"up{level}_upsample" for level in range(levels - 1, 0, -1)), "conv_out"],
    }
    # Kernels have our layout already.
    rules = [Rule("params/bottleneck/(?:codebook|embedding)", f"{prefix}quantizer/codebook")]
    for coder in order:
        places = [f"{place}_block{i}" for place in order[coder] for i in range(blocks[coder])]
        for number, place in enumerate(places):
            for ours, theirs in _LAYERS.items():
                here, there = f"params/{coder}/{place}/{ours}", f"{prefix}{coder}/ResBlock_{number}/{theirs}"
                rules.append(Rule(rf"{here}/(\w+)", there + r"/\1", identity))
        for number, place in enumerate(convolutions[coder]):
            rules.append(Rule(rf"params/{coder}/{place}/(\w+)", rf"{prefix}{coder}/Conv_{number}/\1", identity))
        rules.append(Rule(rf"params/{coder}/norm_out/(\w+)", rf"{prefix}{coder}/GroupNorm_0/\1", identity))
    return rules


_TORCH_NETWORK = (
    "channel_mult", "num_resolutions", "dropout", "hidden_channels", "num_channels", "num_res_blocks", "resolution",
    "z_channels",
)  # fmt: skip
_JAX_NETWORK = (
    "quantizer", "codebook_size", "entropy_loss_ratio", "entropy_temperature", "entropy_loss_type", "commitment_cost",
    "filters", "num_res_blocks", "channel_multipliers", "embedding_dim", "conv_downsample", "activation_fn",
    "norm_type",
)  # fmt: skip


_QUANTIZERS = {"vq": "vq", "gumbel": "gumbel_nearest"}


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from the port's two configs, or from the original's config with ``vqvae`` in it.

    The port: ``{"encoder_decoder": ..., "quantizer": ...}``; the original: ``{"vqvae": ...}`` or its ``vqvae`` alone.
    Where a config holds both, as ``{"jax": ..., "encoder_decoder": ...}``, they must say the same.
    """
    found = []
    if "encoder_decoder" in config:
        found.append(_from_torch(config["encoder_decoder"], config["quantizer"]))
    original = config.get("jax", config)
    if "vqvae" in original or "filters" in original:
        found.append(_from_jax(original.get("vqvae", original)))
    if not found:
        raise ValueError(
            f"a MaskGIT-VQGAN config has 'encoder_decoder' and 'quantizer', or 'vqvae'; got {sorted(config)}."
        )
    if found[0] != found[-1]:
        raise ValueError(f"the two configs describe different networks: {found[0]} and {found[-1]}.")
    return found[0]


def _from_torch(network: Mapping[str, Any], quantizer: Mapping[str, Any]) -> dict[str, Any]:
    check_keys("encoder_decoder", network, _TORCH_NETWORK)
    check_keys("quantizer", quantizer, ("num_embeddings", "embedding_dim", "commitment_cost"))
    check_value("encoder_decoder", network, "dropout", (0.0,))
    if network["num_resolutions"] != len(network["channel_mult"]):
        raise ValueError(
            f"num_resolutions={network['num_resolutions']} must be the number of levels in "
            f"channel_mult={network['channel_mult']}."
        )
    if network["z_channels"] != quantizer["embedding_dim"]:
        raise ValueError(
            f"z_channels={network['z_channels']} must equal embedding_dim={quantizer['embedding_dim']}: nothing is in "
            "between."
        )
    return _fields(
        network["hidden_channels"],
        network["channel_mult"],
        network["num_res_blocks"],
        quantizer["num_embeddings"],
        quantizer["embedding_dim"],
    ) | {"pixel_channels": network["num_channels"]}


def _from_jax(network: Mapping[str, Any]) -> dict[str, Any]:
    what = "vqvae"
    check_keys(what, network, _JAX_NETWORK)
    check_value(what, network, "quantizer", tuple(_QUANTIZERS))
    check_value(what, network, "conv_downsample", (False,))
    check_value(what, network, "activation_fn", ("swish",))
    check_value(what, network, "norm_type", ("GN",))
    return _fields(
        network["filters"],
        network["channel_multipliers"],
        network["num_res_blocks"],
        network["codebook_size"],
        network["embedding_dim"],
        _QUANTIZERS[network.get("quantizer", "vq")],
    ) | {"pixel_channels": 3}


def _fields(
    width: int, factors: Sequence[int], blocks: int, codes: int, dim: int, quantizer: str = "vq"
) -> dict[str, Any]:
    return {
        "bottleneck": {"name": quantizer, "codebook_size": codes, "code_dim": dim},
        "latent_channels": dim,
        "widths": tuple(width * factor for factor in factors),
        "blocks": blocks,
    }
