"""Value ranges, ranks and channel order of pixels: checked and converted here and nowhere else.

Inside the library pixels are float32 in [-1, 1], RGB, channels last.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Normalised pixels may overshoot [-1, 1] (sharpening, reconstructions); values this far out are another range.
_LARGEST_PLAUSIBLE = 16.0


def to_float(pixels) -> jax.Array:
    """uint8 in [0, 255] -> float32 in [-1, 1]; floats are taken to be in [-1, 1] already and pass unclipped.

    Raises:
      ValueError: for another dtype, or for concrete floats that are clearly on the 0..255 scale.
    """
    if pixels.dtype == jnp.uint8:
        return jnp.asarray(pixels).astype(jnp.float32) * np.float32(1 / 127.5) - 1.0
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(f"pixels are {pixels.dtype}; accepted: uint8 in [0, 255] or floating point in [-1, 1].")
    if not isinstance(pixels, jax.core.Tracer) and pixels.size:
        largest = float(jnp.max(jnp.abs(pixels)))
        if largest > _LARGEST_PLAUSIBLE:
            raise ValueError(
                f"floating-point pixels reach {largest:g}, but floats must be in [-1, 1]; "
                "pass uint8 for values in [0, 255], or scale them with x / 127.5 - 1."
            )
    return jnp.asarray(pixels).astype(jnp.float32)


def to_uint8(pixels) -> jax.Array:
    """float in [-1, 1] -> uint8 in [0, 255], clipped and rounded to the nearest level."""
    return jnp.round((jnp.clip(jnp.asarray(pixels, jnp.float32), -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def check(pixels, channels: int = 3) -> None:
    """Refuses what is not ``(B, H, W, C)`` or ``(B, T, H, W, C)`` with C = ``channels``."""
    shape = tuple(pixels.shape)
    if len(shape) not in (4, 5):
        raise ValueError(
            f"pixels have shape {shape}; accepted: (B, H, W, {channels}) images or (B, T, H, W, {channels}) videos."
        )
    if shape[-1] != channels:
        first = shape[1] == channels or (len(shape) == 5 and shape[2] == channels)
        hint = " They look channels-first: move the channel axis to the end." if first else ""
        raise ValueError(f"pixels have shape {shape}: the last axis must hold {channels} channels (RGB).{hint}")
    if 0 in shape:
        raise ValueError(f"pixels have shape {shape}: no axis may be empty.")
