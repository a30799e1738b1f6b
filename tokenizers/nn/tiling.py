"""Large images in overlapping tiles whose overlaps are cross-faded: memory follows the tile, not the image.

The scheme of diffusers' `AutoencoderKL.tiled_encode` and `tiled_decode`. Tiles do not see each other (norms and
attention run within one), so the result is close to that of the whole image and not equal to it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def tiled(function: Callable[[Array], Array], x: Array, *, tile: int, stride: int, blend: int, keep: int) -> Array:
    """Applies a function that changes sizes by a fixed factor to tiles of ``x`` and puts the results together.

    Every result is faded into the one above it and then into the one on its left over ``blend`` rows and columns
    (those neighbours have been faded in turn), and its first ``keep`` rows and columns are used. Tiles at the end may
    be smaller.

    Args:
      function: ``(B, h, w, C) -> (B, f * h, f * w, D)``.
      x: ``(B, H, W, C)``.
      tile: side of the tiles.
      stride: distance between them, at most ``tile``.
      blend: rows and columns of a result that are faded.
      keep: rows and columns of a result that are used: ``f * stride``, so that they meet.

    Returns:
      ``(B, f * H, f * W, D)``.
    """
    rows: list[list[Array]] = []
    for top in range(0, x.shape[1], stride):
        row: list[Array] = []
        for left in range(0, x.shape[2], stride):
            y = function(x[:, top : top + tile, left : left + tile])
            if rows:
                y = fade(rows[-1][len(row)], y, blend, axis=1)
            if row:
                y = fade(row[-1], y, blend, axis=2)
            row.append(y)
        rows.append(row)
    return jnp.concatenate([jnp.concatenate([y[:, :keep, :keep] for y in row], axis=2) for row in rows], axis=1)


def encode_in_tiles(function: Callable[[Array], Array], pixels: Array, *, tile: int, side: int) -> Array:
    """`tiled` for an encoder that makes one latent of ``side`` x ``side`` pixels: a quarter of the tiles overlaps.

    Args:
      function: ``(B, h, w, C) -> (B, h / side, w / side, D)``.
      pixels: ``(B, H, W, C)``; taken whole where they are not larger than a tile.
      tile: side of the tiles, in pixels.
      side: pixels per latent.
    """
    if max(pixels.shape[1:3]) <= tile:
        return function(pixels)
    latents = tile // side
    blend = int(latents * 0.25)
    return tiled(function, pixels, tile=tile, stride=int(tile * 0.75), blend=blend, keep=latents - blend)


def decode_in_tiles(function: Callable[[Array], Array], latents: Array, *, tile: int, side: int) -> Array:
    """`tiled` for the decoder of such latents; arguments as for `encode_in_tiles`."""
    small = tile // side
    if max(latents.shape[1:3]) <= small:
        return function(latents)
    blend = int(tile * 0.25)
    return tiled(function, latents, tile=small, stride=int(small * 0.75), blend=blend, keep=tile - blend)


def fade(before: Array, after: Array, extent: int, axis: int) -> Array:
    """``after`` with its first ``extent`` elements along the axis faded in from the last ones of ``before``."""
    extent = min(extent, before.shape[axis], after.shape[axis])
    ramp = (jnp.arange(extent, dtype=after.dtype) / max(extent, 1)).reshape(-1, *(1,) * (after.ndim - 1 - axis))
    old = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    new, rest = jnp.split(after, (extent,), axis=axis)
    return jnp.concatenate([old * (1 - ramp) + new * ramp, rest], axis=axis)
