"""The residual discriminator of StyleGAN2 (https://arxiv.org/abs/1912.04958, figure 7d) as MaskGIT trains with it.

One logit per image. Released code: google-research/maskgit `nets/discriminator.py`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..nn.conv import Conv2d, Conv3d, convolve
from ..nn.resample import average_pool
from ..parallel.constrain import constrain

Array = jax.Array

_AXES = ("batch", "height", "width", "channel")
_CLIP_AXES = ("batch", "time", "height", "width", "channel")
_BLUR = np.outer([1.0, 3.0, 3.0, 1.0], [1.0, 3.0, 3.0, 1.0]).astype(np.float32) / 64
_SMALLEST = 4


def blur_down(x: Array) -> Array:
    """Half the size through the binomial filter [1, 3, 3, 1], each channel alone: ``(B, H, W, C)``."""
    channels = x.shape[-1]
    kernel = jnp.broadcast_to(jnp.asarray(_BLUR, x.dtype)[..., None, None], (*_BLUR.shape, 1, channels))
    return convolve(x, kernel, strides=2, groups=channels)


def mean_down(x: Array) -> Array:
    """Half the size through the mean of 2 x 2 values."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


class StyleDiscriminator(nn.Module):
    """Convolution, residual blocks that halve the size down to 4 x 4, convolution, two dense layers. No norms.

    Attributes:
      width: channels for images of 256 x 256; every halving doubles them, up to 512 and to 8 times as many.
      blur: halve through a binomial filter; otherwise through means.
      centered: judge pixels as they are; otherwise in [0, 1], as MaskGIT does, whose borders of zeros are black.
      dtype: compute dtype; parameters and logits are float32.
    """

    width: int = 64
    blur: bool = True
    centered: bool = False
    dtype: Any = jnp.float32

    def __call__(self, pixels: Array, train: bool = False) -> Array:
        """Square images ``(B, S, S, C)``, S a power of two, in [-1, 1] (or clips, frame by frame) -> ``(B, 1)``."""
        return self.features(pixels, train)[0]

    @nn.compact
    def features(self, pixels: Array, train: bool = False) -> tuple[Array, tuple[Array, ...]]:
        """Like a call, and the output of every block too: (logits, features)."""
        x = pixels.reshape(-1, *pixels.shape[-3:])
        size = x.shape[1]
        if x.shape[1] != x.shape[2] or size < 2 * _SMALLEST or size & (size - 1):
            raise ValueError(
                f"a StyleGAN discriminator takes square images whose side is a power of two, at least {2 * _SMALLEST}; "
                f"got pixels of shape {pixels.shape}."
            )
        x = constrain(x, *_AXES).astype(self.dtype)
        x = x if self.centered else (x + 1) / 2
        x = _activate(self._conv(self._channels(size), 3, "conv_in")(x))
        found = []
        for block in range(int(math.log2(size // _SMALLEST))):
            size //= 2
            x = self._block(x, self._channels(size), f"block{block}")
            found.append(x)
        x = _activate(self._conv(self._widest, 3, "conv_out")(x))
        x = _activate(self._dense(self._widest, "dense1")(x.reshape(x.shape[0], -1)))
        return self._dense(1, "dense2")(x).astype(jnp.float32), tuple(found)

    def _block(self, x: Array, features: int, name: str) -> Array:
        down = blur_down if self.blur else mean_down
        y = down(_activate(self._conv(x.shape[-1], 3, f"{name}_conv1")(x)))
        y = _activate(self._conv(features, 3, f"{name}_conv2")(y))
        skip = self._conv(features, 1, f"{name}_skip", use_bias=False)(down(x))
        return constrain((skip + y) / math.sqrt(2), *_AXES)

    def _channels(self, size: int) -> int:
        return min(self._widest, self.width * 256 // size)

    @property
    def _widest(self) -> int:
        return min(512, 8 * self.width)

    def _conv(self, features: int, kernel_size: int, name: str, use_bias: bool = True) -> Conv2d:
        init = nn.initializers.xavier_uniform()
        return Conv2d(features, kernel_size, use_bias=use_bias, dtype=self.dtype, kernel_init=init, name=name)

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)


class StyleDiscriminator3d(nn.Module):
    """The same for clips, as MAGVIT trains with it: every block halves time, height and width, sizes rounded up.

    Yu et al., https://arxiv.org/abs/2212.05199, appendix A.1; google-research/magvit `stylegan_discriminator_3d.py`.

    Attributes:
      width: channels of the first convolution.
      multipliers: of the width behind each block.
      dtype: compute dtype; parameters and logits are float32.
    """

    width: int = 64
    multipliers: tuple[int, ...] = (2, 4, 4, 4, 4)
    dtype: Any = jnp.float32

    def __call__(self, pixels: Array, train: bool = False) -> Array:
        """Clips ``(B, T, H, W, C)`` of one fixed size, in [-1, 1] -> ``(B, 1)``."""
        return self.features(pixels, train)[0]

    @nn.compact
    def features(self, pixels: Array, train: bool = False) -> tuple[Array, tuple[Array, ...]]:
        """Like a call, and the output of every block too: (logits, features)."""
        if pixels.ndim != 5:
            raise ValueError(f"a 3D discriminator takes pixels (B, T, H, W, C), got shape {pixels.shape}.")
        x = (constrain(pixels, *_CLIP_AXES).astype(self.dtype) + 1) / 2  # the authors' clips are in [0, 1]
        x = _activate(self._conv(self.width, 3, "conv_in")(x))
        found = []
        for block, multiplier in enumerate(self.multipliers):
            y = mean_down_3d(_activate(self._conv(x.shape[-1], 3, f"block{block}_conv1")(x)))
            y = _activate(self._conv(self.width * multiplier, 3, f"block{block}_conv2")(y))
            skip = self._conv(self.width * multiplier, 1, f"block{block}_skip", use_bias=False)(mean_down_3d(x))
            x = constrain((skip + y) / math.sqrt(2), *_CLIP_AXES)
            found.append(x)
        widest = x.shape[-1]
        x = _activate(self._conv(widest, 3, "conv_out")(x))
        x = _activate(self._dense(widest, "dense1")(x.reshape(x.shape[0], -1)))
        return self._dense(1, "dense2")(x).astype(jnp.float32), tuple(found)

    def _conv(self, features: int, kernel_size: int, name: str, use_bias: bool = True) -> Conv3d:
        init = nn.initializers.xavier_uniform()
        return Conv3d(features, kernel_size, use_bias=use_bias, dtype=self.dtype, kernel_init=init, name=name)

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)


def mean_down_3d(x: Array) -> Array:
    """Half of time, height and width through means of 2 x 2 x 2 values; of those that are there at an odd end."""
    pads = [(0, size % 2) for size in x.shape[1:-1]]
    return average_pool(jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="edge"), (2, 2, 2))


def _activate(x: Array) -> Array:
    return nn.leaky_relu(x, 0.2)


def stylegan_2d(width: int = 64, layers: int = 0, norm: str = "none", dtype: Any = jnp.float32) -> StyleDiscriminator:
    """The discriminator of MaskGIT's VQGAN.

    Args:
      width: channels for images of 256 x 256.
      layers: 0: their number follows from the size of the images.
      norm: ``none``.
      dtype: compute dtype.
    """
    if layers != 0 or norm != "none":
        raise ValueError(f"stylegan_2d has no norm and as many layers as the size asks for; got {layers=}, {norm=}.")
    return StyleDiscriminator(width, dtype=dtype)


def stylegan_3d(width: int = 64, layers: int = 5, norm: str = "none", dtype: Any = jnp.float32) -> StyleDiscriminator3d:
    """The discriminator of MAGVIT.

    Args:
      width: channels of the first convolution.
      layers: number of blocks: the first doubles the channels, the second quadruples them.
      norm: ``none``.
      dtype: compute dtype.
    """
    if layers < 1 or norm != "none":
        raise ValueError(f"stylegan_3d has no norm and at least one block; got {layers=}, {norm=}.")
    return StyleDiscriminator3d(width, (2, *(4,) * (layers - 1)), dtype)
