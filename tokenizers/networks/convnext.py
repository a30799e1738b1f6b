"""ConvNeXt-S (https://arxiv.org/abs/2201.03545; torchvision's ``convnext_small``): logits over ImageNet's classes."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..convert.convnext import TABLE
from ..convert.engine import to_tree
from ..convert.files import read_state_dict
from ..nn.conv import Conv2d
from ..nn.norm import LayerNorm
from ..pixels import IMAGENET_MEAN, IMAGENET_STD
from . import weights

Array = jax.Array

SIZE = 224
CLASSES = 1000


def standardize(pixels: Array) -> Array:
    """RGB pixels ``(B, H, W, 3)`` in [-1, 1] as the network was trained on them: ``(B, 224, 224, 3)``, float32.

    Whatever the size and aspect ratio of the images, they become squares: bilinear, antialiased where they shrink.
    """
    pixels = (pixels.astype(jnp.float32) + 1) / 2
    pixels = jax.image.resize(pixels, (pixels.shape[0], SIZE, SIZE, 3), "bilinear", antialias=True)
    return (pixels - IMAGENET_MEAN) / IMAGENET_STD


class Block(nn.Module):
    """7x7 convolution of each channel, norm, two dense layers, learned scale, skip."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w c) -> (b h w c)
        width = x.shape[-1]
        h = Conv2d(width, 7, padding=3, groups=width, dtype=self.dtype, name="conv")(x)
        h = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(h)
        h = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="fc1")(h), approximate=False)
        h = nn.Dense(width, dtype=self.dtype, name="fc2")(h)
        return x + h * self.param("layer_scale", nn.initializers.constant(1e-6), (width,)).astype(self.dtype)


class ConvNeXt(nn.Module):
    """Stages of blocks; each starts with a norm and a convolution that halves the size (the first: quarters it).

    Attributes:
      widths, depths: channels and blocks of each stage.
      dtype: compute dtype; norms' statistics and logits are float32.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 27, 3)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 224 224 3), from `standardize` -> (b 1000), float32
        x = x.astype(self.dtype)
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            if stage:
                x = LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"down{stage}_norm")(x)
            factor = 2 if stage else 4
            x = Conv2d(width, factor, strides=factor, padding=0, dtype=self.dtype, name=f"down{stage}_conv")(x)
            if not stage:
                x = LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"down{stage}_norm")(x)
            for i in range(depth):
                x = Block(self.dtype, name=f"stage{stage}_block{i}")(x)
        x = x.astype(jnp.float32).mean((1, 2))
        x = LayerNorm(epsilon=1e-6, name="norm_out")(x)
        return nn.Dense(CLASSES, name="logits")(x)


def load(path: str | pathlib.Path | None = None, dtype: Any = jnp.float32) -> tuple[ConvNeXt, dict]:
    """ConvNeXt-S with ImageNet weights, as ``(module, variables)``.

    Args:
      path: torchvision's file; ``None`` looks in ``$TOKENIZERS_WEIGHTS``.
      dtype: compute dtype of the module.
    """
    module = ConvNeXt(dtype=dtype)
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    target = jax.eval_shape(module.init, jax.random.key(0), image)
    if path == weights.SHAPES:
        return module, target
    return module, to_tree(TABLE, target, read_state_dict(weights.find("convnext_small", path)))
