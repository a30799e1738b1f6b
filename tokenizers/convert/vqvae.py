"""Official weights of `tokenizers/models/vqvae.py`: Sonnet's VQ-VAE example and the VQ-VAE-2 port of rosinality.

Sonnet stores kernels in TensorFlow's layout. Both store a codebook as (D, K). Sonnet's modules and this table name the
codebook by the quantizer's class: ``vector_quantizer/embeddings`` or ``vector_quantizer_ema/embeddings``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import errors
from .engine import Rule, Transform, identity, transpose, transposed_conv

# TensorFlow's transposed convolution is the gradient of a convolution: (kh, kw, out, in), not flipped.
_tf_transposed_conv = Transform(
    lambda a: np.flip(a, (0, 1)).transpose(0, 1, 3, 2), lambda a: np.flip(a.transpose(0, 1, 3, 2), (0, 1))
)
_columns = transpose(1, 0)

_ready = Rule(r"codebook/.*/initialised", None, absent=lambda match, state, want: np.ones(want.shape, bool))


def _zeros(match: re.Match, state: Mapping[str, np.ndarray], want: Any) -> np.ndarray:
    return np.zeros(want.shape, want.dtype)


def _sonnet(official: Sequence[str]) -> tuple[Rule, ...]:
    suffix = ":0" if any(name.endswith(":0") for name in official) else ""
    leaf = {"kernel": "w", "bias": "b"}

    def named(template: str):
        return lambda m: template.format(*m.groups(), leaf=leaf[m["leaf"]]) + suffix

    end = r"/(?P<leaf>kernel|bias)"
    ema = "vector_quantizer_ema"
    # Users name modules as they like: either name will do for the table itself.
    given = [name for name in (ema, "vector_quantizer") if f"{name}/embeddings{suffix}" in official]
    learned, averaged = (given[0] if given else name for name in ("vector_quantizer", ema))
    return (
        Rule(
            rf"params/network/encoder/down(\d){end}",
            lambda m: f"encoder/enc_{int(m[1]) + 1}/{leaf[m['leaf']]}{suffix}",
            identity,
        ),
        Rule(rf"params/network/encoder/conv_in{end}", named("encoder/enc_3/{leaf}"), identity),
        Rule(rf"params/network/decoder/conv_in{end}", named("decoder/dec_1/{leaf}"), identity),
        Rule(
            r"params/network/decoder/up(\d)/kernel",
            lambda m: f"decoder/dec_{int(m[1]) + 2}/w{suffix}",
            _tf_transposed_conv,
        ),
        Rule(r"params/network/decoder/up(\d)/bias", lambda m: f"decoder/dec_{int(m[1]) + 2}/b{suffix}"),
        Rule(
            rf"params/network/(encoder|decoder)/block(\d+)/conv1{end}",
            named("{0}/residual_stack/res3x3_{1}/{leaf}"),
            identity,
        ),
        Rule(
            rf"params/network/(encoder|decoder)/block(\d+)/conv2{end}",
            named("{0}/residual_stack/res1x1_{1}/{leaf}"),
            identity,
        ),
        Rule(rf"params/network/to_codes{end}", named("to_vq/{leaf}"), identity),
        Rule(r"params/network/bottleneck/codebook", f"{learned}/embeddings{suffix}", _columns),
        Rule(r"codebook/network/bottleneck/codes", f"{averaged}/embeddings{suffix}", _columns),
        # The averages are needed to train on, not to encode: a file may lack them.
        Rule(r"codebook/network/bottleneck/cluster_size", f"{ema}/ema_cluster_size/hidden{suffix}", absent=_zeros),
        Rule(r"codebook/network/bottleneck/embed_avg", f"{ema}/ema_dw/hidden{suffix}", _columns, absent=_zeros),
        Rule(r"codebook/network/bottleneck/updates", f"{ema}/ema_cluster_size/counter{suffix}", absent=_zeros),
        _ready,
    )


_NETWORKS = {
    "encoder_bottom": "enc_b",
    "encoder_top": "enc_t",
    "decoder_top": "dec_t",
    "decoder": "dec",
}


def _two_levels(blocks: int) -> tuple[Rule, ...]:
    """Official layers are numbered through their list, activations included."""
    convs_in = {"encoder_bottom": 4, "encoder_top": 2, "decoder_top": 0, "decoder": 0}

    def layer(m: re.Match, number: int, inner: str = "") -> str:
        return f"{_NETWORKS[m[1]]}.blocks.{number}{inner}." + ("weight" if m["leaf"] == "kernel" else "bias")

    def of_block(inner: int):
        return lambda m: layer(m, convs_in[m[1]] + 1 + int(m[2]), f".conv.{inner}")

    def up(m: re.Match) -> str:
        return layer(m, blocks + 2 + 2 * int(m[2]))

    def embed(match: re.Match, state: Mapping[str, np.ndarray], want: Any) -> np.ndarray:
        return state[f"quantize_{match[1][0]}.embed"].T

    end = r"/(?P<leaf>kernel|bias)"
    part = "(" + "|".join(_NETWORKS) + ")"
    return (
        Rule(rf"params/network/{part}/down(\d){end}", lambda m: layer(m, 2 * int(m[2]))),
        Rule(rf"params/network/{part}/conv_in{end}", lambda m: layer(m, convs_in[m[1]])),
        Rule(rf"params/network/{part}/block(\d+)/conv1{end}", of_block(1)),
        Rule(rf"params/network/{part}/block(\d+)/conv2{end}", of_block(3)),
        Rule(rf"params/network/{part}/up(\d)/(?P<leaf>kernel)", up, transposed_conv),
        Rule(rf"params/network/{part}/up(\d)/(?P<leaf>bias)", up),
        Rule(r"params/network/to_codes_(t|b)\w+/(kernel|bias)", r"quantize_conv_\1.{leaf}"),
        Rule(r"params/network/upsample_top/kernel", "upsample_t.weight", transposed_conv),
        Rule(r"params/network/upsample_top/bias", "upsample_t.bias"),
        Rule(r"params/network/quantize_(t|b)\w+/codebook", r"quantize_\1.embed", _columns),
        Rule(r"codebook/network/quantize_(t|b)\w+/codes", r"quantize_\1.embed", _columns),
        Rule(r"codebook/network/quantize_(t|b)\w+/cluster_size", r"quantize_\1.cluster_size", absent=_zeros),
        Rule(r"codebook/network/quantize_(t|b)\w+/embed_avg", r"quantize_\1.embed_avg", _columns, absent=embed),
        _ready,
    )


def TABLE(ours: Sequence[str], official: Sequence[str]) -> tuple[Rule, ...]:
    """The rules for the levels and the depth that our paths show, with the ``:0`` of TensorFlow where names have it."""
    blocks = {m[1] for path in ours if (m := re.search(r"/decoder/block(\d+)/", path))}
    if any("/encoder_top/" in path for path in ours):
        return _two_levels(len(blocks))
    return _sonnet(official)


# Debiased averages follow from the biased ones; both averages count the same updates.
IGNORE = (
    r"vector_quantizer_ema/ema_(cluster_size|dw)/average(:0)?",
    r"vector_quantizer_ema/ema_dw/counter(:0)?",
)

# Fields of the two official configs with their defaults; those of training mean nothing here.
_SONNET = {
    "num_hiddens": 128,
    "num_residual_layers": 2,
    "num_residual_hiddens": 32,
    "embedding_dim": 64,
    "num_embeddings": 512,
    "vq_use_ema": True,
    "decay": 0.99,
    "epsilon": 1e-5,
}
_SONNET_TRAINING = ("commitment_cost", "data_variance", "learning_rate", "batch_size", "image_size")
_ROSINALITY = {
    "in_channel": 3,
    "channel": 128,
    "n_res_block": 2,
    "n_res_channel": 32,
    "embed_dim": 64,
    "n_embed": 512,
}
_ROSINALITY_TRAINING = ("decay",)  # the official constructor takes it and does not use it


def fields_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields from the arguments of Sonnet's example or of rosinality's ``VQVAE``."""
    if any(name in config for name in _ROSINALITY):
        return _fields_of_two_levels(_complete(config, _ROSINALITY, _ROSINALITY_TRAINING))
    return _fields_of_one_level(_complete(config, _SONNET, _SONNET_TRAINING))


