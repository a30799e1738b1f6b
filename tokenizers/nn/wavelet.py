"""Haar wavelets in two and three dimensions as lossless patchers.

Sub-bands are the slow part of the new channels and the last level is the slowest, as in the Cosmos tokenizer
(https://arxiv.org/abs/2501.03575, modules/patching.py of NVIDIA/Cosmos-Tokenizer): one level turns C channels into
``(band, C)`` with band = 2 * high_w + high_h in two and 4 * high_t + 2 * high_h + high_w in three dimensions.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import unknown
from .conv import starts_clip
from .resample import repeat_first_frame

Array = jax.Array

SCALES = ("orthonormal", "average")
ODD = ("error", "reflect")

# The order of the sub-bands: the axes of their frequencies, slowest first.
_BAND_ORDER = {2: (1, 0), 3: (0, 1, 2)}


def haar_2d(x: Array, *, levels: int = 1, scale: str = "orthonormal", odd: str = "error") -> Array:
    """Forward transform of every image or frame: ``(..., H, W, C)`` -> ``(..., H / 2^l, W / 2^l, 4^l C)``.

    Args:
      x: float.
      levels: how many times the transform is applied, each time to all channels of the level before.
      scale: ``orthonormal`` keeps the sum of squares; ``average`` makes the lowest band the mean of its block (Cosmos).
      odd: what to do with an axis of odd size at some level: ``error``, or ``reflect`` adds one reflected element at
        its end (which the inverse returns too).
    """
    return _forward(x, 2, levels, scale, odd)


def inverse_haar_2d(x: Array, *, levels: int = 1, scale: str = "orthonormal") -> Array:
    """Inverse of `haar_2d`: ``(..., H, W, 4^l C)`` -> ``(..., 2^l H, 2^l W, C)``."""
    return _inverse(x, 2, levels, scale)


def haar_3d(
    x: Array,
    *,
    levels: int = 1,
    scale: str = "orthonormal",
    odd: str = "error",
    first_frame_alone: bool = False,
) -> Array:
    """Forward transform of a clip: ``(B, T, H, W, C)`` -> ``(B, T / 2^l, H / 2^l, W / 2^l, 8^l C)``.

    ``first_frame_alone`` repeats the first frame to fill a block of its own: ``1 + k * 2^l`` frames become ``1 + k``,
    and no block holds the first frame and later ones. Other arguments as in `haar_2d`.
    """
    x = repeat_first_frame(x, 2**levels - 1) if first_frame_alone else x
    return _forward(x, 3, levels, scale, odd)


def inverse_haar_3d(x: Array, *, levels: int = 1, scale: str = "orthonormal", first_frame_alone: bool = False) -> Array:
    """Inverse of `haar_3d`: ``(B, T, H, W, 8^l C)`` -> ``(B, 2^l T, 2^l H, 2^l W, C)``; alone, ``1 + 2^l (T - 1)``."""
    x = _inverse(x, 3, levels, scale)
    return x[:, 2**levels - 1 :] if first_frame_alone else x


def _forward(x: Array, rank: int, levels: int, scale: str, odd: str) -> Array:
    _checked("Haar scale", scale, SCALES)
    _checked("treatment of odd sizes", odd, ODD)
    if not any(size % 2**levels for size in x.shape[-1 - rank : -1]):
        return _analysed(x, rank, levels, scale)
    for _ in range(levels):
        sizes = x.shape[-1 - rank : -1]
        if any(size % 2 for size in sizes):
            if odd == "error":
                raise ValueError(f"{levels} Haar levels need even sizes at every level; got {sizes} at one of them.")
            ends = tuple((0, size % 2) for size in sizes)
            x = jnp.pad(x, ((0, 0),) * (x.ndim - 1 - rank) + ends + ((0, 0),), mode="reflect")
        x = _analysed(x, rank, 1, scale)
    return x


def _inverse(x: Array, rank: int, levels: int, scale: str) -> Array:
    _checked("Haar scale", scale, SCALES)
    if x.shape[-1] % 2 ** (rank * levels):
        raise ValueError(f"{levels} Haar levels need channels divisible by {2 ** (rank * levels)}; got {x.shape[-1]}.")
    return _synthesized(x, rank, levels, scale)


# All levels are one matrix product over the elements of a block, whose columns stay on the axis of the width until
# then. A TPU pads the last axis of an array to 128: with blocks cut out of the width its last axis would be the three
# channels of a pixel, and one clip of 8 x 2160 x 3840 would take 47 GiB.


def _analysed(x: Array, rank: int, levels: int, scale: str) -> Array:
    """``(..., H, W, C)`` -> ``(..., H / p, W / p, p^rank C)``, p = 2^levels, which divides the sizes."""
    lead, sizes, channels = x.shape[: -1 - rank], x.shape[-1 - rank : -1], x.shape[-1]
    n, side = len(lead), 2**levels
    x = x.reshape(*lead, *(k for size in sizes[:-1] for k in (size // side, side)), sizes[-1], channels)
    blocks, elements = range(n, n + 2 * rank - 2, 2), range(n + 1, n + 2 * rank - 2, 2)
    x = x.transpose(*range(n), *blocks, n + 2 * rank - 2, *elements, n + 2 * rank - 1)
    matrix = _matrix(rank, levels, channels, 2.0 ** (-rank / 2) if scale == "orthonormal" else 2.0**-rank)
    x = x.reshape(*lead, *(size // side for size in sizes), matrix.shape[0])
    return jnp.matmul(x, jnp.asarray(matrix, x.dtype), precision=jax.lax.Precision.HIGHEST)


def _synthesized(x: Array, rank: int, levels: int, scale: str) -> Array:
    """``(..., H, W, p^rank C)`` -> ``(..., p H, p W, C)``, p = 2^levels."""
    lead, sizes = x.shape[: -1 - rank], x.shape[-1 - rank : -1]
    n, side, channels = len(lead), 2**levels, x.shape[-1] // 2 ** (rank * levels)
    matrix = _matrix(rank, levels, channels, 2.0 ** (-rank / 2) if scale == "orthonormal" else 1.0)
    x = jnp.matmul(x, jnp.asarray(matrix.T, x.dtype), precision=jax.lax.Precision.HIGHEST)
    x = x.reshape(*lead, *sizes[:-1], sizes[-1] * side, *(side,) * (rank - 1), channels)
    paired = [axis for i in range(rank - 1) for axis in (n + i, n + rank + i)]
    x = x.transpose(*range(n), *paired, n + rank - 1, n + 2 * rank - 1)
    return x.reshape(*lead, *(size * side for size in sizes), channels)


@functools.cache
def _matrix(rank: int, levels: int, channels: int, factor: float) -> np.ndarray:
    """``(elements of a block, bands)``, each times the channels; elements column by column, a column row by row."""
    sides = "abc"[:rank]
    signs = functools.reduce(np.multiply.outer, [np.array([[1, 1], [1, -1]])] * rank)  # (element, frequency) per axis
    order = (*range(0, 2 * rank, 2), *(2 * axis + 1 for axis in _BAND_ORDER[rank]))
    once = factor * signs.transpose(order).reshape(*(2,) * rank, -1)
    matrix = np.ones((1,) * (rank + 1))
    for _ in range(levels):  # the blocks of the last level are the largest, its bands the slowest
        outer = [k for side in sides for k in (side, side.upper())]
        pairs = np.einsum(f"{sides}y,{sides.upper()}z->{''.join(outer)}yz", once, matrix)
        matrix = pairs.reshape(*(2 * size for size in matrix.shape[:rank]), -1)
    matrix = np.moveaxis(matrix, rank - 1, 0).reshape(-1, matrix.shape[-1])
    return np.kron(matrix, np.eye(channels)).astype(np.float32)


def _checked(what: str, value: str, accepted: tuple[str, ...]) -> str:
    if value not in accepted:
        raise unknown(what, value, accepted)
    return value


class CausalHaar3d(nn.Module):
    """`haar_3d` with the first frame alone; streams (later chunks hold ``k * 2^levels`` frames)."""

    levels: int = 1
    scale: str = "orthonormal"
    odd: str = "error"

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+k*p h w c) -> (b 1+k h/p w/p p^3*c)
        return haar_3d(x, levels=self.levels, scale=self.scale, odd=self.odd, first_frame_alone=starts_clip(self))


class InverseCausalHaar3d(nn.Module):
    """`inverse_haar_3d` with the first frame alone; streams."""

    levels: int = 1
    scale: str = "orthonormal"

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+k h w p^3*c) -> (b 1+k*p p*h p*w c)
        return inverse_haar_3d(x, levels=self.levels, scale=self.scale, first_frame_alone=starts_clip(self))
