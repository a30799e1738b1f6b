"""I3D, the video network of the Frechet video distance, https://arxiv.org/abs/1705.07750 (Kinetics-400, RGB).

The FVD features are the 400 logits, averaged over time. Published distances differ by how a video gets to 224 x 224:
`preprocess_squash` (OmniTokenizer), `preprocess_truncated` (VideoGPT), `preprocess_cropped` (StyleGAN-V).
"""

from __future__ import annotations

import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..convert.engine import to_tree
from ..convert.files import read_state_dict
from ..convert.i3d import IGNORE, TABLE
from ..nn.conv import Conv3d
from . import weights
from .inception import resize_half_pixel

Array = jax.Array

SIZE = 224
CLASSES = 400
SHORTEST = 9  # frames: what leaves the two that the last average pool needs

# Name: widths [1x1 | 1x1, 3x3x3 | 1x1, 3x3x3 | pooled 1x1], with (window, stride) of the pool in front of it.
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
_POOLED_BEFORE = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


class Unit(nn.Module):
    """Convolution without bias (TensorFlow's SAME padding), frozen batch normalization, ReLU."""

    features: int
    kernel_size: int = 1
    strides: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b t' h' w' features)
        x = Conv3d(self.features, self.kernel_size, self.strides, "SAME", use_bias=False, name="conv3d")(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="bn")(x))


class Mixed(nn.Module):
    """Four parallel branches, concatenated."""

    widths: tuple[int, int, int, int, int, int]

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b t h w c')
        w = self.widths
        return jnp.concatenate(
            [
                Unit(w[0], name="b0")(x),
                Unit(w[2], 3, name="b1b")(Unit(w[1], name="b1a")(x)),
                Unit(w[4], 3, name="b2b")(Unit(w[3], name="b2a")(x)),
                Unit(w[5], name="b3b")(nn.max_pool(x, (3, 3, 3), (1, 1, 1), "SAME")),
            ],
            axis=-1,
        )


class I3D(nn.Module):
    """Logits of Kinetics-400 for clips, and what leads to them.

    Returns ``logits`` (B, 400), averaged over time (the FVD features), ``pooled`` (B, t, 1024) and the taps
    ``Conv3d_1a_7x7``, ``Conv3d_2c_3x3`` and ``Mixed_*`` (B, t, h, w, c), float32. What is not used is not computed
    under jit. Float32 whatever the device's default precision.
    """

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        # x: (b t 224 224 3) in [-1, 1], t >= 9
        if x.ndim != 5 or x.shape[1] < SHORTEST or x.shape[2:] != (SIZE, SIZE, 3):
            raise ValueError(f"I3D takes (B, T, {SIZE}, {SIZE}, 3) with T at least {SHORTEST}; got {x.shape}.")
        with jax.default_matmul_precision("float32"):
            return self._features(jnp.asarray(x, jnp.float32))

    def _features(self, x: Array) -> dict[str, Array]:
        found = {}
        found["Conv3d_1a_7x7"] = x = Unit(64, 7, 2, name="Conv3d_1a_7x7")(x)
        x = nn.max_pool(x, (1, 3, 3), (1, 2, 2), "SAME")
        x = Unit(64, name="Conv3d_2b_1x1")(x)
        found["Conv3d_2c_3x3"] = x = Unit(192, 3, name="Conv3d_2c_3x3")(x)
        for name, widths in _MIXED.items():
            if name in _POOLED_BEFORE:
                x = nn.max_pool(x, *_POOLED_BEFORE[name], "SAME")
            found[name] = x = Mixed(widths, name=name)(x)
        pooled = nn.avg_pool(x, (2, 7, 7), (1, 1, 1))
        logits = Conv3d(CLASSES, 1, name="logits_conv")(pooled)
        return found | {"pooled": pooled[:, :, 0, 0], "logits": logits.mean((1, 2, 3))}


# --- from videos to network input -------------------------------------------------------------------------------------


def preprocess_squash(videos: Array, size: int = SIZE) -> Array:
    """OmniTokenizer's pipeline: bilinear to size x size whatever the aspect, ``2 x / 255 - 1``.

    videos: (B, T, H, W, 3), uint8 or float in [0, 255] -> (B, T, size, size, 3) float32 in [-1, 1].
    """
    return 2 * resize_half_pixel(jnp.asarray(videos, jnp.float32), (size, size)) / 255 - 1


def preprocess_truncated(videos: Array, size: int = SIZE) -> Array:
    """VideoGPT's pipeline: `preprocess_cropped` of ``floor(255 x)``, so up to one grey level darker.

    videos: (B, T, H, W, 3), float in [0, 1] -> (B, T, size, size, 3) float32 in [-1, 1].
    """
    levels = jnp.floor(jnp.asarray(videos, jnp.float32) * 255)
    return (_resize_and_crop(levels, size) / 255 - 0.5) * 2


def preprocess_cropped(videos: Array, size: int = SIZE) -> Array:
    """StyleGAN-V's pipeline: bilinear with the shorter side to ``size``, centre crop, ``2 x - 1``.

    videos: (B, T, H, W, 3), float in [0, 1] -> (B, T, size, size, 3) float32 in [-1, 1].
    """
    return (_resize_and_crop(jnp.asarray(videos, jnp.float32), size) - 0.5) * 2


def _resize_and_crop(videos: Array, size: int) -> Array:
    h, w = videos.shape[2:4]
    scale = size / min(h, w)
    resized = (size, math.ceil(w * scale)) if h < w else (math.ceil(h * scale), size)
    videos = resize_half_pixel(videos, resized)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    return videos[:, :, top : top + size, left : left + size]


def load(path: str | pathlib.Path | None = None) -> tuple[I3D, dict]:
    """The network with its published weights, as ``(module, variables)``; ``None`` looks in ``$TOKENIZERS_WEIGHTS``."""
    module = I3D()
    clip = jax.ShapeDtypeStruct((1, SHORTEST, SIZE, SIZE, 3), jnp.float32)
    target = jax.eval_shape(module.init, jax.random.key(0), clip)
    state = read_state_dict(weights.find("i3d_kinetics400", path))
    return module, to_tree(TABLE, target, state, ignore=IGNORE)
