"""Position encodings: fixed sines and cosines, learned tables that fit other grids, rotary embeddings.

Fixed: https://arxiv.org/abs/1706.03762, in two dimensions as in MAE, https://arxiv.org/abs/2111.06377.
Rotary: https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import pick

Array = jax.Array


# -------------------------------------------------------------------------------------------------- sines and cosines


def sincos_1d(positions: Any, dim: int, *, theta: float = 10000.0, cos_first: bool = False) -> np.ndarray:
    """Sines then cosines of ``position * theta ** (-2 i / dim)``: ``(...)`` -> ``(..., dim)`` float32, dim even."""
    if dim % 2:
        raise ValueError(f"sine and cosine channels come in pairs: dim must be even; got {dim}.")
    angles = np.asarray(positions, np.float64)[..., None] * theta ** (-np.arange(dim // 2) / (dim / 2))
    halves = [np.cos(angles), np.sin(angles)] if cos_first else [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=-1).astype(np.float32)


def sincos(
    grid: Sequence[int],
    dim: int,
    *,
    theta: float = 10000.0,
    axis_dims: Sequence[int] | None = None,
    axis_order: Sequence[int] | None = None,
    cos_first: bool = False,
) -> np.ndarray:
    """Fixed encoding of a 1D, 2D or 3D grid: ``(*grid, dim)``, float32.

    Args:
      grid: sizes, e.g. ``(H, W)`` or ``(T, H, W)``.
      dim: channels.
      theta: the largest wavelength over 2 pi.
      axis_dims: channels of each axis, sum ``dim``; ``None`` is equal parts.
      axis_order: the axes in the order of their channels; ``None`` is the order of ``grid``. MAE, DiT and their family
        put the width first: ``(1, 0)``.
      cos_first: cosines before sines.
    """
    rank = len(grid)
    dims = tuple(axis_dims) if axis_dims is not None else (dim // rank,) * rank
    if len(dims) != rank or sum(dims) != dim:
        raise ValueError(f"channels {dims} of the axes of grid {tuple(grid)} must sum to dim {dim}.")
    parts = []
    for axis in axis_order or range(rank):
        part = sincos_1d(np.arange(grid[axis]), dims[axis], theta=theta, cos_first=cos_first)
        shape = [1] * rank + [dims[axis]]
        shape[axis] = grid[axis]
        parts.append(np.broadcast_to(part.reshape(shape), (*grid, dims[axis])))
    return np.concatenate(parts, axis=-1)


# ----------------------------------------------------------------------------------------------------- learned tables


class LearnedPositions(nn.Module):
    """Adds a learned table ``embedding`` ``(*grid, C)``, float32, interpolated when the input has another grid.

    Attributes:
      grid: the sizes the table is stored in.
      method: see `interpolate_table`.
      dtype: of the result; ``None`` is that of the input.
    """

    grid: tuple[int, ...]
    method: str = "cubic"
    embedding_init: Callable = nn.initializers.normal(0.02)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b *grid' c) -> same
        rank = len(self.grid)
        if x.ndim < rank + 1:
            raise ValueError(f"positions of grid {self.grid} got an array of shape {x.shape}.")
        table = self.param("embedding", self.embedding_init, (*self.grid, x.shape[-1]), jnp.float32)
        dtype = self.dtype or x.dtype
        return x.astype(dtype) + interpolate_table(table, x.shape[-1 - rank : -1], method=self.method).astype(dtype)


def interpolate_table(table: Array, grid: Sequence[int], *, method: str = "cubic") -> Array:
    """Resizes ``(*old_grid, C)`` to ``(*grid, C)``; the identity on axes whose size is the same.

    Args:
      table: float.
      grid: new sizes.
      method: ``linear``, or ``cubic`` with the coefficient -0.75 (as PyTorch's ``interpolate``; `jax.image.resize` has
        -0.5). Pixel centres at halves, edges repeated, no antialiasing.
    """
    pick("interpolation method", method, _KERNELS)
    if table.ndim != len(grid) + 1:
        raise ValueError(f"a table of shape {table.shape} cannot be resized to the grid {tuple(grid)}.")
    for axis, size in enumerate(grid):
        if table.shape[axis] != size:
            weights = _resize_matrix(table.shape[axis], size, method)
            resized = jnp.tensordot(weights, table, ((1,), (axis,)), precision=jax.lax.Precision.HIGHEST)
            table = jnp.moveaxis(resized, 0, axis)
    return table


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(distance), 0.0)


_KERNELS = {"cubic": _cubic, "linear": _linear}


def _resize_matrix(old: int, new: int, method: str) -> np.ndarray:
    """``(new, old)`` float32 weights of the old samples in the new ones."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centres)[:, None] + np.arange(-1, 3)
    weights = _KERNELS[method](centres[:, None] - taps)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), weights)
    return matrix.astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- rotary


