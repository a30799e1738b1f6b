"""Official weights of `tokenizers/models/vidtok.py`: microsoft/VidTok, v1.0 and v1.1.

The two causal families have the same names and shapes: which one a file belongs to says its config alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import errors
from .engine import Rule, Transform, dense_from_conv

# Discriminator, LPIPS and log-variance of training; moving averages of parameters.
IGNORE = (r"loss\..*", r"model_ema\..*")

# (O, I, T) <-> (T, 1, 1, I, O)
_OVER_TIME = Transform(
    lambda a: a.transpose(2, 1, 0)[:, None, None],
    lambda a: np.squeeze(a, (1, 2)).transpose(2, 1, 0),
)
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "proj_out"}
_SIDES = (("encoder", "down", "downsample", "halve"), ("decoder", "up", "upsample", "double"))


def _rules(causal: bool, norm_type: str) -> tuple[Rule, ...]:
    """Causal convolutions and layer norms have a wrapper in the official code, and so a name more."""
    conv = ".conv" if causal else ""
    norm = ".norm" if norm_type == "layernorm" else ""
    middle, attention = r"params/(\w+)/middle_block(\d)", r"params/(\w+)/middle_attention"
    rules = [
        Rule(r"params/(\w+)/(conv_in|conv_out)/\w+", rf"\1.\2{conv}.{{leaf}}"),
        Rule(r"params/(\w+)/norm_out/\w+", rf"\1.norm_out{norm}.{{leaf}}"),
        Rule(rf"{middle}/(norm\d)/\w+", rf"\1.mid.block_\2.\3{norm}.{{leaf}}"),
        Rule(rf"{middle}/(conv\d)/\w+", rf"\1.mid.block_\2.\3{conv}.{{leaf}}"),
        Rule(rf"{attention}/norm/\w+", rf"\1.mid.attn_1.norm{norm}.{{leaf}}"),
        Rule(r"params/(project_in|project_out)/\w+", r"regularization.\1.{leaf}"),
    ]
    for ours, theirs in _ATTENTION.items():
        name = rf"\1.mid.attn_1.{theirs}{conv}"
        rules.append(Rule(rf"{attention}/attention/{ours}/kernel", f"{name}.weight", dense_from_conv(3)))
        rules.append(Rule(rf"{attention}/attention/{ours}/bias", f"{name}.bias"))
    for side, levels, sampler, verb in _SIDES:
        space, time = rf"params/{side}/level(\d)_space(\d)", rf"params/{side}/level(\d)_time(\d)"
        in_space, in_time = rf"{side}.{levels}.\1.block.\2", rf"{side}.{levels}_temporal.\1.block.\2"
        halved = rf"{side}.{levels}_temporal.\1.{sampler}"
        rules += [
            Rule(rf"{space}/(norm\d)/\w+", rf"{in_space}.\3{norm}.{{leaf}}"),
            Rule(rf"{space}/(conv\d)/\w+", rf"{in_space}.\3.{{leaf}}"),
            Rule(rf"{space}/shortcut/\w+", rf"{in_space}.nin_shortcut.{{leaf}}"),
            Rule(rf"{time}/(norm\d)/\w+", rf"{in_time}.\3{norm}.{{leaf}}"),
            Rule(rf"{time}/(conv\d)/kernel", rf"{in_time}.\3{conv}.weight", _OVER_TIME),
            Rule(rf"{time}/(conv\d)/bias", rf"{in_time}.\3{conv}.bias"),
            Rule(rf"params/{side}/level(\d)_{verb}_space/conv/\w+", rf"{side}.{levels}.\1.{sampler}.conv.{{leaf}}"),
            Rule(rf"params/{side}/level(\d)_{verb}_time/conv/\w+", rf"{halved}.conv{conv}.{{leaf}}"),
            Rule(rf"params/{side}/level(\d)_{verb}_time/mix", rf"{halved}.mix_factor"),
        ]
    return tuple(rules)


TABLE = _rules(causal=True, norm_type="layernorm")


def table_of(module) -> tuple[Rule, ...]:
    """The rules of a model whose names are other ones."""
    return _rules(module.spec.causal, module.norm)


# --- the authors' config ---------------------------------------------------------------------------------------------

# (engine, encoder, decoder) -> family. Anything else computes something else.
_MODULES = {
    ("autoencoder", "model_3dcausal.EncoderCausal3DPadding", "model_3dcausal.DecoderCausal3DPadding"): "causal",
    ("autoencoder", "model_3dnoncausal.Encoder3D", "model_3dnoncausal.Decoder3D"): "noncausal",
    (
        "autoencoder_v1_1",
        "model_3dcausal_v1_1.EncoderCausal3DPadding",
        "model_3dcausal_v1_1.DecoderCausal3DPadding",
    ): "causal-v1.1",
}
_INTERPOLATIONS = {"trilinear": "causal-v1.1", "nearest": "causal-v1.1-nearest"}
# Values that the model has no other way for, by key of the network's parameters.
_ONLY = {"in_channels": (3,), "out_ch": (3,), "dropout": (0.0,), "init_pad_mode": ("replicate",)}
_NETWORK = (
    "double_z", "z_channels", "ch", "ch_mult", "num_res_blocks", "time_downsample_factor", "norm_type",
    "use_checkpoint", "fix_encoder", "fix_decoder", "spatial_ds", "spatial_us", "tempo_ds", "tempo_us",
    "interpolation_mode", *_ONLY,
)  # fmt: skip
_FSQ = (
    "levels", "dim", "num_codebooks", "entropy_loss_weight", "entropy_loss_annealing_steps",
    "entropy_loss_annealing_factor", "commitment_loss_weight", "diversity_gamma",
)  # fmt: skip


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields from the authors' config.

    Args:
      config: the block ``model`` of their yaml file, or the whole file. ``params`` of the decoder may still be yaml's
        reference to the encoder's.

    Raises:
      ValueError: for a class, key or value that the model does not have.
    """
    config = config.get("model", config)
    engine = config["params"]
    if engine.get("use_tiling", False):
        raise ValueError("use_tiling=True is no property of a model: see `tokenizers.evaluate.temporal_tiles`.")
    parts = engine["encoder_config"], engine["decoder_config"]
    network, decoder = (_parameters(part, parts[0]) for part in parts)
    if network != decoder:
        raise ValueError(
            f"encoder and decoder must have the same params; they differ in {_differing(network, decoder)}."
        )
    family = _family(config["target"], *(part["target"] for part in parts))
    if family == "causal-v1.1":
        mode = network.get("interpolation_mode", "nearest")
        family = errors.pick("interpolation_mode", mode, _INTERPOLATIONS)
    levels = len(network["ch_mult"])
    bottleneck, z_per_channel = _bottleneck(engine["regularizer_config"])
    if network.get("double_z", True) != (z_per_channel == 2):
        raise ValueError(f"double_z={network.get('double_z', True)} does not fit {bottleneck['name']}.")
    fields = {
        "bottleneck": bottleneck,
        "latent_channels": network["z_channels"],
        "time": family,
        "channels": network["ch"],
        "multipliers": tuple(network["ch_mult"]),
        "blocks": network["num_res_blocks"],
        "norm": errors.pick("norm_type", network.get("norm_type", "layernorm"), _NORMS),
        "remat": bool(network.get("use_checkpoint", False)),
    }
    return fields | _sampling(network, levels, family)


