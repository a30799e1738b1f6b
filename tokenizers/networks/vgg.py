"""VGG-16 features, https://arxiv.org/abs/1409.1556 (torchvision's ``vgg16(...).features``): five taps after ReLU."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..convert.engine import to_tree
from ..convert.files import read_state_dict
from ..convert.lpips import IGNORE, VGG_HIDDEN, torchvision_names, trunk_table
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


class VGG16Hidden(nn.Module):
    """VGG-16 up to its last hidden layer: the convolutions, 7 x 7 means, two dense layers with ReLU.

    Parameters ``trunk`` (of `VGG16`), ``fc1``, ``fc2``.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w 3) -> (b 4096)
        x = VGG16(self.dtype, name="trunk")(x)[-1]
        x = mean_grid(nn.max_pool(x, (2, 2), (2, 2)), 7)
        x = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)  # in torchvision's order
        for name in ("fc1", "fc2"):
            x = nn.relu(nn.Dense(4096, dtype=self.dtype, name=name)(x))
        return x


def mean_grid(x: Array, size: int) -> Array:
    """Means of ``(B, H, W, C)`` over a grid of ``size x size`` cells of nearly equal size, as close as pixels allow.

    Cell i of n pixels has those from floor(i n / size) to ceil((i + 1) n / size): PyTorch's ``AdaptiveAvgPool2d``.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        cells = np.zeros((size, n), np.float32)
        for i in range(size):
            cell = slice(i * n // size, -(-(i + 1) * n // size))
            cells[i, cell] = 1 / (cell.stop - cell.start)
        x = jnp.moveaxis(jnp.tensordot(jnp.asarray(cells, x.dtype), x, ((1,), (axis,))), 0, axis)
    return x


def load_hidden(path: str | pathlib.Path | None = None, dtype: Any = jnp.float32) -> tuple[VGG16Hidden, dict]:
    """Like `load`, up to the last hidden layer; torchvision's file."""
    module = VGG16Hidden(dtype=dtype)
    target = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    if path == weights.SHAPES:
        return module, target
    return module, to_tree(
        VGG_HIDDEN, target, read_state_dict(weights.find("vgg16", path)), ignore=(r"classifier\.6\..*",)
    )


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
