"""PatchGAN of TATS and OmniTokenizer for images and clips (https://arxiv.org/abs/2204.03638, section 3.1).

Other than in `patchgan`, convolutions with a norm have a bias, every side is padded by 2, clips are judged at strides
of 2 in time as well, and the logits of clips are normalised and activated. As in OmniTokenizer's ``base.py``, without
the noise it can put on pixels, whose weight is zero at the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import pick, unknown
from ..nn.conv import Conv2d, Conv3d
from ..parallel.constrain import constrain
from .patchgan import BatchNorm

Array = jax.Array


class TatsDiscriminator(nn.Module):
    """Convolution, leaky ReLU; then convolution, norm, leaky ReLU, the last one of stride 1; a convolution to logits.

    Attributes:
      widths: channels after each hidden convolution.
      axes: 2 for images, 3 for clips.
      normalised_logits: norm and leaky ReLU behind the last convolution as well.
      dtype: compute dtype; parameters, statistics and logits are float32.
    """

    widths: tuple[int, ...]
    axes: int
    normalised_logits: bool
    dtype: Any = jnp.float32

    def __call__(self, pixels: Array, train: bool = False) -> Array:
        """Images ``(B, H, W, C)`` or clips ``(B, T, H, W, C)``, in [-1, 1] -> float32 logits, one per patch.

        A discriminator of images judges the frames of a clip as B * T images.
        """
        return self.features(pixels, train)[0]

    @nn.compact
    def features(self, pixels: Array, train: bool = False) -> tuple[Array, tuple[Array, ...]]:
        """Like a call, and the output of every hidden layer (after its activation) too: (logits, features)."""
        x = pixels.reshape(-1, *pixels.shape[-3:]) if self.axes == 2 else pixels
        if x.ndim != self.axes + 2:
            raise ValueError(f"a discriminator of clips takes pixels (B, T, H, W, C), got shape {pixels.shape}.")
        x = x.astype(self.dtype) / 2  # the authors' pixels are in [-0.5, 0.5]
        found, last = [], len(self.widths) - 1
        for layer, width in enumerate(self.widths):
            x = self._convolution(x, width, 1 if layer == last else 2, f"conv_{layer}")
            if layer > 0:
                x = BatchNorm(dtype=self.dtype, name=f"norm_{layer}")(x, train)
            x = nn.leaky_relu(x, 0.2)
            found.append(x)
        x = self._convolution(x, 1, 1, "conv_out").astype(jnp.float32)
        if self.normalised_logits:
            x = nn.leaky_relu(BatchNorm(name="norm_out")(x, train), 0.2)
        return x, tuple(found)

    def _convolution(self, x: Array, width: int, stride: int, name: str) -> Array:
        names = ("batch", *(("time",) if self.axes == 3 else ()), "height", "width", "channel")
        bound = 1 / math.sqrt(x.shape[-1] * 4**self.axes)
        return {2: Conv2d, 3: Conv3d}[self.axes](
            width,
            4,
            strides=stride,
            padding=2,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
            name=name,
        )(constrain(x, *names))


def tats_2d(width: int = 64, layers: int = 3, norm: str = "batch", dtype: Any = jnp.float32) -> TatsDiscriminator:
    """The one of images: ``layers`` convolutions of stride 2, the first of ``width`` channels, and one of stride 1."""
    return TatsDiscriminator(_widths(width, layers, norm), 2, False, dtype)


def tats_3d(width: int = 64, layers: int = 3, norm: str = "batch", dtype: Any = jnp.float32) -> TatsDiscriminator:
    """The one of clips. Args: see `tats_2d`."""
    return TatsDiscriminator(_widths(width, layers, norm), 3, True, dtype)


# Of the four places of a kernel along time, the share that each one has of the kernel of an image.
STRATEGIES = {
    "center": (0.0, 1.0, 0.0, 0.0),
    "average": (0.25, 0.25, 0.25, 0.25),
    "first": (1.0, 0.0, 0.0, 0.0),
    "last": (0.0, 0.0, 0.0, 1.0),
}


def inflated(images: Mapping[str, Any], clips: Mapping[str, Any], strategy: str = "center") -> dict[str, Any]:
    """Variables of the one of clips, made of those of the one of images (OmniTokenizer's ``inflate_dis``).

    Args:
      images: variables, or parameters, of `tats_2d`.
      clips: of `tats_3d` of the same width; what images have no part of stays, the norm of the logits.
      strategy: one of `STRATEGIES`.
    """
    shares = pick("strategy of inflation", strategy, STRATEGIES)

    def merged(image: Any, clip: Any) -> Any:
        if isinstance(clip, Mapping):
            return {name: merged(image[name], value) if name in image else value for name, value in clip.items()}
        return image if image.shape == clip.shape else jnp.stack([image * share for share in shares])

    return merged(images, clips)


def _widths(width: int, layers: int, norm: str) -> tuple[int, ...]:
    if norm != "batch":
        raise unknown("norm of this discriminator", norm, ("batch",))
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}.")
    return tuple(min(width * 2**layer, 512) for layer in range(layers + 1))
