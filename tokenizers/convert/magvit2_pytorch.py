"""Weights of `tokenizers/models/magvit2_pytorch.py` in the names of lucidrains' ``VideoTokenizer``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .. import errors
from .compvis import check_keys, check_value
from .engine import Rule, Transform, dense_from_conv, reshape

# (O, I, 3) over time <-> (3, 1, 1, I, O)
_over_time = Transform(
    lambda a: a.transpose(2, 1, 0)[:, None, None],
    lambda a: a[:, 0, 0].transpose(2, 1, 0),
)
_point3d = dense_from_conv(3)
_scale = reshape((-1, 1, 1, 1), (-1,))


def _residual(ours: str, official: str) -> list[Rule]:
    dense = {"dense": ("2", _point3d), "gate/scores": ("4.to_k", dense_from_conv(2))}
    dense |= {f"gate/fc{i}": (f"4.net.{2 * (i - 1)}", dense_from_conv(2)) for i in (1, 2)}
    rules = [Rule(rf"{ours}/conv/\w+", f"{official}.fn.0.conv.{{leaf}}")]
    for name, (number, layout) in dense.items():
        rules.append(Rule(f"{ours}/{name}/kernel", f"{official}.fn.{number}.weight", layout))
        rules.append(Rule(f"{ours}/{name}/bias", f"{official}.fn.{number}.bias"))
    return rules


def _attend(ours: str, official: str, shifted: bool) -> list[Rule]:
    inner = ".fn.fn" if shifted else ".fn"
    attention, feed = f"{official}.0{inner}", f"{official}.1{inner}"
    return [
        Rule(f"{ours}/attention/memory", f"{attention}.mem_kv"),
        Rule(f"{ours}/attention/norm/scale", f"{attention}.norm.gamma"),
        Rule(f"{ours}/attention/qkv/kernel", f"{attention}.to_qkv.0.weight"),
        Rule(f"{ours}/attention/out/kernel", f"{attention}.to_out.1.weight"),
        Rule(f"{ours}/mlp/norm/scale", f"{feed}.norm.gamma", _scale),
        *(Rule(f"{ours}/mlp/fc{i}/kernel", f"{feed}.net.{2 * (i - 1)}.weight", _point3d) for i in (1, 2)),
        *(Rule(rf"{ours}/mlp/fc{i}/bias", f"{feed}.net.{2 * (i - 1)}.bias") for i in (1, 2)),
    ]


def table_of(module: Any) -> tuple[Rule, ...]:
    """The rules for a model's list of layers."""
    rules = [
        Rule(r"params/(encoder_in|decoder_out)/\w+", lambda m: _END[m[1]] + _leaf(m)),
        Rule(r"params/(encoder_in_first|decoder_out_first)/\w+", lambda m: _END[m[1]] + _leaf(m)),
        Rule(r"params/(project_in|project_out)/\w+", r"quantizers.\1.{leaf}"),
    ]
    layers = [(layer, None) if isinstance(layer, str) else layer for layer in module.layers]
    for coder, ordered in (("encoder", layers), ("decoder", layers[::-1])):
        for index, (name, number) in enumerate(ordered):
            rules += _layer(f"params/{coder}{index}", f"{coder}_layers.{index}", coder, name, number)
    return tuple(rules)


_END = {
    "encoder_in": "conv_in.conv.",
    "decoder_out": "conv_out.conv.",
    "encoder_in_first": "conv_in_first_frame.",
    "decoder_out_first": "conv_out_first_frame.",
}


def _leaf(match: re.Match) -> str:
    return "weight" if match[0].endswith("kernel") else "bias"


def _layer(ours: str, official: str, coder: str, name: str, number: int | None) -> list[Rule]:
    if name.startswith("attend"):
        return _attend(ours, official, name == "attend_time")
    if name == "residual":
        return _residual(f"{ours}_unit0", official)
    if name == "consecutive_residual":
        units = range(number)
        return [rule for i in units for rule in _residual(f"{ours}_unit{i}", f"{official}.{i}")]
    if coder == "encoder":
        layout = _over_time if name == "compress_time" else None
        return [
            Rule(f"{ours}/kernel", f"{official}.conv.weight", layout),
            Rule(f"{ours}/bias", f"{official}.conv.bias"),
        ]
    layout = dense_from_conv(1 if name == "compress_time" else 2)
    return [
        Rule(f"{ours}/dense/kernel", f"{official}.net.0.weight", layout),
        Rule(f"{ours}/dense/bias", f"{official}.net.0.bias"),
    ]


