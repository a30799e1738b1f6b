"""Changing the size of grids: repetition, pooling, strided convolution, space-to-depth, and their causal time variants.

The functions work on the last ``len(factors)`` axes before the channels, so ``(2, 2)`` serves images and every frame of
a clip alike, and ``(2, 2, 2)`` clips. None of them gathers, so sharded axes stay sharded.

Causal time variants keep the first frame apart: ``1 + k * f`` frames go to ``1 + k`` and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import unknown
from .conv import CausalConv3d, Conv2d, Padding, starts_clip
from .lowering import repeat

Array = jax.Array
ORDERS = ("patch_outer", "channel_outer")


def upsample_nearest(x: Array, factors: Sequence[int]) -> Array:
    """Repeats every element ``factors`` times: ``(..., H, W, C)`` -> ``(..., f0 * H, f1 * W, C)``."""
    _split(x, factors)
    return repeat(x, factors)


def average_pool(x: Array, factors: Sequence[int]) -> Array:
    """Mean of blocks of ``factors`` elements, in float32: ``(..., H, W, C)`` -> ``(..., H / f0, W / f1, C)``."""
    blocks, _, _ = _blocks(x, factors)
    axes = tuple(range(blocks.ndim - 1 - len(factors), blocks.ndim - 1))
    return blocks.mean(axes, dtype=jnp.float32).astype(x.dtype)


def space_to_depth(x: Array, factors: Sequence[int], *, order: str = "patch_outer") -> Array:
    """Moves blocks of ``factors`` to the channels: ``(..., H, W, C)`` -> ``(..., H / f0, W / f1, f0 * f1 * C)``.

    Args:
      x: channels last; the factors must divide its sizes.
      factors: block size per axis.
      order: of the new channels, slowest first: ``patch_outer`` is (f0, f1, C), ``channel_outer`` is (C, f0, f1), the
        order of PyTorch's ``pixel_unshuffle``.
    """
    blocks, lead, sizes = _blocks(x, factors)
    if _checked(order) == "channel_outer":
        blocks = jnp.moveaxis(blocks, -1, -1 - len(factors))
    return blocks.reshape(*lead, *sizes, -1)


def depth_to_space(x: Array, factors: Sequence[int], *, order: str = "patch_outer") -> Array:
    """The inverse of `space_to_depth`: ``(..., H, W, f0 * f1 * C)`` -> ``(..., f0 * H, f1 * W, C)``."""
    lead, sizes, channels = _split(x, factors)
    count = 1
    for factor in factors:
        count *= factor
    if channels % count:
        raise ValueError(f"depth_to_space by {tuple(factors)} needs channels divisible by {count}; got {channels}.")
    if _checked(order) == "channel_outer":
        blocks = jnp.moveaxis(x.reshape(*lead, *sizes, channels // count, *factors), -1 - len(factors), -1)
    else:
        blocks = x.reshape(*lead, *sizes, *factors, channels // count)
    n, rank = len(lead), len(factors)
    paired = [axis for i in range(rank) for axis in (n + i, n + rank + i)]
    blocks = blocks.transpose(*range(n), *paired, blocks.ndim - 1)
    sizes = tuple(size * factor for size, factor in zip(sizes, factors, strict=True))
    return blocks.reshape(*lead, *sizes, channels // count)


def repeat_first_frame(x: Array, count: int) -> Array:
    """Puts ``count`` copies of the first frame in front: ``(B, T, H, W, C)`` -> ``(B, count + T, H, W, C)``."""
    return jnp.concatenate([jnp.repeat(x[:, :1], count, axis=1), x], axis=1) if count else x


def causal_space_to_depth(
    x: Array, factors: Sequence[int], *, order: str = "patch_outer", first_frame_alone: bool = True
) -> Array:
    """`space_to_depth` of a clip: ``1 + k * f0`` -> ``1 + k`` frames; the first, repeated, fills a block of its own.

    ``first_frame_alone=False`` is for the later chunks of a stream, which have no first frame.
    """
    x = repeat_first_frame(x, factors[0] - 1) if first_frame_alone else x
    return space_to_depth(x, factors, order=order)


def causal_depth_to_space(
    x: Array, factors: Sequence[int], *, order: str = "patch_outer", first_frame_alone: bool = True
) -> Array:
    """`depth_to_space` of a clip: ``1 + k`` -> ``1 + k * f0`` frames, keeping only the last one of the first block."""
    x = depth_to_space(x, factors, order=order)
    return x[:, factors[0] - 1 :] if first_frame_alone else x


def causal_average_pool_time(x: Array, factor: int, *, first_frame_alone: bool = True) -> Array:
    """Mean of every ``factor`` frames, the first frame passing as it is: ``1 + k * factor`` -> ``1 + k`` frames."""
    if not first_frame_alone:
        return average_pool(x, (factor, 1, 1))
    return jnp.concatenate([x[:, :1], average_pool(x[:, 1:], (factor, 1, 1))], axis=1)


def causal_upsample_time(x: Array, factor: int, *, first_frame_alone: bool = True) -> Array:
    """Repeats every frame but the first ``factor`` times: ``1 + k`` -> ``1 + k * factor`` frames."""
    if not first_frame_alone:
        return upsample_nearest(x, (factor, 1, 1))
    return jnp.concatenate([x[:, :1], upsample_nearest(x[:, 1:], (factor, 1, 1))], axis=1)


def _split(x: Array, factors: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    rank = len(factors)
    if x.ndim < rank + 1 or min(factors) < 1:
        raise ValueError(f"resampling by {tuple(factors)} got an array of shape {x.shape}.")
    return x.shape[: -1 - rank], x.shape[-1 - rank : -1], x.shape[-1]


def _blocks(x: Array, factors: Sequence[int]) -> tuple[Array, tuple[int, ...], tuple[int, ...]]:
    """``(*lead, *sizes / factors, *factors, C)``, lead and the divided sizes."""
    lead, sizes, channels = _split(x, factors)
    if any(size % factor for size, factor in zip(sizes, factors, strict=True)):
        raise ValueError(f"the sizes {sizes} of an array of shape {x.shape} must be multiples of {tuple(factors)}.")
    sizes = tuple(size // factor for size, factor in zip(sizes, factors, strict=True))
    paired = [n for size, factor in zip(sizes, factors, strict=True) for n in (size, factor)]
    n, rank = len(lead), len(factors)
    outer, inner = [n + 2 * i for i in range(rank)], [n + 2 * i + 1 for i in range(rank)]
    blocks = x.reshape(*lead, *paired, channels).transpose(*range(n), *outer, *inner, n + 2 * rank)
    return blocks, lead, sizes


def _checked(order: str) -> str:
    if order not in ORDERS:
        raise unknown("channel order", order, ORDERS)
    return order


# ------------------------------------------------------------------------------------------------------------ modules


class Downsample(nn.Module):
    """Strided convolution ``conv`` of every image or frame.

    The default padding is that of VQGAN (https://arxiv.org/abs/2012.09841): one zero below and on the right, none
    above and on the left. ``padding=1`` is the symmetric one.
    """

    features: int
    kernel_size: int = 3
    factor: int = 2
    padding: Padding = ((0, 1), (0, 1))
    padding_mode: str = "zeros"
    use_bias: bool = True
    dtype: Any = None
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... h w c) -> (... h/f w/f d)
        return Conv2d(
            self.features,
            self.kernel_size,
            self.factor,
            self.padding,
            self.padding_mode,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="conv",
        )(x)


class Upsample(nn.Module):
    """Nearest upsampling of every image or frame followed by the convolution ``conv``."""

    features: int
    kernel_size: int = 3
    factor: int = 2
    padding_mode: str = "zeros"
    use_bias: bool = True
    dtype: Any = None
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... h w c) -> (... f*h f*w d)
        return Conv2d(
            self.features,
            self.kernel_size,
            padding_mode=self.padding_mode,
            repeats=self.factor,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="conv",
        )(x)


class CausalTimeDownsample(nn.Module):
    """Causal convolution ``conv`` over time with stride ``factor``: ``1 + k * factor`` -> ``1 + k`` frames. Streams."""

    features: int
    kernel_size: int = 3
    factor: int = 2
    time_mode: str = "replicate"
    use_bias: bool = True
    dtype: Any = None
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+k*f h w c) -> (b 1+k h w d)
        return CausalConv3d(
            self.features,
            (self.kernel_size, 1, 1),
            (self.factor, 1, 1),
            time_mode=self.time_mode,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="conv",
        )(x)


class CausalTimeUpsample(nn.Module):
    """`causal_upsample_time` followed by the causal convolution over time ``conv``. Streams."""

    features: int
    kernel_size: int = 3
    factor: int = 2
    time_mode: str = "replicate"
    use_bias: bool = True
    dtype: Any = None
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+k h w c) -> (b 1+k*f h w d)
        x = causal_upsample_time(x, self.factor, first_frame_alone=starts_clip(self))
        return CausalConv3d(
            self.features,
            (self.kernel_size, 1, 1),
            time_mode=self.time_mode,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="conv",
        )(x)


class CausalTimePool(nn.Module):
    """`causal_average_pool_time` that streams: later chunks hold ``k * factor`` frames."""

    factor: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+k*f h w c) -> (b 1+k h w c)
        return causal_average_pool_time(x, self.factor, first_frame_alone=starts_clip(self))


class CausalSpaceToDepth(nn.Module):
    """`causal_space_to_depth` that streams: later chunks hold ``k * factors[0]`` frames."""

    factors: tuple[int, int, int]
    order: str = "patch_outer"

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+k*f h w c) -> (b 1+k h/f w/f f*f*f*c)
        return causal_space_to_depth(x, self.factors, order=self.order, first_frame_alone=starts_clip(self))


class CausalDepthToSpace(nn.Module):
    """`causal_depth_to_space` that streams."""

    factors: tuple[int, int, int]
    order: str = "patch_outer"

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+k h w f*f*f*c) -> (b 1+k*f f*h f*w c)
        return causal_depth_to_space(x, self.factors, order=self.order, first_frame_alone=starts_clip(self))
