"""VGG-16 features, https://arxiv.org/abs/1409.1556 (torchvision's ``vgg16(...).features``): five taps after ReLU."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..convert.engine import to_tree
from ..convert.files import read_state_dict
from ..convert.lpips import IGNORE, torchvision_names, trunk_table
from ..nn.conv import Conv2d
from . import weights

Array = jax.Array

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# ImageNet's mean and deviation as LPIPS 0.1 writes them for pixels in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def standardize(pixels: Array) -> Array:
    """RGB pixels (..., 3) in [-1, 1] as the trunks were trained on them: ``(pixels - SHIFT) / SCALE``."""
    return (pixels - jnp.asarray(SHIFT, pixels.dtype)) / jnp.asarray(SCALE, pixels.dtype)


class VGG16(nn.Module):
    """The convolutions of VGG-16.

    Returns relu1_2, relu2_2, relu3_3, relu4_3, relu5_3: (B, H / 2^i, W / 2^i, 64 | 128 | 256 | 512 | 512), sizes
    rounded down. Parameters ``conv{stage}_{i}``.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        # x: (b h w 3), from `standardize` -> five of (b h' w' c)
        taps = []
        for stage, widths in enumerate(STAGES, start=1):
            if stage > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i, width in enumerate(widths, start=1):
                x = nn.relu(Conv2d(width, 3, padding=1, dtype=self.dtype, name=f"conv{stage}_{i}")(x))
            taps.append(x)
        return tuple(taps)


def load(path: str | pathlib.Path | None = None, dtype: Any = jnp.float32) -> tuple[VGG16, dict]:
    """VGG-16 with ImageNet weights, as ``(module, variables)``.

    Args:
      path: torchvision's vgg16 file, or an LPIPS file that holds the trunk; ``None`` looks in ``$TOKENIZERS_WEIGHTS``.
      dtype: compute dtype of the module.
    """
    module = VGG16(dtype=dtype)
    target = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    if path == weights.SHAPES:
        return module, target
    state = torchvision_names(read_state_dict(weights.find("vgg16", path)))
    return module, to_tree(trunk_table("vgg"), target, state, ignore=(*IGNORE, r"lin\d.*"))
