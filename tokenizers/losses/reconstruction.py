"""Pixel losses: L1, L2, Charbonnier, smooth L1, and the learned-variance likelihood of latent diffusion.

`RECONSTRUCTION` holds mean losses ``(prediction, target) -> scalar``. `PIXEL_ERROR` holds the same errors per value,
for recipes that add a perceptual term to every pixel before they reduce (`negative_log_likelihood`).
All of them compute in float32 whatever the dtype of the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from ..pixels import IMAGENET_STD

Array = jax.Array
Loss = Callable[[Array, Array], Array]


def absolute_error(prediction: Array, target: Array) -> Array:
    """|prediction - target| per value, float32, the shape of the inputs."""
    return jnp.abs(_difference(prediction, target))


def squared_error(prediction: Array, target: Array) -> Array:
    """(prediction - target)^2 per value, float32, the shape of the inputs."""
    return jnp.square(_difference(prediction, target))


def charbonnier_error(prediction: Array, target: Array, eps: float = 1e-3) -> Array:
    """sqrt((prediction - target)^2 + eps^2) per value: L1 with a parabola of width ``eps`` at zero.

    Charbonnier et al., "Two deterministic half-quadratic regularization algorithms for computed imaging" (1994).
    """
    return jnp.sqrt(jnp.square(_difference(prediction, target)) + eps**2)


def smooth_l1_error(prediction: Array, target: Array, width: float = 0.05) -> Array:
    """|difference| - width / 2 beyond ``width``, and the parabola that continues it smoothly within; per value.

    Huber, https://doi.org/10.1214/aoms/1177703732, divided by the width; ViTok trains with one of 0.05.
    """
    difference = jnp.abs(_difference(prediction, target))
    return jnp.where(difference < width, jnp.square(difference) / (2 * width), difference - width / 2)


def imagenet_error(prediction: Array, target: Array) -> Array:
    """|difference| of ImageNet-normalized colours (VTP) per value, of images ``(..., 3)`` in [-1, 1]."""
    return absolute_error(prediction, target) / (2 * IMAGENET_STD)


def l1(prediction: Array, target: Array) -> Array:
    """Mean absolute error: arrays of one shape -> float32 scalar."""
    return jnp.mean(absolute_error(prediction, target))


def l2(prediction: Array, target: Array) -> Array:
    """Mean squared error: arrays of one shape -> float32 scalar."""
    return jnp.mean(squared_error(prediction, target))


def l1_imagenet(prediction: Array, target: Array) -> Array:
    """Mean `imagenet_error`: images ``(..., 3)`` in [-1, 1] -> float32 scalar."""
    return jnp.mean(imagenet_error(prediction, target))


def charbonnier(prediction: Array, target: Array, eps: float = 1e-3) -> Array:
    """Mean Charbonnier error: arrays of one shape -> float32 scalar."""
    return jnp.mean(charbonnier_error(prediction, target, eps))


def smooth_l1(prediction: Array, target: Array, width: float = 0.05) -> Array:
    """Mean `smooth_l1_error`: arrays of one shape -> float32 scalar."""
    return jnp.mean(smooth_l1_error(prediction, target, width))


PIXEL_ERROR: Mapping[str, Loss] = MappingProxyType(
    {
        "l1": absolute_error,
        "l1_imagenet": imagenet_error,
        "l2": squared_error,
        "charbonnier": charbonnier_error,
        "smooth_l1": smooth_l1_error,
    }
)
RECONSTRUCTION: Mapping[str, Loss] = MappingProxyType(
    {"l1": l1, "l2": l2, "l1_imagenet": l1_imagenet, "charbonnier": charbonnier, "smooth_l1": smooth_l1}
)


def negative_log_likelihood(error: Array, logvar: Array | float = 0.0) -> Array:
    """Likelihood of a reconstruction under one global log-variance, which may be learned.

    ``sum(error / exp(logvar) + logvar) / N``: a sum over the values of an item and a mean over the ``N`` items, so it
    is about H * W * C times the mean error (latent diffusion `contperceptual.py`, VidTok `losses.py`).

    Args:
      error: error per value, ``(N, ...)`` with one item per leading index. Clips are folded into frames first,
        ``(B * T, H, W, C)``, by recipes that count frames. A perceptual distance per item belongs in it:
        ``absolute_error(y, x) + weight * distance[:, None, None, None]``.
      logvar: scalar log-variance; 0 leaves the plain sum.

    Returns:
      float32 scalar.
    """
    if error.ndim < 2:
        raise ValueError(f"negative_log_likelihood needs errors (items, ...), one per value, got shape {error.shape}.")
    logvar = jnp.asarray(logvar, jnp.float32)
    return jnp.sum(error.astype(jnp.float32) * jnp.exp(-logvar) + logvar) / error.shape[0]


def _difference(prediction: Array, target: Array) -> Array:
    # Broadcasting (B, 1, H, W, C) against (B, H, W, C) would give a plausible and wrong number.
    if prediction.shape != target.shape:
        raise ValueError(f"prediction and target must have one shape, got {prediction.shape} and {target.shape}.")
    return prediction.astype(jnp.float32) - target.astype(jnp.float32)
