"""CLIP's text transformer (https://arxiv.org/abs/2103.00020) as a frozen network: a vector for every token of a text.

Decoders that read captions (TA-TiTok, https://arxiv.org/abs/2501.07730) are trained with these.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from ..convert.clip import IGNORE, TABLE
from ..convert.engine import to_tree
from ..convert.files import read_state_dict
from ..errors import pick
from ..nn.text import TextTower
from . import weights

# Fields and weight file. OpenAI's weights were trained with the quick GELU; all positions, behind the final norm.
_FIELDS = {"features": None, "activation": "quick_gelu", "pool": "all"}
TEXT = {"clip_vitl14_336": ({"width": 768, "layers": 12, "heads": 12, **_FIELDS}, "clip_vitl14_336")}


class TextFeatures(TextTower):
    """Token ids ``(B, L)`` -> float32 features ``(B, L, width)``."""

    def __call__(self, ids: jax.Array) -> jax.Array:
        return super().__call__(ids)[0]


def load(name: str, path: str | pathlib.Path | None = None, dtype: Any = jnp.float32) -> tuple[TextFeatures, dict]:
    """A text network with published weights, as ``(module, variables)``.

    Args:
      name: one of `TEXT`.
      path: its weight file; ``None`` looks in ``$TOKENIZERS_WEIGHTS``.
      dtype: compute dtype of the module.

    Raises:
      MissingWeights: there is no such file.
      ValueError: for an unknown name, and where a file holds other tensors than this network's.
    """
    fields, file = pick("network of texts", name, TEXT)
    module = TextFeatures(**fields, dtype=dtype)
    ids = jax.ShapeDtypeStruct((1, module.context), jnp.int32)
    target = jax.eval_shape(module.init, jax.random.key(0), ids)
    if path == weights.SHAPES:
        return module, target
    return module, to_tree(TABLE, target, read_state_dict(weights.find(file, path)), ignore=IGNORE)
