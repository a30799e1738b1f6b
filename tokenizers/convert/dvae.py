"""Official weights of `tokenizers/models/dvae.py`: two files with the same names in them, so they are joined first.

state = merged(read_state_dict("encoder.pkl"), read_state_dict("decoder.pkl"))  # convert/files.py reads the modules
tok = tokenizers.from_official("dvae", {}, state)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import errors
from .engine import Rule

_PLACES = (
    (r"params/(encoder|decoder)/(input)", r"\1.blocks.\2"),
    (r"params/(encoder|decoder)/output", r"\1.blocks.output.conv"),
    (r"params/(encoder|decoder)/(group_\d)_(block_\d+)/(id_path)", r"\1.blocks.\2.\3.\4"),
    (r"params/(encoder|decoder)/(group_\d)_(block_\d+)/(conv_\d)", r"\1.blocks.\2.\3.res_path.\4"),
)
TABLE = tuple(
    Rule(f"{ours}/{leaf}", f"{official}.{name}")
    for ours, official in _PLACES
    for leaf, name in (("kernel", "w"), ("bias", "b"))
)
IGNORE = ()

_ENCODER = {"n_hid": 256, "n_blk_per_group": 2, "input_channels": 3, "vocab_size": 8192}
_DECODER = {"n_init": 128, "n_hid": 256, "n_blk_per_group": 2, "output_channels": 3, "vocab_size": 8192}
_RUNTIME = ("device", "requires_grad", "use_mixed_precision")


def merged(encoder: Mapping[str, np.ndarray], decoder: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One state dict of the two published ones, their names prefixed ``encoder.`` and ``decoder.``."""
    parts = {"encoder": encoder, "decoder": decoder}
    return {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields from ``{"encoder": arguments, "decoder": arguments}``; what is absent is as released."""
    for name in config:
        if name not in ("encoder", "decoder"):
            raise errors.unknown("part of an official dvae config", name, ("encoder", "decoder"))
    encoder = _complete("encoder", config, _ENCODER)
    decoder = _complete("decoder", config, _DECODER)
    for name in ("n_hid", "n_blk_per_group", "vocab_size"):
        if encoder[name] != decoder[name]:
            raise errors.unknown(
                f"decoder.{name} beside encoder.{name}={encoder[name]}", decoder[name], [encoder[name]]
            )
    for name, channels in (
        ("input_channels", encoder["input_channels"]),
        ("output_channels", decoder["output_channels"]),
    ):
        if channels != 3:
            raise errors.unknown(name, channels, (3,))
    vocabulary = encoder["vocab_size"]
    return {
        "bottleneck": {
            "name": "gumbel",
            "codebook_size": vocabulary,
            "code_dim": None,
            "project": False,
            "hard": False,
        },
        "latent_channels": vocabulary,
        "hidden": encoder["n_hid"],
        "blocks": encoder["n_blk_per_group"],
        "embed": decoder["n_init"],
    }


def _complete(part: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get(part, {})
    for name in given:
        if name not in defaults and name not in _RUNTIME:
            raise errors.unknown(f"argument of the official {part}", name, [*defaults, *_RUNTIME])
    return {name: given.get(name, default) for name, default in defaults.items()}