_NORMS = {"layernorm": "layernorm", "groupnorm": "groupnorm"}


def _family(*targets: str) -> str:
    found = tuple(re.sub(r"^vidtok\.(models|modules)\.", "", target) for target in targets)
    found = (found[0].removesuffix(".AutoencodingEngine"), *found[1:])
    return errors.pick("engine, encoder and decoder", found, _MODULES)


def _parameters(part: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
    params = part["params"]
    if isinstance(params, str) and params.startswith("${") and params.endswith("encoder_config.params}"):
        params = encoder["params"]
    for key, value in params.items():
        if key not in _NETWORK:
            raise errors.unknown("key of the network's params", key, _NETWORK)
        if key in _ONLY and value not in _ONLY[key]:
            raise errors.unknown(key, value, _ONLY[key])
    return dict(params)


def _differing(a: Mapping, b: Mapping) -> str:
    return ", ".join(sorted(key for key in {*a, *b} if a.get(key) != b.get(key)))


def _sampling(network: Mapping[str, Any], levels: int, family: str) -> dict[str, tuple[int, ...]]:
    """Levels that change height and width, and those of them that change time as well."""
    given = {} if family == "noncausal" else network  # which has no other ones than these
    space_down = tuple(given.get("spatial_ds") or range(levels - 1))
    space_up = tuple(given.get("spatial_us") or range(1, levels))
    time_down = given.get("tempo_ds") or (levels - 2, levels - 3)
    time_up = given.get("tempo_us") or (1, 2)
    found = {
        "space_down": space_down,
        "space_up": space_up,
        "time_down": tuple(sorted(set(time_down) & set(space_down))),
        "time_up": tuple(sorted(set(time_up) & set(space_up))),
    }
    factor = 2 ** len(found["time_down"])
    if factor != given.get("time_downsample_factor", factor) or len(found["time_up"]) != len(found["time_down"]):
        raise ValueError(
            f"time_downsample_factor={network.get('time_downsample_factor')} does not fit the levels that halve and "
            f"double time, {found['time_down']} and {found['time_up']}."
        )
    if len(space_up) != len(space_down):
        raise ValueError(f"spatial_ds={space_down} and spatial_us={space_up} must be as many.")
    return found


def _bottleneck(config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Its fields, and channels of z for each latent channel."""
    kinds = {"DiagonalGaussianRegularizer": ("sample",), "FSQRegularizer": _FSQ}
    kind = config["target"].rsplit(".", 1)[-1]
    accepted = errors.pick("regularizer", kind, kinds)
    params = config.get("params") or {}
    for key in params:
        if key not in accepted:
            raise errors.unknown(f"key of {kind}'s params", key, accepted)
    only = {"sample": (True,), "num_codebooks": (1,), "diversity_gamma": (1, 1.0)}
    for key, values in only.items():
        if key in params and params[key] not in values:
            raise errors.unknown(key, params[key], values)
    if kind == "DiagonalGaussianRegularizer":
        return {"name": "gaussian"}, 2
    return {
        "name": "fsq",
        "levels": tuple(params["levels"]),
        "entropy": "clamped" if params.get("entropy_loss_weight", 0.0) else None,
        "commitment": bool(params.get("commitment_loss_weight", 0.0)),
    }, 1
