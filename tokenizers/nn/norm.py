"""Normalizations with float32 statistics and an explicit answer to the question over which axes they run.

Group normalization: https://arxiv.org/abs/1803.08494, layer: https://arxiv.org/abs/1607.06450,
root mean square: https://arxiv.org/abs/1910.07467. Unit vectors are the queries and keys of cosine attention,
https://arxiv.org/abs/2010.04245.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def group_normalize(x: Array, num_groups: int, *, epsilon: float, per_frame: bool = False) -> Array:
    """Zero mean and unit variance per sample (or frame) and group of channels; the functional core of `GroupNorm`.

    Two passes over sums per channel, which are combined to groups on the small ``(B, C)`` array: a large mean costs no
    digits, the channel axis is never split, and under spatial sharding at most ``(B, T, C)`` numbers are reduced. One
    axis after the other: the sums are shorter, so more exact, and on CPU twice as fast as over all axes at once.

    Args:
      x: ``(B, ..., C)``; with ``per_frame``, ``(B, T, ..., C)``.
      num_groups: must divide C.
      epsilon: added to the variance.
      per_frame: statistics of every frame alone (causal) instead of the whole clip.

    Returns:
      float32, the shape of ``x``.
    """
    channels = x.shape[-1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the number of channels {channels}; got {num_groups}.")
    first = 2 if per_frame else 1
    if x.ndim <= first:
        raise ValueError(f"group normalization with per_frame={per_frame} got an array of shape {x.shape}.")
    x = x.astype(jnp.float32)
    centered = x - _group_mean(_mean(x, first), num_groups)
    variance = _group_mean(_mean(jnp.square(centered), first), num_groups)
    return centered * jax.lax.rsqrt(variance + epsilon)


def _mean(x: Array, first: int) -> Array:
    """Over all axes from ``first`` to the one before the channels, which are kept with size one."""
    for axis in reversed(range(first, x.ndim - 1)):
        x = x.mean(axis, keepdims=True)
    return x


def _group_mean(per_channel: Array, num_groups: int) -> Array:
    shape = per_channel.shape
    grouped = per_channel.reshape(*shape[:-1], num_groups, shape[-1] // num_groups).mean(-1, keepdims=True)
    return jnp.broadcast_to(grouped, (*shape[:-1], num_groups, shape[-1] // num_groups)).reshape(shape)


class _Affine(nn.Module):
    """Fields and parameters that the norms share.

    Attributes:
      epsilon: added to the variance (or mean square); the smallest length, in `UnitNorm`.
      use_scale: multiplies with ``scale`` ``(C,)``, float32, initially one.
      use_bias: adds ``bias`` ``(C,)``, float32, initially zero.
      dtype: of the result; ``None`` is that of the input. Statistics are float32 whatever it is.
    """

    epsilon: float = 1e-6
    use_scale: bool = True
    use_bias: bool = True
    dtype: Any = None

    def finish(self, normalized: Array, x: Array) -> Array:
        channels = x.shape[-1:]
        if self.use_scale:
            normalized = normalized * self.param("scale", nn.initializers.ones_init(), channels, jnp.float32)
        if self.use_bias:
            normalized = normalized + self.param("bias", nn.initializers.zeros_init(), channels, jnp.float32)
        return normalized.astype(self.dtype or x.dtype)


class GroupNorm(_Affine):
    """Group normalization over space and, unless ``per_frame``, over the time of the clip.

    Attributes:
      num_groups: must divide the channels; 1 is a layer norm over space and channels.
      per_frame: every frame of ``(B, T, H, W, C)`` has its own statistics, as causal networks need; an input without a
        time axis, ``(B, H, W, C)``, is a batch of single frames either way.
    """

    num_groups: int = 32
    per_frame: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b [t] h w c) or (b n c) -> same
        per_frame = self.per_frame and x.ndim > 4
        return self.finish(group_normalize(x, self.num_groups, epsilon=self.epsilon, per_frame=per_frame), x)


class LayerNorm(_Affine):
    """Layer normalization over the channels of each position."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... c) -> same
        centered = x.astype(jnp.float32)
        centered = centered - centered.mean(-1, keepdims=True)
        variance = jnp.square(centered).mean(-1, keepdims=True)
        return self.finish(centered * jax.lax.rsqrt(variance + self.epsilon), x)


class RMSNorm(_Affine):
    """Division by the root mean square over the channels of each position; no bias unless asked for."""

    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... c) -> same
        wide = x.astype(jnp.float32)
        return self.finish(wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon), x)


class UnitNorm(_Affine):
    """Division by the Euclidean length over the channels of each position; no bias unless asked for."""

    epsilon: float = 1e-12
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... c) -> same
        wide = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        return self.finish(wide * jax.lax.rsqrt(jnp.maximum(square, self.epsilon**2)), x)
