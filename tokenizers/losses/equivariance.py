"""EQ-VAE's equivariance regularization: decode scaled and turned latents, compare with the scaled and turned image.

https://arxiv.org/abs/2502.09509, section 3.2; official function `AutoencoderKL.training_step` of zelaki/eqvae. The
losses stay as they are. What a step draws decides what they see::

    pixels = draw.pixels(pixels)                        # a smaller image, as such (scale equivariance of the encoder)
    latents = encode(pixels)
    loss(decode(draw.latents(latents)), draw.latents(pixels))

Of discrete tokenizers it is the features before the bottleneck that are transformed: codes cannot be interpolated.
The paper compares neither latents nor what is encoded again: that collapses (table 7). Sizes depend on the draw, so it
is made on the host, by `draw`, before a step is compiled.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Transform:
    """Resizes and then turns ``(..., H, W, C)``, latents or pixels.

    Attributes:
      scale: factors of height and width.
      turns: quarter turns clockwise.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    turns: int = 0

    def __call__(self, x: Array) -> Array:  # (... h w c) -> (... h' w' c)
        x = resize(x, self.scale)
        return jnp.rot90(x, self.turns, axes=(-2, -3)) if self.turns % 4 else x


@dataclasses.dataclass(frozen=True)
class Draw:
    """What one pass through the autoencoder does: `Transform` of its input, and of latents and target."""

    pixels: Transform | Rescale = Transform()
    latents: Transform = Transform()


@dataclasses.dataclass(frozen=True)
class Equivariance:
    """How draws are distributed.

    Attributes:
      probability: of a pass that transforms latents and target.
      smaller: of the other passes, the share that sees a smaller image (not turned).
      scales: factors, equally likely. They must lead to whole latents: 8/32 ... 31/32 is for latents of 32x32.
      anisotropic: height and width are scaled independently; not where only the image is smaller.
    """

    probability: float = 0.5
    smaller: float = 0.25
    scales: tuple[float, ...] = tuple(k / 32 for k in range(8, 32))
    anisotropic: bool = False

    def draw(self, rng: np.random.Generator) -> Draw:
        """What the next pass does. The probability is that of the code; the paper's is of its contrary."""
        if rng.random() < self.probability:
            height = _any(self.scales, rng)
            width = _any(self.scales, rng) if self.anisotropic else height
            return Draw(latents=Transform((height, width), int(rng.integers(1, 4))))
        if rng.random() < self.smaller:
            return Draw(pixels=Transform((_any(self.scales, rng),) * 2))
        return Draw()


@dataclasses.dataclass(frozen=True)
class Rescale:
    """Resizes ``(..., H, W, C)``, height and width by one factor, see `resize_between_corners`."""

    scale: float

    def __call__(self, x: Array) -> Array:  # (... h w c) -> (... h' w' c)
        return x if self.scale == 1 else resize_between_corners(x, self.scale)


@dataclasses.dataclass(frozen=True)
class Resolutions:
    """Every pass sees its clips at one of several resolutions (OmniTokenizer, https://arxiv.org/abs/2406.09399).

    Attributes:
      scales: factors of height and width, equally likely.
    """

    scales: tuple[float, ...]

    def draw(self, rng: np.random.Generator) -> Draw:
        """What the next pass does."""
        return Draw(pixels=Rescale(_any(self.scales, rng)))


def resize(x: Array, scale: tuple[float, float]) -> Array:
    """Bilinear, without antialiasing: ``(..., H, W, C) -> (..., floor(H * scale[0]), floor(W * scale[1]), C)``.

    PyTorch's ``interpolate(scale_factor=scale, mode="bilinear")``: position i reads at ``(i + 0.5) / scale - 0.5``, by
    the scale as given and not by the ratio of the sizes. Computed in float32.
    """
    if x.ndim < 3:
        raise ValueError(f"resize needs (..., height, width, channels), got shape {x.shape}.")
    dtype = x.dtype
    for axis, factor in zip((-3, -2), scale, strict=True):
        if factor == 1:
            continue
        weights = _weights(x.shape[axis], factor)
        x = jnp.tensordot(weights, x.astype(jnp.float32), ((1,), (x.ndim + axis,)), precision=jax.lax.Precision.HIGHEST)
        x = jnp.moveaxis(x, 0, axis)
    return x.astype(dtype)


def resize_between_corners(x: Array, scale: float) -> Array:
    """Bilinear, without antialiasing; the corner pixels keep their colours: ``(..., H, W, C) -> (..., H', W', C)``.

    PyTorch's ``interpolate(mode="bilinear", align_corners=True)`` to floor(H * scale) and floor(W * scale): position i
    reads at ``i * (H - 1) / (H' - 1)``. Computed in float32.
    """
    dtype = x.dtype
    for axis in (-3, -2):
        old = x.shape[axis]
        new = int(old * scale)
        if new < 1:
            raise ValueError(f"scale {scale} leaves nothing of {old} positions.")
        at = np.arange(new, dtype=np.float32) * np.float32((old - 1) / max(new - 1, 1))
        weights = _between(at, old)
        x = jnp.tensordot(weights, x.astype(jnp.float32), ((1,), (x.ndim + axis,)), precision=jax.lax.Precision.HIGHEST)
        x = jnp.moveaxis(x, 0, axis)
    return x.astype(dtype)


def _weights(old: int, factor: float) -> np.ndarray:
    """``(new, old)`` float32."""
    new = math.floor(old * factor)
    if new < 1:
        raise ValueError(f"scale {factor} leaves nothing of {old} positions.")
    # In float32, like the authors' code: the L1 loss turns an error of 1e-6 of a pixel into another gradient.
    step, half = np.float32(1 / factor), np.float32(0.5)
    return _between(np.maximum(step * (np.arange(new, dtype=np.float32) + half) - half, np.float32(0)), old)


def _between(at: np.ndarray, old: int) -> np.ndarray:
    """Weights of the two neighbours of every place: ``(new,) -> (new, old)`` float32."""
    new = len(at)
    low = np.minimum(np.floor(at).astype(int), old - 1)
    high, part = np.minimum(low + 1, old - 1), at - low
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix, (np.arange(new), low), 1 - part)
    np.add.at(matrix, (np.arange(new), high), part)
    return matrix


def _any(scales: tuple[float, ...], rng: np.random.Generator) -> float:
    return scales[int(rng.integers(len(scales)))]