def _complete(config: Mapping[str, Any], defaults: Mapping[str, Any], ignored: Sequence[str]) -> dict[str, Any]:
    for name in config:
        if name not in defaults and name not in ignored:
            raise errors.unknown("field of an official vqvae config", name, [*defaults, *ignored])
    return {name: config.get(name, default) for name, default in defaults.items()}


def _fields_of_one_level(config: Mapping[str, Any]) -> dict[str, Any]:
    bottleneck = {"name": "vq", "codebook_size": config["num_embeddings"], "code_dim": config["embedding_dim"]}
    if config["vq_use_ema"]:
        averages = {"decay": config["decay"], "epsilon": config["epsilon"], "initial_cluster_size": 0.0, "debias": True}
        bottleneck |= {"learning": "ema", **averages}
    return {
        "bottleneck": bottleneck,
        "latent_channels": config["embedding_dim"],
        "channels": config["num_hiddens"],
        "blocks": config["num_residual_layers"],
        "block_channels": config["num_residual_hiddens"],
        "levels": 1,
        "relu_before_blocks": True,
        "pixel_scale": 0.5,
    }


def _fields_of_two_levels(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["in_channel"] != 3:
        raise errors.unknown("in_channel", config["in_channel"], (3,))
    bottleneck = {
        "name": "vq",
        "codebook_size": config["n_embed"],
        "code_dim": config["embed_dim"],
        "learning": "ema",
        "initial_cluster_size": 0.0,
    }
    return {
        "bottleneck": bottleneck,
        "latent_channels": config["embed_dim"],
        "channels": config["channel"],
        "blocks": config["n_res_block"],
        "block_channels": config["n_res_channel"],
        "levels": 2,
        "relu_before_blocks": False,
        "pixel_scale": 1.0,
    }