def TABLE(paths: Sequence[str], official: Sequence[str]) -> Sequence[Rule]:
    """Names depend on the model's layers."""
    raise ValueError("the rules of magvit2_pytorch depend on the list of layers: use table_of(module).")


# The discriminator and VGG of its losses, the quantizer's tables, a buffer of zeros, and a norm behind the encoder
# which is built and, by an error of counting, never applied.
IGNORE = (
    r"(discr|multiscale_discrs|vgg)\..*",
    r"quantizers\.(mask|zero|codebook)",
    r"zero",
    r"encoder_layers\.\d+\.1\.(weight|bias)",
)

_NETWORK = {
    "codebook_size": None,
    "num_codebooks": 1,
    "channels": 3,
    "init_dim": 64,
    "max_dim": float("inf"),
    "layers": ("residual", "residual", "residual"),
    "residual_conv_kernel_size": 3,
    "input_conv_kernel_size": (7, 7, 7),
    "output_conv_kernel_size": (3, 3, 3),
    "pad_mode": "constant",
    "attn_dim_head": 32,
    "attn_heads": 8,
    "attn_dropout": 0.0,
    "separate_first_frame_encoding": False,
    "use_fsq": False,
    "fsq_levels": None,
    "dim_cond": None,
}
_TRAINING = (
    "image_size", "dim_cond_expansion_factor", "lfq_entropy_loss_weight", "lfq_commitment_loss_weight",
    "lfq_diversity_gamma", "quantizer_aux_loss_weight", "linear_attn_dim_head", "linear_attn_heads", "vgg",
    "vgg_weights", "perceptual_loss_weight", "discr_kwargs", "multiscale_discrs", "use_gan",
    "adversarial_loss_weight", "grad_penalty_loss_weight", "multiscale_adversarial_loss_weight", "flash_attn",
)  # fmt: skip


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields from the arguments of ``VideoTokenizer``."""
    what = "a VideoTokenizer config"
    check_keys(what, config, (*_NETWORK, *_TRAINING))
    for key in ("num_codebooks", "pad_mode", "use_fsq", "fsq_levels", "attn_dropout", "dim_cond"):
        check_value(what, config, key, (_NETWORK[key],))
    found = _NETWORK | dict(config)
    codes = found["codebook_size"]
    if not isinstance(codes, int) or codes < 2 or codes & (codes - 1):
        raise errors.unknown(f"codebook_size of {what}", codes, ("a power of two, from 2 on",))
    layers = tuple(layer if isinstance(layer, str) else tuple(layer) for layer in found["layers"])
    layers = tuple(layer[0] if len(layer) == 1 and not isinstance(layer, str) else layer for layer in layers)
    kernels = (_kernel(found[f"{end}_conv_kernel_size"]) for end in ("input", "output"))
    widest = min(found["max_dim"], 2**30)
    return {
        "bottleneck": {"name": "lfq", "bits": codes.bit_length() - 1, "bit_order": "big", "entropy": "clamped"},
        "latent_channels": _width(layers, found["init_dim"], widest),
        "layers": layers,
        "channels": found["init_dim"],
        "widest": int(widest),
        "num_heads": found["attn_heads"],
        "head_dim": found["attn_dim_head"],
        **dict(zip(("conv_in", "conv_out"), kernels, strict=True)),
        "residual_kernel": found["residual_conv_kernel_size"],
        "pixel_channels": found["channels"],
        "first_frame": found["separate_first_frame_encoding"],
    }


def _kernel(size: Any) -> tuple[int, int, int]:
    return (size,) * 3 if isinstance(size, int) else tuple(size)


def _width(layers: Sequence[Any], width: int, widest: float) -> int:
    for layer in layers:
        name, *numbers = (layer,) if isinstance(layer, str) else layer
        if name.startswith("compress"):
            width = int(min(numbers[0] if numbers else 2 * width, widest))
    return width
