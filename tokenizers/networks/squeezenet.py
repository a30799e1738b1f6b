"""SqueezeNet 1.1 features, https://arxiv.org/abs/1602.07360 (torchvision's ``squeezenet1_1``): LPIPS's seven taps."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..nn.conv import Conv2d

Array = jax.Array

# Fire modules by their place in torchvision's list: (squeezed, expanded) channels. The list has pools at 2, 5 and 8.
FIRES = {
    3: (16, 64),
    4: (16, 64),
    6: (32, 128),
    7: (32, 128),
    9: (48, 192),
    10: (48, 192),
    11: (64, 256),
    12: (64, 256),
}
POOLED_BEFORE = (3, 6, 9)
TAPS = (4, 7, 9, 10, 11, 12)


class Fire(nn.Module):
    """1x1 squeeze, then 1x1 and 3x3 expansions side by side."""

    squeezed: int
    expanded: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w c) -> (b h w 2*expanded)
        x = nn.relu(Conv2d(self.squeezed, 1, dtype=self.dtype, name="squeeze")(x))
        one = Conv2d(self.expanded, 1, dtype=self.dtype, name="expand1x1")(x)
        three = Conv2d(self.expanded, 3, padding=1, dtype=self.dtype, name="expand3x3")(x)
        return nn.relu(jnp.concatenate([one, three], axis=-1))


class SqueezeNet(nn.Module):
    """The convolutions of SqueezeNet 1.1. Parameters ``conv1`` and ``fire{place}``.

    Returns seven taps of 64, 128, 256, 384, 384, 512, 512 channels.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        # x: (b h w 3), from `vgg.standardize` -> seven of (b h' w' c)
        x = nn.relu(Conv2d(64, 3, 2, padding=0, dtype=self.dtype, name="conv1")(x))
        taps = [x]
        for place, (squeezed, expanded) in FIRES.items():
            if place in POOLED_BEFORE:
                x = _max_pool_ceil(x)
            x = Fire(squeezed, expanded, self.dtype, name=f"fire{place}")(x)
            if place in TAPS:
                taps.append(x)
        return tuple(taps)


def _max_pool_ceil(x: Array) -> Array:
    """3x3 pooling with stride 2 whose last window may hang over the border (PyTorch's ``ceil_mode``)."""
    over = [(0, (n - 3) % 2) for n in x.shape[1:3]]
    return nn.max_pool(x, (3, 3), (2, 2), padding=over)