def rotary_frequencies(dim: int, *, theta: float = 10000.0) -> np.ndarray:
    """``theta ** (-2 i / dim)`` for the dim / 2 pairs of channels, float64."""
    if dim % 2:
        raise ValueError(f"rotary channels come in pairs: dim must be even; got {dim}.")
    return theta ** (-np.arange(dim // 2) / (dim / 2))


def rotary_angles(positions: Any, dim: int, *, theta: float = 10000.0) -> np.ndarray:
    """Angles of positions on a line: ``(N,)`` -> ``(N, dim / 2)`` float32. Positions may be fractions or negative."""
    return (np.asarray(positions, np.float64)[..., None] * rotary_frequencies(dim, theta=theta)).astype(np.float32)


def axial_rotary_angles(
    grid: Sequence[int],
    axis_dims: Sequence[int],
    *,
    theta: float = 10000.0,
    positions: Sequence[Any] | None = None,
) -> np.ndarray:
    """Angles of a 2D or 3D grid, each axis turning channels of its own.

    Args:
      grid: sizes, e.g. ``(H, W)`` or ``(T, H, W)``.
      axis_dims: channels each axis turns, in the order of ``grid``; together at most those of a head.
      theta: base of the frequencies.
      positions: one sequence per axis in place of ``0, 1, 2, ...``.

    Returns:
      ``(prod(grid), sum(axis_dims) / 2)`` float32, tokens row by row.
    """
    if len(axis_dims) != len(grid) or (positions is not None and len(positions) != len(grid)):
        raise ValueError(f"axis_dims {tuple(axis_dims)} and positions must have one entry per axis of {tuple(grid)}.")
    parts = []
    for axis, (size, dim) in enumerate(zip(grid, axis_dims, strict=True)):
        angles = rotary_angles(np.arange(size) if positions is None else positions[axis], dim, theta=theta)
        shape = [1] * len(grid) + [dim // 2]
        shape[axis] = size
        parts.append(np.broadcast_to(angles.reshape(shape), (*grid, dim // 2)))
    return np.concatenate(parts, axis=-1).reshape(math.prod(grid), -1)


def apply_rotary(x: Array, angles: Any, *, interleaved: bool = False) -> Array:
    """Turns pairs of channels of queries or keys, in float32.

    Args:
      x: ``(..., N, heads, D)``.
      angles: ``(N, R)``, or ``(N, heads, R)`` where heads turn differently, with 2 R <= D; channels from 2 R on pass as
        they are.
      interleaved: pairs are channels (2 i, 2 i + 1); else (i, i + R).

    Returns:
      The shape and dtype of ``x``.
    """
    pairs = angles.shape[-1]
    if angles.shape[:-1] not in (x.shape[-3:-2], x.shape[-3:-1]) or 2 * pairs > x.shape[-1]:
        raise ValueError(f"rotary angles of shape {angles.shape} do not fit queries or keys of shape {x.shape}.")
    angles = jnp.asarray(angles, jnp.float32)
    angles = angles[:, None] if angles.ndim == 2 else angles
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
    if interleaved:
        paired = turned.reshape(*turned.shape[:-1], pairs, 2)
        first, second = paired[..., 0], paired[..., 1]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    halves = (first * cos - second * sin, first * sin + second * cos)
    turned = jnp.stack(halves, -1).reshape(turned.shape) if interleaved else jnp.concatenate(halves, -1)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1)
