"""Official weights of `tokenizers/models/cosmos.py` (NVIDIA/Cosmos-Tokenizer, nvidia-cosmos/cosmos-predict1).

The names are those of the networks, which TorchScript files (``autoencoder.jit``) keep; `official_names` brings a
``model.pt`` of Tokenize1 to them. The code of 0.1 stores three convolutions for every place where the video networks
might resample, whether or not they do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import pick, unknown
from .engine import Rule, dense_from_conv

_WORDS = {
    "shortcut": "nin_shortcut",
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "proj_out",
    "spatial": "0",
    "temporal": "1",
    "kernel": "weight",
    "scale": "weight",
}


def _image_name(match: re.Match) -> str:
    """``down_0_block_1/conv1/kernel`` of the encoder as ``encoder.down.0.block.1.conv1.weight``."""
    half, (place, *inside) = match["half"], match["path"].split("/")
    place = re.sub(r"(down|up)_(\d+)_([a-z]+)(?:_(\d+))?", r"\1.\2.\3.\4", place).rstrip(".").replace("mid_", "mid.")
    inside = [_WORDS.get(word, word) for word in inside if word != "attention"]
    outside = [] if place.endswith("quant_conv") else [half]
    return ".".join([*outside, place, *inside])


def _video_name(match: re.Match) -> str:
    """Likewise; every convolution and norm of the video networks is wrapped in a module of its own."""
    module, leaf = _image_name(match).rsplit(".", 1)
    wrapped = "norm" if "norm" in module.rsplit(".", 1)[-1] else "conv3d"
    return f"{module}.{wrapped}.{leaf}"


_IMAGE, _VIDEO = r"params/image_(?P<half>encoder|decoder)/", r"params/(?:factorized|base)_(?P<half>encoder|decoder)/"
_ATTENTION = r"(?P<path>.+/attention/\w+/kernel)"

TABLE = (
    Rule(_IMAGE + _ATTENTION, _image_name, dense_from_conv(2)),
    Rule(_IMAGE + r"(?P<path>.+)", _image_name),
    Rule(_VIDEO + _ATTENTION, _video_name, dense_from_conv(3)),
    Rule(_VIDEO + r"(?P<path>.+)", _video_name),
)
IGNORE = (
    # Constants of the code.
    r"(encoder\.patcher|decoder\.unpatcher)(3d)?\.(wavelets|_arange|patch_size_buffer)",
    r"(inv_quant\.)?quantizer\.(layers\.\d+\.)?(_levels|_basis|implicit_codebook)",
    # Convolutions that are stored where nothing is resampled; where it is, the model asks for them.
    r"(encoder\.down\.\d+\.downsample|decoder\.up\.\d+\.upsample)\.conv[123]\.conv3d\.(weight|bias)",
)


def official_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names of a ``model.pt`` as those of the networks: its moving averages, else its weights. Others stay.

    It holds ``network.encoder.conv_in.weight`` and the average as ``ema.network-encoder-conv_in-weight``. The published
    TorchScript files were traced with the averages.
    """
    averages = {name: value for name, value in state_dict.items() if name.startswith("ema.network-")}
    rest = {name: value for name, value in state_dict.items() if name not in averages}
    if averages:
        rest = {name: value for name, value in rest.items() if not name.startswith("network.")}
    renamed = {name.removeprefix("network."): value for name, value in rest.items()}
    return renamed | {name.removeprefix("ema.network-").replace("-", "."): value for name, value in averages.items()}


