"""Where the weights of DINOv2 and MAE are: timm's names, which their authors' files share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .engine import Rule

_BLOCK = r"params/block(\d+)/"

TABLE = (
    Rule(r"params/(cls_token|pos_embed|register_tokens)", r"\1"),
    Rule(r"params/patch_embed/\w+", r"patch_embed.proj.{leaf}"),
    Rule(r"params/norm/\w+", r"norm.{leaf}"),
    Rule(_BLOCK + r"(norm1|norm2)/\w+", r"blocks.\1.\2.{leaf}"),
    Rule(_BLOCK + r"attention/qkv/\w+", r"blocks.\1.attn.qkv.{leaf}"),
    Rule(_BLOCK + r"attention/out/\w+", r"blocks.\1.attn.proj.{leaf}"),
    Rule(_BLOCK + r"mlp/(fc1|fc2)/\w+", r"blocks.\1.mlp.\2.{leaf}"),
    Rule(_BLOCK + r"scale([12])/scale", r"blocks.\1.ls\2.gamma"),
)

# What only their own training needs: masked tokens, the decoder of MAE.
IGNORE = (r"mask_token", r"decoder_.*")

_INSIDE = "foundation_model.model."


def plain_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The foundation model's own entries where it is part of a VA-VAE checkpoint; any other file as it is.

    With registers, timm's files have another name for them, and the position of the class token added to it already.
    """
    inside = {name.removeprefix(_INSIDE): value for name, value in state_dict.items() if name.startswith(_INSIDE)}
    found = inside or dict(state_dict)
    if "reg_token" in found:
        found["register_tokens"] = found.pop("reg_token")
        found["pos_embed"] = np.pad(np.asarray(found["pos_embed"]), ((0, 0), (1, 0), (0, 0)))
    return found
