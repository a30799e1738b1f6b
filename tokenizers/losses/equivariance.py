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

    pixels: Transform = Transform()
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


def draw(rule: Equivariance, rng: np.random.Generator) -> Draw:
    """What the next pass does. The probability is that of the code; the paper's is of its contrary."""
    if rng.random() < rule.probability:
        height = _scale(rule, rng)
        width = _scale(rule, rng) if rule.anisotropic else height
        return Draw(latents=Transform((height, width), int(rng.integers(1, 4))))
    if rng.random() < rule.smaller:
        return Draw(pixels=Transform((_scale(rule, rng),) * 2))
    return Draw()


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


def _weights(old: int, factor: float) -> np.ndarray:
    """``(new, old)`` float32."""
    new = math.floor(old * factor)
    if new < 1:
        raise ValueError(f"scale {factor} leaves nothing of {old} positions.")
    # In float32, like the authors' code: the L1 loss turns an error of 1e-6 of a pixel into another gradient.
    step, half = np.float32(1 / factor), np.float32(0.5)
    at = np.maximum(step * (np.arange(new, dtype=np.float32) + half) - half, np.float32(0))
    low = np.minimum(np.floor(at).astype(int), old - 1)
    high, part = np.minimum(low + 1, old - 1), at - low
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix, (np.arange(new), low), 1 - part)
    np.add.at(matrix, (np.arange(new), high), part)
    return matrix


def _scale(rule: Equivariance, rng: np.random.Generator) -> float:
    return rule.scales[int(rng.integers(len(rule.scales)))]
