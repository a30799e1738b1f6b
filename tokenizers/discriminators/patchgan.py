"""PatchGAN discriminators for images and clips (pix2pix, https://arxiv.org/abs/1611.07004).

A stack of strided convolutions whose every output judges one patch of the input. `patchgan_2d` is the discriminator of
VQGAN (taming-transformers `NLayerDiscriminator`) and of the recipes that copied it; `patchgan_3d` the one of VidTok and
Open-MAGVIT2 (`NLayerDiscriminator3D`).
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import unknown
from ..nn.conv import Conv2d, Conv3d
from ..nn.norm import GroupNorm
from ..parallel.constrain import constrain

Array = jax.Array
Dtype = Any

NORMS = ("batch", "actnorm", "group", "none")


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's running statistics.

    In training an item is normalised with the biased variance of the (global) batch, while the running variance is fed
    the unbiased one; `flax.linen.BatchNorm` feeds the biased one. Running statistics live in ``batch_stats``.

    Attributes:
      momentum: weight of the new batch in the running statistics.
      epsilon: added to the variance.
      dtype: dtype of the output; statistics and normalisation are float32.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """(..., C) -> (..., C)."""
        channels = x.shape[-1]
        scale = self.param("scale", _normal_around_one, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        if train:
            mean, var, count = _channel_statistics(x)
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        return ((x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias).astype(self.dtype)


class ActNorm(nn.Module):
    """Per-channel affine ``scale * (x + loc)`` that the first training batch makes zero-mean and unit-variance.

    Glow, https://arxiv.org/abs/1807.03039, section 3.1, as in taming-transformers. The parameters of a Linen module
    cannot change while it is applied, so the first batch stores what must be added to them in ``batch_stats``:
    gradients, and thus the optimizer's steps, are those of the original (without weight decay). Converted weights have
    ``initialized = 1`` and zero offsets.

    Attributes:
      dtype: dtype of the output; statistics and normalisation are float32.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """(..., C) -> (..., C)."""
        channels = x.shape[-1]
        loc = self.param("loc", nn.initializers.zeros, (channels,), jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        initialized = self.variable("batch_stats", "initialized", jnp.zeros, (), jnp.uint8)
        loc_offset = self.variable("batch_stats", "loc_offset", jnp.zeros, (channels,), jnp.float32)
        scale_offset = self.variable("batch_stats", "scale_offset", jnp.zeros, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        offsets = (loc_offset.value, scale_offset.value)
        if train and not self.is_initializing():
            mean, var, count = _channel_statistics(jax.lax.stop_gradient(x))
            std = jnp.sqrt(var * (count / max(count - 1, 1)))
            fitted = (-mean - jax.lax.stop_gradient(loc), 1 / (std + 1e-6) - jax.lax.stop_gradient(scale))
            offsets = tuple(
                jnp.where(initialized.value > 0, old, new) for old, new in zip(offsets, fitted, strict=True)
            )
            if self.is_mutable_collection("batch_stats"):
                loc_offset.value, scale_offset.value = offsets
                initialized.value = jnp.ones((), jnp.uint8)
        return ((scale + offsets[1]) * (x + (loc + offsets[0]))).astype(self.dtype)


class PatchDiscriminator(nn.Module):
    """Convolution, leaky ReLU; then convolution, norm, leaky ReLU; and a last convolution to one logit per patch.

    Attributes:
      widths: channels after each hidden convolution.
      strides: stride of each hidden convolution; the length of one entry, 2 or 3, says whether this is a discriminator
        of images or of clips. The last convolution has stride 1.
      kernel: size of all kernels along every axis; each convolution pads 1 on every side.
      norm: between convolution and activation of all hidden layers but the first: ``batch``, ``actnorm``, ``group``
        (32 groups, or the largest power of two that divides the channels) or ``none``. With ``batch`` those
        convolutions have no bias.
      slope: of the leaky ReLU for negative values.
      dtype: compute dtype; parameters, statistics and logits are float32.
    """

    widths: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel: int
    norm: str = "batch"
    slope: float = 0.2
    dtype: Dtype = jnp.float32

    def __call__(self, pixels: Array, train: bool = False) -> Array:
        """Pixels in [-1, 1] -> float32 logits, one per patch.

        Args:
          pixels: images ``(B, H, W, C)`` or clips ``(B, T, H, W, C)``. An image discriminator judges the frames of a
            clip as B * T images.
          train: normalise with the statistics of this batch, and update the running ones where ``batch_stats`` is
            mutable.

        Returns:
          ``(B, h, w, 1)``, ``(B * T, h, w, 1)`` or ``(B, t, h, w, 1)``.
        """
        return self.features(pixels, train)[0]

    @nn.compact
    def features(self, pixels: Array, train: bool = False) -> tuple[Array, tuple[Array, ...]]:
        """Like a call, and the output of every hidden layer (after its activation) too: (logits, features)."""
        self._check()
        x = self._folded(pixels).astype(self.dtype)
        axes = ("batch", *(("time",) if x.ndim == 5 else ()), "height", "width", "channel")
        found = []
        for layer, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True)):
            normalised = layer > 0 and self.norm != "none"
            biased = not (normalised and self.norm == "batch")
            name = "conv_in" if layer == 0 else f"conv_{layer}"
            x = self._convolution(width, stride, biased, x.shape[-1], name)(constrain(x, *axes))
            if normalised:
                x = self._normalised(x, train, f"norm_{layer}")
            x = nn.leaky_relu(x, self.slope)
            found.append(x)
        unit = (1,) * len(self.strides[0])
        logits = self._convolution(1, unit, True, x.shape[-1], "conv_out")(constrain(x, *axes)).astype(jnp.float32)
        if 0 in logits.shape:
            raise ValueError(f"pixels of shape {pixels.shape} are too small for {len(self.widths)} hidden layers.")
        return logits, tuple(found)

    def _convolution(self, width: int, stride: tuple[int, ...], biased: bool, channels: int, name: str) -> nn.Module:
        # PyTorch's default for the bias, which the published recipes leave alone: uniform in +-1/sqrt(fan in).
        bound = 1 / math.sqrt(channels * self.kernel ** len(stride))
        return {2: Conv2d, 3: Conv3d}[len(stride)](
            width,
            self.kernel,
            strides=stride,
            padding=1,
            use_bias=biased,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
            name=name,
        )

    def _normalised(self, x: Array, train: bool, name: str) -> Array:
        if self.norm == "batch":
            return BatchNorm(dtype=self.dtype, name=name)(x, train)
        if self.norm == "actnorm":
            return ActNorm(dtype=self.dtype, name=name)(x, train)
        return GroupNorm(epsilon=1e-5, dtype=self.dtype, num_groups=math.gcd(32, x.shape[-1]), name=name)(x)

    def _folded(self, pixels: Array) -> Array:
        axes = len(self.strides[0])
        if axes == 2 and pixels.ndim == 5:
            return pixels.reshape(-1, *pixels.shape[2:])
        if pixels.ndim != axes + 2:
            accepted = "(B, H, W, C) or (B, T, H, W, C)" if axes == 2 else "(B, T, H, W, C)"
            raise ValueError(f"a {axes}D discriminator takes pixels {accepted}, got shape {pixels.shape}.")
        return pixels

    def _check(self) -> None:
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        if len(self.widths) != len(self.strides) or {len(stride) for stride in self.strides} not in ({2}, {3}):
            raise ValueError(
                f"one stride of 2 or 3 numbers per width is needed, got widths {self.widths}, strides {self.strides}."
            )


