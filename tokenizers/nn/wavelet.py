"""Haar wavelets in two and three dimensions as lossless patchers.

Sub-bands are the slow part of the new channels and the last level is the slowest, as in the Cosmos tokenizer
(https://arxiv.org/abs/2501.03575, modules/patching.py of NVIDIA/Cosmos-Tokenizer): one level turns C channels into
``(band, C)`` with band = 2 * high_w + high_h in two and 4 * high_t + 2 * high_h + high_w in three dimensions.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import unknown
from .conv import starts_clip
from .resample import repeat_first_frame

Array = jax.Array

SCALES = ("orthonormal", "average")
ODD = ("error", "reflect")

# The order of the sub-bands: the axes of one block, slowest first.
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
    factor = 2.0 ** (-rank / 2) if _checked("Haar scale", scale, SCALES) == "orthonormal" else 2.0**-rank
    _checked("treatment of odd sizes", odd, ODD)
    for _ in range(levels):
        sizes = x.shape[-1 - rank : -1]
        if any(size % 2 for size in sizes):
            if odd == "error":
                raise ValueError(f"{levels} Haar levels need even sizes at every level; got {sizes} at one of them.")
            ends = tuple((0, size % 2) for size in sizes)
            x = jnp.pad(x, ((0, 0),) * (x.ndim - 1 - rank) + ends + ((0, 0),), mode="reflect")
        x = _join_bands(_butterfly(_split_blocks(x, rank), rank), rank) * jnp.asarray(factor, x.dtype)
    return x


def _inverse(x: Array, rank: int, levels: int, scale: str) -> Array:
    factor = 2.0 ** (-rank / 2) if _checked("Haar scale", scale, SCALES) == "orthonormal" else 1.0
    if x.shape[-1] % 2 ** (rank * levels):
        raise ValueError(f"{levels} Haar levels need channels divisible by {2 ** (rank * levels)}; got {x.shape[-1]}.")
    for _ in range(levels):
        x = _join_blocks(_butterfly(_split_bands(x, rank), rank), rank) * jnp.asarray(factor, x.dtype)
    return x


def _butterfly(x: Array, rank: int) -> Array:
    """Sums and differences along the ``rank`` axes of size two before the channels; twice applied, 2^rank times x."""
    for axis in range(x.ndim - 1 - rank, x.ndim - 1):
        even, odd = (jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in (0, 1))
        x = jnp.stack([even + odd, even - odd], axis)
    return x


def _split_blocks(x: Array, rank: int) -> Array:
    """``(..., H, W, C)`` -> ``(..., H / 2, W / 2, 2, 2, C)``."""
    lead, sizes = x.shape[: -1 - rank], x.shape[-1 - rank : -1]
    n = len(lead)
    x = x.reshape(*lead, *(k for size in sizes for k in (size // 2, 2)), x.shape[-1])
    outer, inner = range(n, n + 2 * rank, 2), range(n + 1, n + 2 * rank, 2)
    return x.transpose(*range(n), *outer, *inner, n + 2 * rank)


def _join_blocks(x: Array, rank: int) -> Array:
    n = x.ndim - 1 - 2 * rank
    sizes = x.shape[n : n + rank]
    paired = [axis for i in range(rank) for axis in (n + i, n + rank + i)]
    return x.transpose(*range(n), *paired, x.ndim - 1).reshape(*x.shape[:n], *(2 * s for s in sizes), x.shape[-1])


def _join_bands(x: Array, rank: int) -> Array:
    """``(..., H, W, 2, 2, C)`` -> ``(..., H, W, 4 C)`` in the order of the sub-bands."""
    n = x.ndim - 1 - rank
    x = x.transpose(*range(n), *(n + axis for axis in _BAND_ORDER[rank]), x.ndim - 1)
    return x.reshape(*x.shape[:n], -1)


def _split_bands(x: Array, rank: int) -> Array:
    n = x.ndim - 1
    x = x.reshape(*x.shape[:-1], *(2,) * rank, -1)
    # Both orders are their own inverse.
    return x.transpose(*range(n), *(n + axis for axis in _BAND_ORDER[rank]), n + rank)


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
