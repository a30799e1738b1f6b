"""Value ranges, ranks and channel order of pixels: checked and converted here and nowhere else.

Inside the library pixels are float32 in [-1, 1], RGB, channels last.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .types import Spec

# Normalised pixels may overshoot [-1, 1] (sharpening, reconstructions); values this far out are another range.
_LARGEST_PLAUSIBLE = 16.0

# ImageNet's mean colour and its standard deviations, of values in [0, 1]: what many networks normalize with.
IMAGENET_MEAN, IMAGENET_STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))


def to_float(pixels) -> jax.Array:
    """uint8 in [0, 255] -> float32 in [-1, 1]; floats are taken to be in [-1, 1] already and pass unclipped.

    Raises:
      ValueError: for another dtype, or for concrete floats that are clearly on the 0..255 scale.
    """
    check_values(pixels)
    if pixels.dtype == jnp.uint8:
        return jnp.asarray(pixels).astype(jnp.float32) * np.float32(1 / 127.5) - 1.0
    return jnp.asarray(pixels).astype(jnp.float32)


def to_uint8(pixels) -> jax.Array:
    """float in [-1, 1] -> uint8 in [0, 255], clipped and rounded to the nearest level."""
    return jnp.round((jnp.clip(jnp.asarray(pixels, jnp.float32), -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def check(pixels, channels: int = 3) -> None:
    """Refuses shapes other than ``(B, H, W, channels)``, ``(B, T, H, W, channels)``, and what `to_float` refuses."""
    shape = tuple(pixels.shape)
    if len(shape) not in (4, 5):
        hint = " A single image needs a batch axis: pixels[None]." if len(shape) == 3 else ""
        raise ValueError(
            f"pixels have shape {shape}; accepted: (B, H, W, {channels}) images or (B, T, H, W, {channels}) "
            f"videos.{hint}"
        )
    if shape[-1] != channels:
        first = shape[1] == channels or (len(shape) == 5 and shape[2] == channels)
        hint = " They look channels-first: move the channel axis to the end." if first else ""
        raise ValueError(f"pixels have shape {shape}: the last axis must hold {channels} channels (RGB).{hint}")
    if 0 in shape:
        raise ValueError(f"pixels have shape {shape}: no axis may be empty.")
    check_values(pixels)


def check_values(pixels) -> None:
    """Refuses dtypes other than uint8 and floats, and concrete floats on the 0..255 scale (traced: no value)."""
    if pixels.dtype == jnp.uint8:
        return
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(f"pixels are {pixels.dtype}; accepted: uint8 in [0, 255] or floating point in [-1, 1].")
    if isinstance(pixels, jax.core.Tracer) or not pixels.size:
        return
    largest = float(abs(pixels).max())
    if largest > _LARGEST_PLAUSIBLE:
        raise ValueError(
            f"floating-point pixels reach {largest:g}, but floats must be in [-1, 1]; "
            "pass uint8 for values in [0, 255], or scale them with x / 127.5 - 1."
        )


def fitted(spec: Spec, input_size: tuple[int, int] | None, shape: tuple[int, ...], strict: bool) -> tuple[int, ...]:
    """The smallest shape that a tokenizer takes and that holds ``shape``.

    Args:
      spec: of the tokenizer.
      input_size: the one ``(H, W)`` that its module takes; ``None`` is every multiple of the compression.
      shape: ``(B, H, W, C)`` or ``(B, T, H, W, C)``.
      strict: refuse any other shape than the fitting ones.

    Raises:
      ValueError: says the rule and the nearest larger shape.
    """
    time, height, width = spec.compression
    wanted = list(shape)
    rules = []
    if spec.video and len(shape) == 5 and not spec.fills_front:
        first = int(spec.first_frame_alone)
        wanted[1] = first + -(-(shape[1] - first) // time) * time
        rules.append(f"frames must be {'1 + ' * first}{time} k")
    if strict and spec.video and len(shape) == 4 and time > 1 and not spec.first_frame_alone:
        raise ValueError(f"images, pixels of shape {shape}, do not fit: frames must be {time} k; repeat the image.")
    if input_size is not None:
        wanted[-3:-1] = input_size
        rules.append(f"height and width must be {input_size[0]} and {input_size[1]}")
    else:
        wanted[-3], wanted[-2] = -(-shape[-3] // height) * height, -(-shape[-2] // width) * width
        rules.append(f"heights must be multiples of {height} and widths of {width}")
    small = any(want < size for want, size in zip(wanted, shape, strict=True))
    if small or (strict and tuple(wanted) != shape):
        near = "resize them first" if small else f"the nearest larger shape is {tuple(wanted)}"
        raise ValueError(f"pixels of shape {shape} do not fit: {', '.join(rules)}; {near}.")
    return tuple(wanted)


def cropped(spec: Spec, decoded, shape: tuple[int, ...]):
    """Decoded pixels cut to the rank, frame count and size of the input, whose shape is given."""
    if decoded.ndim > len(shape):
        decoded = decoded[:, 0]
    if spec.fills_front and len(shape) == 5:
        decoded = decoded[:, -shape[1] :]
    return decoded[(slice(None), *(slice(0, size) for size in shape[1:-1]))]


def pad(pixels, shape: tuple[int, ...]):
    """``pixels`` grown to ``shape`` by repeating the last frame, row and column."""
    if tuple(pixels.shape) == shape:
        return pixels
    amounts = [(0, wanted - size) for wanted, size in zip(shape, pixels.shape, strict=True)]
    return jnp.pad(jnp.asarray(pixels), amounts, mode="edge")