def patchgan_2d(
    width: int = 64, layers: int = 3, norm: str = "batch", dtype: Dtype = jnp.float32
) -> PatchDiscriminator:
    """The image discriminator of VQGAN: 4x4 kernels, ``layers`` strides of 2, then one of 1.

    Args:
      width: channels of the first layer; they double per layer up to 8 times as many.
      layers: number of strided convolutions; 3 gives patches of 70 pixels.
      norm: see `PatchDiscriminator`.
      dtype: compute dtype.
    """
    strides = ((2, 2),) * layers + ((1, 1),)
    return PatchDiscriminator(_widths(width, layers), strides, kernel=4, norm=norm, dtype=dtype)


def patchgan_3d(
    width: int = 64, layers: int = 3, norm: str = "batch", dtype: Dtype = jnp.float32
) -> PatchDiscriminator:
    """The clip discriminator of VidTok: 3x3x3 kernels; the first two convolutions stride 2 in time as well.

    Args: see `patchgan_2d`.
    """
    strides = tuple((2 if layer < 2 else 1, 2, 2) for layer in range(layers)) + ((1, 1, 1),)
    return PatchDiscriminator(_widths(width, layers), strides, kernel=3, norm=norm, dtype=dtype)


def _widths(width: int, layers: int) -> tuple[int, ...]:
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}.")
    return tuple(width * min(2**layer, 8) for layer in range(layers + 1))


def _channel_statistics(x: Array) -> tuple[Array, Array, int]:
    """Mean and biased variance per channel, and the number of values behind each; (..., C) -> (C,), (C,)."""
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.mean(jnp.square(x - mean), axes), math.prod(x.shape[:-1])


def _normal_around_one(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
    return 1 + 0.02 * jax.random.normal(key, shape, dtype)
