"""Official weights of `tokenizers/generators/minigpt.py`: ``GPT`` and ``Net2NetTransformer`` of taming-transformers.

A ``Net2NetTransformer`` holds the tokenizer as well, `first_stage` takes it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import errors
from .compvis import check_value, parameters
from .engine import Rule, squeeze

_LAYER = r"params/layers/(\d+)/"
TABLE = (
    Rule("params/token/embedding", "tok_emb.weight"),
    Rule("params/positions", "pos_emb", squeeze(0)),
    Rule(_LAYER + r"norm([12])/\w+", r"blocks.\1.ln\2.{leaf}"),
    Rule(_LAYER + r"attention/(query|key|value)/\w+", r"blocks.\1.attn.\2.{leaf}"),
    Rule(_LAYER + r"attention/out/\w+", r"blocks.\1.attn.proj.{leaf}"),
    Rule(_LAYER + r"mlp/fc1/\w+", r"blocks.\1.mlp.0.{leaf}"),
    Rule(_LAYER + r"mlp/fc2/\w+", r"blocks.\1.mlp.2.{leaf}"),
    Rule(r"params/norm_out/\w+", "ln_f.{leaf}"),
    Rule(r"params/logits/kernel", "head.weight"),
)
# Masks and orders, which are computed, and the other networks of a Net2NetTransformer.
IGNORE = (r"blocks\.\d+\.attn\.mask", r"permuter\..*", r"first_stage_model\..*", r"cond_stage_model\..*")

_GPT = {
    "vocab_size": None,
    "block_size": None,
    "n_layer": 12,
    "n_head": 8,
    "n_embd": 256,
    "n_unmasked": 0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_NET2NET = {
    "transformer_config": None,
    "first_stage_config": None,
    "cond_stage_config": None,
    "permuter_config": None,
    "pkeep": 1.0,
    "sos_token": 0,
    "unconditional": False,
}
# Where training and logging find things; how a condition becomes the tokens that are given here.
_OUTSIDE = ("ckpt_path", "ignore_keys", "first_stage_key", "cond_stage_key", "downsample_cond_size")

# The authors' classes and our names; all but the first take the size of the grid.
_ORDERS = {
    "Identity": "raster",
    "Subsample": "subsample",
    "ZCurve": "z_curve",
    "SpiralOut": "spiral_out",
    "SpiralIn": "spiral_in",
    "Random": "random",
    "AlternateParsing": "alternate",
}
_UNCONDITIONAL = "__is_unconditional__"


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a config of taming-transformers is that of a transformer and not of its first stage."""
    found, _ = parameters(config)
    return "vocab_size" in found or "transformer_config" in found


def official_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The transformer's own names, without those of the class that holds it."""
    return {name.removeprefix("transformer."): value for name, value in state_dict.items()}


def first_stage(
    config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray]
) -> tuple[Mapping[str, Any], dict[str, np.ndarray]]:
    """Config and weights of the tokenizer in a ``Net2NetTransformer``, for ``from_official("vqgan", ...)``."""
    part, prefix = parameters(config)[0]["first_stage_config"], "first_stage_model."
    found = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    return part["params"], found


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from the arguments of ``GPT`` or ``Net2NetTransformer``, or from the YAML file that holds them."""
    config, _ = parameters(config)
    if "transformer_config" not in config:
        return _gpt(config)
    found = _checked("a Net2NetTransformer config", config, _NET2NET, _OUTSIDE)
    fields = _gpt(found["transformer_config"]["params"]) | {"keep": float(found["pkeep"])}
    fields["grid"] = _grid(found["first_stage_config"]["params"])
    if found["permuter_config"] is not None:
        name, size = _named(found["permuter_config"])
        fields["order"] = errors.pick("permuter", name, _ORDERS)
        if size and (size["H"], size["W"]) != fields["grid"]:
            fields["grid"] = (size["H"], size["W"])
    condition = found["cond_stage_config"]
    if found["unconditional"] or condition == _UNCONDITIONAL:
        return fields | {"start": int(found["sos_token"])}
    if isinstance(condition, Mapping) and _named(condition)[0] == "Labelator":
        return fields | {"classes": _named(condition)[1]["n_classes"]}
    return fields | {"start": None}  # the tokens of something else


def _gpt(config: Mapping[str, Any]) -> dict[str, Any]:
    found = _checked("a GPT config", config, _GPT)
    for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
        check_value("a GPT config", found, name, (0.0,))
    return {
        "vocabulary": found["vocab_size"],
        "block": found["block_size"],
        "size": (found["n_layer"], found["n_embd"], found["n_head"]),
        "unmasked": found["n_unmasked"],
    }


def _grid(config: Mapping[str, Any]) -> tuple[int, int]:
    network = config["ddconfig"]
    side = network["resolution"] // 2 ** (len(network["ch_mult"]) - 1)
    return side, side


def _checked(what: str, config: Mapping[str, Any], known: Mapping[str, Any], outside=()) -> dict[str, Any]:
    for key in config:
        if key not in known and key not in outside:
            raise errors.unknown(f"key of {what}", key, [*known, *outside])
    found = {key: config.get(key, default) for key, default in known.items()}
    lacking = [key for key, value in found.items() if value is None and key != "permuter_config"]
    if lacking:
        raise ValueError(f"{what} lacks {', '.join(lacking)}; it has: {', '.join(sorted(config))}.")
    return found


def _named(part: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(last part of the class's name, its arguments)."""
    return part["target"].rsplit(".", 1)[-1], part.get("params") or {}
