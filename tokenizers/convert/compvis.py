"""Names and configs of the CompVis autoencoders (taming-transformers, latent-diffusion) and of diffusers' copies.

Not a system of its own: the conversion files of VQGAN, the latent diffusion VAEs and their descendants build on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import errors
from .engine import Rule, Transform, dense_from_conv

# Our dense layers of an attention, and the authors': CompVis has 1x1 convolutions, diffusers dense layers, which its
# first releases (and the weight files of then) called otherwise.
_COMPVIS = {"query": "q", "key": "k", "value": "v", "out": "proj_out"}
_DIFFUSERS = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
_DIFFUSERS_OLD = {"query": "query", "key": "key", "value": "value", "out": "proj_attn"}

_dense_from_any = Transform(lambda a: a.reshape(a.shape[:2]).T, lambda a: a.T)


def coder_table(ours: str, official: str) -> tuple[Rule, ...]:
    """Rules of `nn.compvis.Encoder` or `Decoder` at a place of our tree, e.g. ``coder_table("encoder", "encoder")``."""
    here, there = rf"params/{ours}/", f"{official}."
    block, attn = r"(down|up)(\d+)_block(\d+)", r"(down|up)(\d+)_attn(\d+)"
    return (
        Rule(rf"{here}(conv_in|norm_out|conv_out)/\w+", there + r"\1.{leaf}"),
        Rule(rf"{here}{block}/shortcut/\w+", there + r"\1.\2.block.\3.nin_shortcut.{leaf}"),
        Rule(rf"{here}{block}/(\w+)/\w+", there + r"\1.\2.block.\3.\4.{leaf}"),
        Rule(rf"{here}{attn}/norm/\w+", there + r"\1.\2.attn.\3.norm.{leaf}"),
        *_attention(here + attn, there + r"\1.\2.attn.\3.", _COMPVIS, dense_from_conv(2)),
        Rule(rf"{here}(down|up)(\d+)_(downsample|upsample)/conv/\w+", there + r"\1.\2.\3.conv.{leaf}"),
        Rule(rf"{here}mid_block0/(\w+)/\w+", there + r"mid.block_1.\1.{leaf}"),
        Rule(rf"{here}mid_block1/(\w+)/\w+", there + r"mid.block_2.\1.{leaf}"),
        Rule(rf"{here}mid_attn0/norm/\w+", there + r"mid.attn_1.norm.{leaf}"),
        *_attention(here + "mid_attn0", there + "mid.attn_1.", _COMPVIS, dense_from_conv(2)),
    )


def diffusers_table(ours: str, official: str, levels: int, old: bool = False) -> tuple[Rule, ...]:
    """The same in diffusers' names, which count the levels of a decoder from the latents to the pixels.

    Args:
      ours, official: as in `coder_table`.
      levels: of the decoder.
      old: the attention layers of diffusers before 0.17.
    """
    attention = _DIFFUSERS_OLD if old else _DIFFUSERS
    rules = [
        Rule(rf"params/{ours}/(conv_in|conv_out)/\w+", rf"{official}.\1.{{leaf}}"),
        Rule(rf"params/{ours}/norm_out/\w+", f"{official}.conv_norm_out.{{leaf}}"),
    ]
    places = {"mid": "mid_block"}
    places |= {f"down{i}": f"down_blocks.{i}" for i in range(levels)}
    places |= {f"up{i}": f"up_blocks.{levels - 1 - i}" for i in range(levels)}
    for place, name in places.items():
        here, there = f"params/{ours}/{place}_", f"{official}.{name}."
        rules += [
            Rule(rf"{here}block(\d+)/shortcut/\w+", there + r"resnets.\1.conv_shortcut.{leaf}"),
            Rule(rf"{here}block(\d+)/(\w+)/\w+", there + r"resnets.\1.\2.{leaf}"),
            Rule(rf"{here}attn(\d+)/norm/\w+", there + r"attentions.\1.group_norm.{leaf}"),
            *_attention(here + r"attn(\d+)", there + r"attentions.\1.", attention, _dense_from_any),
            Rule(rf"{here}(downsample|upsample)/conv/\w+", there + r"\1rs.0.conv.{leaf}"),
        ]
    return tuple(rules)


def _attention(here: str, there: str, names: Mapping[str, str], layout: Transform) -> tuple[Rule, ...]:
    kernels = (Rule(f"{here}/attention/{ours}/kernel", f"{there}{name}.weight", layout) for ours, name in names.items())
    biases = (Rule(f"{here}/attention/{ours}/bias", f"{there}{name}.bias") for ours, name in names.items())
    return (*kernels, *biases)


def autoencoder_table(paths: Sequence[str], official: Sequence[str]) -> tuple[Rule, ...]:
    """Encoder, decoder and the 1x1 convolutions between them, in the names of the file at hand (CompVis' if none is).

    For a TABLE that is a function (`engine`): ``TABLE = autoencoder_table``.
    """
    if any(".down_blocks." in name or ".mid_block." in name for name in official):
        levels = 1 + max(int(found[1]) for path in paths if (found := re.match(r"params/decoder/up(\d+)_", path)))
        old = any(".attentions.0.query." in name for name in official)
        coders = [diffusers_table(name, name, levels, old) for name in ("encoder", "decoder")]
    else:
        coders = [coder_table(name, name) for name in ("encoder", "decoder")]
    return (*coders[0], *coders[1], Rule(r"params/(quant_conv|post_quant_conv)/\w+", r"\1.{leaf}"))


_AVERAGES = "model_ema."


def weight_averages(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with the moving averages of its weights in their place, where it has them.

    ``LitEma`` keeps them under ``model_ema.<name without dots>``. What has no average (statistics, frozen weights)
    stays.
    """
    averages = {name for name in state_dict if name.startswith(_AVERAGES)}
    found = {}
    for name, value in state_dict.items():
        if name not in averages:
            average = _AVERAGES + name.replace(".", "")
            found[name] = state_dict[average] if average in averages else value
    return found


# --- configs ---------------------------------------------------------------------------------------------------------


def parameters(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The constructor's parameters and the class ("" if not said) of a config file, its ``model`` part, or neither."""
    config = config.get("model", config)
    if "params" in config:
        return config["params"], str(config.get("target", "")).rsplit(".", 1)[-1]
    return config, ""


def check_keys(what: str, config: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuses keys that nobody reads: one of them may change the network."""
    known = tuple(known)
    for key in config:
        if key not in known:
            raise errors.unknown(f"key of {what}", key, known)


def check_value(what: str, config: Mapping[str, Any], key: str, accepted: Iterable[Any]) -> None:
    """Refuses a value other than the accepted ones; a key that is absent has the first of them."""
    accepted = tuple(accepted)
    if config.get(key, accepted[0]) not in accepted:
        raise errors.unknown(f"{key} of {what}", config[key], [repr(value) for value in accepted])


_DDCONFIG = (
    "double_z", "z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks",
    "attn_resolutions", "dropout", "resamp_with_conv", "attn_type", "use_linear_attn", "tanh_out", "give_pre_end",
)  # fmt: skip


def network_fields(ddconfig: Mapping[str, Any], double_z: bool) -> dict[str, Any]:
    """Fields of encoder and decoder from a CompVis ``ddconfig``."""
    check_keys("ddconfig", ddconfig, _DDCONFIG)
    # The encoder's own default is True, and what the bottleneck reads must fit.
    check_value("ddconfig", {"double_z": True, **ddconfig}, "double_z", (double_z,))
    check_value("ddconfig", ddconfig, "attn_type", ("vanilla", "none"))
    for key in ("use_linear_attn", "tanh_out", "give_pre_end"):
        check_value("ddconfig", ddconfig, key, (False,))
    if ddconfig["in_channels"] != ddconfig["out_ch"]:
        raise ValueError(
            f"in_channels={ddconfig['in_channels']} and out_ch={ddconfig['out_ch']} of ddconfig must be equal: what "
            "comes out has the channels of what goes in."
        )
    attends = ddconfig.get("attn_type", "vanilla") != "none"
    multipliers = tuple(ddconfig.get("ch_mult", (1, 2, 4, 8)))
    sides = tuple(ddconfig["attn_resolutions"]) if attends else ()
    return {
        "pixel_channels": ddconfig["in_channels"],
        "z_channels": ddconfig["z_channels"],
        "widths": tuple(ddconfig["ch"] * factor for factor in multipliers),
        "stem": ddconfig["ch"],
        "blocks": ddconfig["num_res_blocks"],
        "attention": attention_levels(ddconfig["resolution"], len(multipliers), sides),
        "middle_attention": attends,
        "resample_conv": ddconfig.get("resamp_with_conv", True),
        "dropout": ddconfig.get("dropout", 0.0),
    }


def attention_levels(resolution: int, levels: int, attn_resolutions: Sequence[int]) -> tuple[int, ...]:
    """The levels that have attention according to CompVis' config, which names them by side at full resolution.

    Raises:
      ValueError: where its encoder (which halves and rounds down) and decoder (which doubles the smallest side) would
        disagree.
    """
    down = [resolution >> i for i in range(levels)]
    up = [(resolution >> (levels - 1)) << (levels - 1 - i) for i in range(levels)]
    found = tuple(i for i in range(levels) if down[i] in attn_resolutions)
    if found != tuple(i for i in range(levels) if up[i] in attn_resolutions):
        raise ValueError(
            f"attn_resolutions={list(attn_resolutions)} with resolution={resolution} and {levels} levels put attention "
            f"at different levels of encoder {down} and decoder {up}; {2 ** (levels - 1)} must divide the resolution."
        )
    return found


_DIFFUSERS_KEYS = (
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "act_fn", "latent_channels", "norm_num_groups", "sample_size", "scaling_factor", "shift_factor", "latents_mean",
    "latents_std", "force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention",
)  # fmt: skip


def is_diffusers(config: Mapping[str, Any]) -> bool:
    """Whether this is the ``config.json`` of a diffusers autoencoder."""
    return "block_out_channels" in config or "down_block_types" in config


def diffusers_fields(config: Mapping[str, Any], more_keys: Iterable[str] = ()) -> dict[str, Any]:
    """Fields of encoder and decoder, 1x1 convolutions and latents from a diffusers ``AutoencoderKL`` config."""
    what = "a diffusers config"
    check_keys(what, {k: v for k, v in config.items() if not k.startswith("_")}, (*_DIFFUSERS_KEYS, *more_keys))
    check_value(what, config, "act_fn", ("silu", "swish"))
    # Diffusers' own defaults for what a config.json leaves out.
    widths = tuple(config.get("block_out_channels", (64,)))
    down = tuple(config.get("down_block_types", ("DownEncoderBlock2D",)))
    up = tuple(config.get("up_block_types", ("UpDecoderBlock2D",)))
    pixels = config.get("in_channels", 3), config.get("out_channels", 3)
    if pixels[0] != pixels[1]:
        raise ValueError(f"in_channels={pixels[0]} and out_channels={pixels[1]} must be equal.")
    if not len(widths) == len(down) == len(up):
        raise ValueError(
            f"block_out_channels {widths}, down_block_types {down} and up_block_types {up} need one entry per level."
        )
    attention = _levels(down, {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True})
    upward = _levels(up[::-1], {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True})
    if attention != upward:
        raise ValueError(
            f"levels {attention} of the encoder and {upward} of the decoder attend; they must be the same."
        )
    scale, shift = _latent_scale(config)
    return {
        "latent_channels": config.get("latent_channels", 4),
        "pixel_channels": pixels[0],
        "widths": widths,
        "blocks": config.get("layers_per_block", 1),
        "attention": attention,
        "middle_attention": config.get("mid_block_add_attention", True),
        "num_groups": config.get("norm_num_groups", 32),
        "use_quant_conv": config.get("use_quant_conv", True),
        "use_post_quant_conv": config.get("use_post_quant_conv", True),
        "scaling_factor": scale,
        "shift_factor": shift,
        "tile_size": config.get("sample_size", 32),
    }


def _levels(types: Sequence[str], attends: Mapping[str, bool]) -> tuple[int, ...]:
    return tuple(i for i, name in enumerate(types) if errors.pick("block type", name, dict(attends)))


def _latent_scale(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Factor and shift with which a diffusion model sees the latents: ``(z - shift) * factor``, per channel or not."""
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None) or (mean is not None and shift is not None):
        raise ValueError(
            f"latents_mean={mean} and latents_std={std} go together, and without shift_factor={shift}: the latents "
            "would be shifted twice."
        )
    if mean is not None:
        return tuple(scale / value for value in std), tuple(mean)
    return scale, 0.0 if shift is None else shift
