"""The patch discriminator of MaskBit (https://arxiv.org/abs/2409.16211, appendix A): halves through a binomial filter.

TiTok uses it as it is, with 16 x 16 logits for every image; Open-MAGVIT2, for its 2^14 codes, without that grid
(`NLayerDiscriminatorv2`).
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..nn.conv import Conv2d
from ..parallel.constrain import constrain
from .stylegan import blur_down, mean_down

Array = jax.Array

_AXES = ("batch", "height", "width", "channel")
_activate = functools.partial(nn.leaky_relu, negative_slope=0.1)


def adaptive_max_pool(x: Array, size: int) -> Array:
    """Maxima over a grid of windows that cover the image: ``(B, H, W, C) -> (B, size, size, C)``.

    Window i of a side of n values is [floor(i n / size), ceil((i + 1) n / size)): windows overlap where ``size`` does
    not divide n, and a smaller image grows (PyTorch's ``AdaptiveMaxPool2d``).
    """
    for axis in (1, 2):
        n, i = x.shape[axis], np.arange(size)
        start, end = i * n // size, -(-(i + 1) * n // size)
        windows = start[:, None] + np.arange((end - start).max())
        windows = np.minimum(windows, end[:, None] - 1)  # a short window sees its last value twice
        x = jnp.take(x, windows, axis=axis).max(axis + 1)
    return x


class BlurDiscriminator(nn.Module):
    """5x5 convolution, stages of 3x3 convolution, blur to half the size and group norm, 1x1 and 5x5 convolution.

    Attributes:
      width: channels of the first convolution and the first stage; every later stage doubles them.
      stages: number of stages.
      grid: side of the square of logits that images of every size get; None gives one per 2^stages pixels.
      unit_range: the network sees pixels in [0, 1] instead of [-1, 1].
      blur: halve through a binomial filter; otherwise through means.
      dtype: compute dtype; parameters, statistics and logits are float32.
    """

    width: int = 128
    stages: int = 3
    grid: int | None = None
    unit_range: bool = False
    blur: bool = True
    dtype: Any = jnp.float32

    def __call__(self, pixels: Array, train: bool = False) -> Array:
        """Images ``(B, H, W, C)`` in [-1, 1] (or clips, frame by frame) -> ``(B, h, w, 1)``, one logit per patch."""
        return self.features(pixels, train)[0]

    @nn.compact
    def features(self, pixels: Array, train: bool = False) -> tuple[Array, tuple[Array, ...]]:
        """Like a call, and the output of every stage too: (logits, features)."""
        x = pixels.reshape(-1, *pixels.shape[-3:]).astype(self.dtype)
        x = (x + 1) / 2 if self.unit_range else x
        down = blur_down if self.blur else mean_down
        x = _activate(self._conv(self.width, 5, "conv_in")(constrain(x, *_AXES)))
        found = []
        for stage in range(self.stages):
            x = down(self._conv(self.width * 2**stage, 3, f"conv_{stage}")(x))
            norm = nn.GroupNorm(32, epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name=f"norm_{stage}")
            x = constrain(_activate(norm(x)), *_AXES)
            found.append(x)
        x = x if self.grid is None else adaptive_max_pool(x, self.grid)
        x = _activate(self._conv(x.shape[-1], 1, "conv_mid")(x))
        return self._conv(1, 5, "conv_out")(x).astype(jnp.float32), tuple(found)

    def _conv(self, features: int, kernel_size: int, name: str) -> Conv2d:
        return Conv2d(features, kernel_size, dtype=self.dtype, name=name)


def blur_2d(width: int = 128, layers: int = 3, norm: str = "group", dtype: Any = jnp.float32) -> BlurDiscriminator:
    """MaskBit's discriminator as in Open-MAGVIT2: a logit per patch of the image.

    Args:
      width: channels of the first layer.
      layers: number of stages.
      norm: ``group``.
      dtype: compute dtype.
    """
    if layers < 1 or norm != "group":
        raise ValueError(f"blur_2d has group norms and at least one stage; got {layers=}, {norm=}.")
    return BlurDiscriminator(width, layers, dtype=dtype)


def maskbit_2d(width: int = 128, layers: int = 3, norm: str = "group", dtype: Any = jnp.float32) -> BlurDiscriminator:
    """MaskBit's discriminator as in TiTok: 16 x 16 logits per image, pixels in [0, 1]. Args: see `blur_2d`."""
    return blur_2d(width, layers, norm, dtype).clone(grid=16, unit_range=True)
