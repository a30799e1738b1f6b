"""The discriminator of images that lucidrains/phenaki-pytorch trains C-ViViT with (``Discriminator`` in ``cvivit.py``).

Residual blocks as in StyleGAN2, which halve the size by folding 2 x 2 pixels into channels; attention over the features
of images of one size; one logit per image.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..nn.conv import Conv2d
from ..nn.resample import space_to_depth
from ..nn.vivit import SpatialCosineAttention
from ..parallel.constrain import constrain

Array = jax.Array

_AXES = ("batch", "height", "width", "channel")
_WIDEST = 512


class PhenakiDiscriminator(nn.Module):
    """Blocks that halve the size down to 4 on its shorter side, one more, convolution, a dense layer. No norms.

    Attributes:
      width: a quarter of the channels behind the first block; every block doubles them, up to 512.
      attention_size: the block whose input has this size on its shorter side is followed by attention.
      dtype: compute dtype; parameters and logits are float32.
    """

    width: int = 16
    attention_size: int = 16
    dtype: Any = jnp.float32

    def __call__(self, pixels: Array, train: bool = False) -> Array:
        """Images ``(B, H, W, C)`` of one fixed size, in [-1, 1] (or clips, frame by frame) -> ``(B, 1)``."""
        return self.features(pixels, train)[0]

    @nn.compact
    def features(self, pixels: Array, train: bool = False) -> tuple[Array, tuple[Array, ...]]:
        """Like a call, and the output of every block too: (logits, features)."""
        x = pixels.reshape(-1, *pixels.shape[-3:])
        size = min(x.shape[1:3])
        halvings = int(math.log2(size)) - 2
        if halvings < 1 or any(side % 2**halvings for side in x.shape[1:3]):
            raise ValueError(
                f"this discriminator halves images until their shorter side has 4 to 7 pixels, at least once; got "
                f"pixels of shape {pixels.shape}."
            )
        x = constrain((x.astype(self.dtype) + 1) / 2, *_AXES)  # the authors' pixels are in [0, 1]
        found = []
        for block in range(halvings + 1):
            features = min(_WIDEST, self.width * 4 * 2**block)
            x = self._block(x, features, halve=block < halvings, name=f"block{block}")
            if size == self.attention_size:
                attention = SpatialCosineAttention(8, head_dim=64, dtype=self.dtype, name=f"attention{block}")
                x = x + attention(x[:, None])[:, 0]
            found.append(x)
            size //= 2
        x = _activate(self._conv(x.shape[-1], 3, "conv_out")(x))
        x = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)  # in the authors' order
        return nn.Dense(1, dtype=self.dtype, name="logit")(x).astype(jnp.float32), tuple(found)

    def _block(self, x: Array, features: int, halve: bool, name: str) -> Array:
        stride = 2 if halve else 1
        skip = self._conv(features, 1, f"{name}_skip", stride)(x)
        for i in (1, 2):
            x = _activate(self._conv(features, 3, f"{name}_conv{i}")(x))
        if halve:
            x = self._conv(features, 1, f"{name}_fold")(space_to_depth(x, (2, 2), order="channel_outer"))
        return constrain((x + skip) / math.sqrt(2), *_AXES)

    def _conv(self, features: int, kernel_size: int, name: str, stride: int = 1) -> Conv2d:
        padding = kernel_size // 2
        return Conv2d(features, kernel_size, strides=stride, padding=padding, dtype=self.dtype, name=name)


def _activate(x: Array) -> Array:
    return nn.leaky_relu(x, 0.1)


def phenaki_2d(width: int = 16, layers: int = 0, norm: str = "none", dtype: Any = jnp.float32) -> PhenakiDiscriminator:
    """The discriminator of phenaki-pytorch.

    Args:
      width: a quarter of the channels behind the first block.
      layers: 0: their number follows from the size of the images.
      norm: ``none``.
      dtype: compute dtype.
    """
    if layers != 0 or norm != "none":
        raise ValueError(f"phenaki_2d has no norm and as many layers as the size asks for; got {layers=}, {norm=}.")
    return PhenakiDiscriminator(width, dtype=dtype)
