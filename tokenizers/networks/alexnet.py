"""AlexNet features, https://arxiv.org/abs/1404.5997 (torchvision's ``alexnet(...).features``): the taps after ReLU."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..nn.conv import Conv2d

Array = jax.Array

# (output channels, kernel, stride, padding, max pooling before)
LAYERS = (
    (64, 11, 4, 2, False),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, True),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)


class AlexNet(nn.Module):
    """The convolutions of AlexNet (one-column version). Parameters ``conv{i}``.

    Returns relu1 to relu5: (B, h, w, 64 | 192 | 384 | 256 | 256); 64 pixels give 15, 7, 3, 3, 3.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        # x: (b h w 3), from `vgg.standardize` -> five of (b h' w' c)
        taps = []
        for i, (features, size, stride, padding, pooled) in enumerate(LAYERS, start=1):
            if pooled:
                x = nn.max_pool(x, (3, 3), (2, 2))
            x = nn.relu(Conv2d(features, size, stride, padding, dtype=self.dtype, name=f"conv{i}")(x))
            taps.append(x)
        return tuple(taps)
