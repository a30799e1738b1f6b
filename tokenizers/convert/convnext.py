"""Where the weights of ConvNeXt are in torchvision's files: one list of stems and stages, one of a block's layers."""

from __future__ import annotations

import re

from .engine import Rule, squeeze

_LAYERS = {"conv": 0, "norm": 2, "fc1": 3, "fc2": 5}


def _down(match: re.Match) -> str:
    # The stem is a convolution and its norm, the layers between stages are a norm and its convolution.
    stage, layer, leaf = int(match[1]), match[2], match[3]
    place = ("conv", "norm").index(layer) if stage == 0 else ("norm", "conv").index(layer)
    return f"features.{2 * stage}.{place}.{'bias' if leaf == 'bias' else 'weight'}"


def _block(rest: str):
    return lambda match: f"features.{2 * int(match[1]) + 1}.{match[2]}.{rest}"


TABLE = (
    Rule(r"params/down(\d)_(conv|norm)/(\w+)", _down),
    *(
        Rule(rf"params/stage(\d)_block(\d+)/{layer}/{leaf}", _block(f"block.{place}.{official}"))
        for layer, place in _LAYERS.items()
        for leaf, official in (("(?:kernel|scale)", "weight"), ("bias", "bias"))
    ),
    Rule(r"params/stage(\d)_block(\d+)/layer_scale", _block("layer_scale"), squeeze(1, 2)),
    Rule(r"params/norm_out/\w+", "classifier.0.{leaf}"),
    Rule(r"params/logits/\w+", "classifier.2.{leaf}"),
)
