"""PSNR, SSIM and MS-SSIM per item, in the forms the tokenizer papers use. Float32, jit- and shard-friendly.

All functions take two arrays of the same shape, ``(B, T, H, W, C)`` or ``(B, H, W, C)``, with values in
``[0, data_range]``, and return one float32 number per item, ``(B,)``. Nothing is shared between items, so the result
of an item does not depend on how the batch is laid out over devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import pick, unknown

FLOAT32_EPSILON = float(np.finfo(np.float32).eps)

# Wang, Simoncelli, Bovik 2003, "Multiscale structural similarity for image quality assessment", section 3.2.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def psnr(
    reference: jax.Array,
    reconstruction: jax.Array,
    *,
    data_range: float,
    over: str = "item",
    mse_epsilon: float = 0.0,
    root_epsilon: float = FLOAT32_EPSILON,
) -> jax.Array:
    """Peak signal-to-noise ratio in dB, ``20 log10(range / (sqrt(mse + mse_epsilon) + root_epsilon))``.

    Args:
      reference, reconstruction: ``(B, T, H, W, C)`` or ``(B, H, W, C)``, values in ``[0, data_range]``.
      data_range: the peak, 255 or 1.
      over: ``item``: one mean squared error over all pixels of the item (TokenBench); ``frame``: the mean of the
        decibels of the frames (Cosmos-Predict1, VidTok).
      mse_epsilon, root_epsilon: what keeps identical pictures finite, and where the papers differ.

    Returns:
      float32 ``(B,)``.
    """
    if over not in ("item", "frame"):
        raise unknown("PSNR averaging", over, ("item", "frame"))
    reference, reconstruction = _as_videos(reference, reconstruction)
    squared = jnp.square(reference - reconstruction)
    # Two steps, so that a float32 sum never runs over more than one frame.
    frames = jnp.mean(jnp.mean(squared, axis=(3, 4)), axis=2)  # (B, T)
    mse = jnp.mean(frames, axis=1, keepdims=True) if over == "item" else frames
    decibels = 20 * jnp.log10(data_range / (jnp.sqrt(mse + mse_epsilon) + root_epsilon))
    return jnp.mean(decibels, axis=1)


def ssim(
    reference: jax.Array,
    reconstruction: jax.Array,
    *,
    data_range: float,
    window: str = "uniform",
    pool: int = 1,
) -> jax.Array:
    """Structural similarity (Wang et al. 2004), mean over the valid region, the channels and the frames.

    Args:
      reference, reconstruction: ``(B, T, H, W, C)`` or ``(B, H, W, C)``, values in ``[0, data_range]``.
      data_range: the peak, 255 or 1.
      window: ``uniform``: 7x7 box, sample covariance (scikit-image's default, TokenBench, Cosmos-Predict1);
        ``gaussian``: 11x11, sigma 1.5, weighted covariance (VidTok, torchmetrics).
      pool: average pooling before the comparison.

    Returns:
      float32 ``(B,)``.
    """
    kernel, correction = pick("SSIM window", window, WINDOWS)
    reference, reconstruction = _as_videos(reference, reconstruction)
    side = min(reference.shape[2:4]) // pool
    if side < len(kernel):
        raise ValueError(f"SSIM with the {window} window needs at least {len(kernel)} pixels a side, got {side}.")

    def one_frame(pair):
        first, second = (_average_pool(picture, pool) for picture in pair)
        luminance, contrast = _ssim_maps(first, second, kernel, correction, data_range)
        return _mean_of_picture(luminance * contrast).mean(axis=-1)

    return _mean_over_frames(one_frame, reference, reconstruction)


def ms_ssim(
    reference: jax.Array,
    reconstruction: jax.Array,
    *,
    data_range: float,
    weights: tuple[float, ...] = MS_SSIM_WEIGHTS,
) -> jax.Array:
    """Multi-scale SSIM with the 11x11 Gaussian window and the five published scale weights.

    Contrast terms below zero count as zero, odd sizes repeat their last row or column before being halved.

    Args:
      reference, reconstruction: ``(B, T, H, W, C)`` or ``(B, H, W, C)``, values in ``[0, data_range]``.
      data_range: the peak, 255 or 1.
      weights: exponent of each scale, finest first.

    Returns:
      float32 ``(B,)``.
    """
    kernel, correction = WINDOWS["gaussian"]
    reference, reconstruction = _as_videos(reference, reconstruction)
    smallest = ms_ssim_smallest_side(weights)
    if min(reference.shape[2:4]) < smallest:
        raise ValueError(
            f"MS-SSIM of {len(weights)} scales needs at least {smallest} pixels on the shorter side, "
            f"got {reference.shape[2]}x{reference.shape[3]}."
        )

    def one_frame(pair):
        first, second = pair
        product = 1.0
        for scale, weight in enumerate(weights):
            luminance, contrast = _ssim_maps(first, second, kernel, correction, data_range)
            last = scale == len(weights) - 1
            term = _mean_of_picture(luminance * contrast if last else contrast)  # (B, C)
            product = product * jnp.maximum(term, 0.0) ** weight
            if not last:
                first, second = _average_pool(_pad_to_even(first), 2), _average_pool(_pad_to_even(second), 2)
        return product.mean(axis=-1)

    return _mean_over_frames(one_frame, reference, reconstruction)


def ms_ssim_smallest_side(weights: tuple[float, ...] = MS_SSIM_WEIGHTS) -> int:
    """Pixels the shorter side must have so that the window fits into the coarsest scale."""
    return (len(WINDOWS["gaussian"][0]) - 1) * 2 ** (len(weights) - 1) + 1


def _gaussian(size: int, sigma: float) -> tuple[float, ...]:
    weights = [math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return tuple(weight / sum(weights) for weight in weights)


# name -> (separable kernel, factor from weighted to unbiased covariance)
WINDOWS: dict[str, tuple[tuple[float, ...], float]] = {
    "uniform": ((1 / 7,) * 7, 49 / 48),
    "gaussian": (_gaussian(11, 1.5), 1.0),
}


def _as_videos(reference: jax.Array, reconstruction: jax.Array) -> tuple[jax.Array, jax.Array]:
    if reference.shape != reconstruction.shape or reference.ndim not in (4, 5):
        raise ValueError(
            "pixel metrics compare two arrays of one shape (B, T, H, W, C) or (B, H, W, C), "
            f"got {reference.shape} and {reconstruction.shape}."
        )
    videos = [jnp.asarray(array, jnp.float32) for array in (reference, reconstruction)]
    first, second = (video[:, None] if video.ndim == 4 else video for video in videos)
    return first, second


def _mean_over_frames(one_frame: Callable, reference: jax.Array, reconstruction: jax.Array) -> jax.Array:
    # One frame at a time: the filtered maps of a whole clip would need many times its memory.
    frames = jax.lax.map(one_frame, (jnp.moveaxis(reference, 1, 0), jnp.moveaxis(reconstruction, 1, 0)))
    return jnp.mean(frames, axis=0)


def _mean_of_picture(picture: jax.Array) -> jax.Array:
    # (B, H, W, C) -> (B, C)
    return jnp.mean(jnp.mean(picture, axis=2), axis=1)


def _ssim_maps(first, second, kernel, correction, data_range):
    # (B, H, W, C) twice -> luminance and contrast-structure maps over the valid region
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    # Moments about mid-grey: E[x^2] - E[x]^2 then cancels far fewer of the 24 bits.
    middle = data_range / 2
    x, y = first - middle, second - middle
    stacked = jnp.stack([x, y, x * x, y * y, x * y])
    mean_x, mean_y, xx, yy, xy = _filter_valid(stacked, kernel)
    variance_x = correction * (xx - mean_x * mean_x)
    variance_y = correction * (yy - mean_y * mean_y)
    covariance = correction * (xy - mean_x * mean_y)
    mean_x, mean_y = mean_x + middle, mean_y + middle
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance, contrast


def _filter_valid(x: jax.Array, kernel: tuple[float, ...]) -> jax.Array:
    # (..., H, W, C): separable filter by shifted sums, which every backend fuses and no layout change is needed for
    for axis in (x.ndim - 3, x.ndim - 2):
        length = x.shape[axis] - len(kernel) + 1
        x = sum(w * jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i, w in enumerate(kernel))
        # Without the barrier the first pass is fused into the second and computed once per tap of it.
        x = jax.lax.optimization_barrier(x)
    return x


def _average_pool(x: jax.Array, size: int) -> jax.Array:
    if size == 1:
        return x
    batch, height, width, channels = x.shape
    x = x[:, : height // size * size, : width // size * size]
    return x.reshape(batch, height // size, size, width // size, size, channels).mean(axis=(2, 4))


def _pad_to_even(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), mode="edge")