def fields_from_weights(module: Any, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Fields of the model that differ in these weights: halves of two levels, whatever the config says.

    The code of 0.1 builds the CV decoder of temporal compression 4 with the multipliers (2, 4); the released CV4x8x8
    has them in the encoder, too. Later code follows its config.
    """
    changed = {}
    for half, levels in (("encoder", "down"), ("decoder", "up")):
        field = f"{half}_multipliers"
        found = [re.match(rf"{half}\.{levels}\.(\d+)\.", name) for name in state_dict]
        count = 1 + max((int(match[1]) for match in found if match), default=-1)
        if count == len(_TWO_LEVELS) < len(getattr(module, field)):
            changed[field] = _TWO_LEVELS
            attention = getattr(module, f"{half}_attention")
            changed[f"{half}_attention"] = tuple(level for level in attention if level < count)
    return changed


_TWO_LEVELS = (2, 4)


# --- configs ---------------------------------------------------------------------------------------------------------

# Names of configs (of inference, of training) by kind.
_NAMES = {
    "CI": "CI",
    "DI": "DI",
    "CV": "CV",
    "DV": "DV",
    "ContinuousImageTokenizer": "CI",
    "DiscreteImageTokenizer": "DI",
    "CausalContinuousVideoTokenizer": "CV",
    "CausalDiscreteVideoTokenizer": "DV",
    "CausalContinuousFactorizedVideoTokenizer": "CV",
    "CausalDiscreteFactorizedVideoTokenizer": "DV",
}
# ``persistent_quantizer`` says whether files hold the quantizer's constants, which are ignored in any case.
_KNOWN = {
    "name", "encoder", "decoder", "formulation", "quantizer", "channels", "channels_mult", "num_res_blocks",
    "attn_resolutions", "resolution", "dropout", "in_channels", "out_channels", "patch_size", "patch_method",
    "spatial_compression", "temporal_compression", "latent_channels", "z_channels", "z_factor", "num_groups",
    "legacy_mode", "embedding_dim", "levels", "num_quantizers", "persistent_quantizer",
}  # fmt: skip

# The one release whose weights need norms of one group although its published config does not say so
# (nvidia-cosmos/cosmos-predict1, pull request 128).
_ONE_GROUP = {
    "spatial_compression": 16,
    "patch_size": 2,
    "channels": 128,
    "channels_mult": (2, 4, 4),
    "num_res_blocks": 2,
    "z_channels": 256,
    "quantizer": "FSQ",
}


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields from the authors' config.

    Raises:
      ValueError: for a key or value that the model does not know, and for a missing key.
    """
    for key in config:
        if key not in _KNOWN:
            raise unknown("key of a Cosmos config", key, sorted(_KNOWN))
    discrete, video = (letter in pick("Cosmos tokenizer", _value(config, "name"), _NAMES) for letter in "DV")
    for key, only in (("dropout", 0.0), ("in_channels", 3), ("out_channels", 3)):
        if config.get(key, only) != only:
            raise ValueError(f"{key}={config[key]!r} is not supported. Accepted: {only}.")
    networks = {"FACTORIZED": "factorized", "BASE": "base"} if video else {"Default": "image"}
    encoder, decoder = (
        pick(f"Cosmos {half}", config.get(half, next(iter(networks))), networks) for half in ("encoder", "decoder")
    )
    multipliers = tuple(_value(config, "channels_mult"))
    schedules = {False: "late", True: "legacy"}
    return {
        **(_discrete(config) if discrete else _continuous(config)),
        "network": encoder,
        "decoder_network": decoder,
        "compression": _compression(config, encoder, decoder),
        "patch": _value(config, "patch_size"),
        "patcher": _value(config, "patch_method"),
        "channels": _value(config, "channels"),
        "encoder_multipliers": multipliers,
        "decoder_multipliers": multipliers,
        "encoder_attention": _attention(config, encoder, decoder=False),
        "decoder_attention": _attention(config, decoder, decoder=True),
        "blocks": _value(config, "num_res_blocks"),
        "z_channels": _value(config, "z_channels"),
        "num_groups": config.get("num_groups", 1 if _needs_one_group(config) else 32),
        "schedule": pick("legacy_mode", config.get("legacy_mode", False), schedules),
    }


def _value(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise ValueError(f"the Cosmos config lacks {key!r}; it has: {', '.join(sorted(config))}.")
    return config[key]


def _compression(config: Mapping[str, Any], *networks: str) -> tuple[int, int]:
    if networks == ("base", "base"):
        return (1, 1)  # that network has only one
    time = 1 if networks[0] == "image" else _value(config, "temporal_compression")
    return (time, _value(config, "spatial_compression"))


def _continuous(config: Mapping[str, Any]) -> dict[str, Any]:
    formulations = {"AE": ("identity", 1), "VAE": ("gaussian", 2)}
    name, factor = pick("formulation", config.get("formulation", "AE"), formulations)
    _check_factor(config, factor)
    return {"bottleneck": {"name": name}, "latent_channels": _value(config, "latent_channels")}


def _discrete(config: Mapping[str, Any]) -> dict[str, Any]:
    levels, channels = tuple(_value(config, "levels")), _value(config, "embedding_dim")
    if channels != len(levels):
        raise ValueError(f"embedding_dim={channels} must be the number of levels, {len(levels)} ({levels}).")
    fsq = {"name": "fsq", "levels": levels}
    kinds = {
        "FSQ": fsq,
        "RESFSQ": {"name": "residual", "layers": (fsq,) * config.get("num_quantizers", 4)},
    }
    _check_factor(config, 1)
    return {"bottleneck": pick("quantizer", _value(config, "quantizer"), kinds), "latent_channels": channels}


def _check_factor(config: Mapping[str, Any], factor: int) -> None:
    if config.get("z_factor", 1) != factor:
        raise ValueError(f"z_factor={config.get('z_factor', 1)} does not fit this bottleneck. Accepted: {factor}.")


def _attention(config: Mapping[str, Any], network: str, *, decoder: bool) -> tuple[int, ...]:
    """Levels with attention: those whose nominal resolution is listed.

    The nominal resolution halves from level to level; in the image networks only where they resample, the decoder
    counting from a coarsest level that has been halved everywhere.
    """
    wanted, levels = _value(config, "attn_resolutions"), len(_value(config, "channels_mult"))
    if not wanted:
        return ()
    finest = _value(config, "resolution") // _value(config, "patch_size")
    coarsest = finest // 2 ** (levels - 1)
    steps = levels
    if network == "image":
        steps = (_value(config, "spatial_compression") // _value(config, "patch_size")).bit_length() - 1
    if decoder:
        nominal = [coarsest * 2 ** min(levels - 1 - level, steps) for level in range(levels)]
    else:
        nominal = [finest // 2 ** min(level, steps) for level in range(levels)]
    return tuple(level for level in range(levels) if nominal[level] in wanted)


def _needs_one_group(config: Mapping[str, Any]) -> bool:
    found = {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in config.items()}
    return _NAMES[config["name"]] == "DI" and all(found.get(key) == value for key, value in _ONE_GROUP.items())
