"""The layers of C-ViViT (Phenaki, https://arxiv.org/abs/2210.02399), which OmniTokenizer took over.

Patches of a clip whose first frame stands apart, and transformers over space or time whose attention compares unit
vectors. What the two papers share is here; they differ in what positions mean: biases, rotations, convolutions.
As in lucidrains/phenaki-pytorch (``cvivit.py``, ``attention.py``), the code of both.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import pick
from .attention import SpatialAttention, TemporalAttention, attend, constrain_grid
from .blocks import gelu
from .conv import CausalConv3d, Conv3d, starts_clip
from .norm import LayerNorm, UnitNorm
from .posemb import apply_rotary
from .resample import depth_to_space, space_to_depth
from .scan import scan_layers

Array = jax.Array
Factory = Callable[..., nn.Module]

# Logits are 8 <q, k>, whatever the number of channels.
SCALE = 8.0


# ---------------------------------------------------------------------------------------------------------- attention


class CosineProjection:
    """Queries, keys and values of the two attentions below: a part of a module that has the fields of `Attention`.

    Queries are projected from a layer norm of the input, keys and values from the input as it is. Queries and keys are
    unit vectors per head, times the learned ``query_norm`` and ``key_norm`` ``(head_dim,)``.
    """

    def project(self, x: Array, context: Array | None = None, rotate: Callable | None = None):
        """``(..., N, C)`` -> three times ``(..., N, heads, head_dim)``; ``rotate`` turns queries and keys."""
        heads, dim = self.num_heads, self.head_dim
        normed = LayerNorm(epsilon=1e-5, use_bias=False, dtype=self.dtype, name="norm")(x)
        inputs = {"query": normed, "key": x, "value": x}
        query, key, value = (
            nn.Dense(heads * dim, use_bias=False, dtype=self.dtype, name=name)(a).reshape(*a.shape[:-1], heads, dim)
            for name, a in inputs.items()
        )
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        query, key = UnitNorm(name="query_norm")(query), UnitNorm(name="key_norm")(key)
        # `attend` divides by the root of head_dim.
        return query * (SCALE * math.sqrt(dim)), key, value


class SpatialCosineAttention(CosineProjection, SpatialAttention):
    """Cosine attention over the positions of every frame alone.

    Attributes:
      angles: ``(h, w) -> (h w, pairs)``, by which pairs (2 i, 2 i + 1) of channels of queries and keys are turned
        before they are normalized; ``None`` turns nothing.
    """

    out_bias: bool = False
    angles: Callable[[int, int], np.ndarray] | None = None

    @nn.compact
    def __call__(self, x: Array, *, bias: Array | None = None) -> Array:  # (b t h w c) -> same
        """``bias`` ``(heads, h w, h w)`` is added to the logits."""
        *lead, h, w, c = x.shape
        rotate = None
        if self.angles is not None:
            rotate = functools.partial(apply_rotary, angles=self.angles(h, w), interleaved=True)
        query, key, value = self.project(x.reshape(*lead, h * w, c), rotate=rotate)
        y = self.merge(attend(query, key, value, bias=bias, implementation=self.implementation), c)
        return constrain_grid(y.reshape(*lead, h, w, c))


class TemporalCosineAttention(CosineProjection, TemporalAttention):
    """Cosine attention over the frames at every position; biases, windows and streams as in `TemporalAttention`."""

    out_bias: bool = False


# ---------------------------------------------------------------------------------------------------------- positions


class SpatialBias(nn.Module):
    """Biases of logits from the distance of two positions, by a small network ("continuous position bias").

    Distances enter as sign(d) log(1 + |d|) along height and width, so any grid has its biases. Evaluated once per
    distance, not once per pair.

    Attributes:
      heads: of the attention.
      width: of the two hidden layers.
    """

    heads: int
    width: int

    @nn.compact
    def __call__(self, h: int, w: int) -> Array:  # -> (heads, h w, h w), float32
        away = np.stack(np.meshgrid(np.arange(1 - h, h), np.arange(1 - w, w), indexing="ij"), axis=-1)
        x = jnp.asarray(np.sign(away) * np.log1p(np.abs(away)), jnp.float32)
        for i in range(2):
            x = nn.leaky_relu(nn.Dense(self.width, name=f"hidden{i}")(x), 0.1)
        table = nn.Dense(self.heads, name="out")(x).reshape(-1, self.heads)
        return jnp.moveaxis(table[offsets(h, w)], -1, 0)


def offsets(h: int, w: int) -> np.ndarray:
    """Row of a table of (2 h - 1)(2 w - 1) distances for every pair of positions: int ``(h w, h w)``."""
    y, x = (a.reshape(-1) for a in np.meshgrid(np.arange(h), np.arange(w), indexing="ij"))
    return (y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1


def alibi_slopes(heads: int) -> np.ndarray:
    """Slope of each head (https://arxiv.org/abs/2108.12409): 2^(-8 i / n) for n heads, n a power of two, i from 1.

    Other numbers of heads: those of the next lower power of two, then every second one of the doubled power.
    """
    lower = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8 / lower * np.arange(1, lower + 1))
    between = 2.0 ** (-4 / lower * np.arange(1, 2 * lower, 2))
    return np.concatenate([slopes, between])[:heads].astype(np.float32)


def alibi(away: Array, heads: int) -> Array:
    """-slope |distance|: distances of frames ``(t, keys)`` -> float32 ``(heads, t, keys)``."""
    return -jnp.asarray(alibi_slopes(heads))[:, None, None] * jnp.abs(away).astype(jnp.float32)


# What a position convolution sees: whether axes are mixed.
LAYOUTS = {"grid": False, "scrambled": True}


class PositionConv(nn.Module):
    """The position generating convolution: depthwise, 3x3x3 (https://arxiv.org/abs/2102.10882, section 3).

    Attributes:
      causal: pad two frames of zeros in front, none behind.
      layout: ``grid`` convolves the clip as it is. ``scrambled`` does what the published code does in its transformers
        over time: their array ``(b h w, t, c)`` is taken for ``(b, t, h, w, c)``, which mixes places and times, so that
        nothing is causal and every length of a clip has positions of its own. Weights trained that way need it.
      dtype: compute dtype.
    """

    causal: bool = True
    layout: str = "grid"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> same
        scrambled = pick("layout of positions", self.layout, LAYOUTS)
        shape = x.shape
        if scrambled:
            x = jnp.moveaxis(x, 1, 3).reshape(shape)
        x = self._convolution(shape[-1])(x)
        if scrambled:
            b, t, h, w, c = shape
            x = jnp.moveaxis(x.reshape(b, h, w, t, c), 3, 1)
        return x

    def _convolution(self, width: int) -> nn.Module:
        options = {"kernel_size": 3, "groups": width, "dtype": self.dtype, "name": "conv"}
        return CausalConv3d(width, time_mode="zeros", **options) if self.causal else Conv3d(width, **options)


# -------------------------------------------------------------------------------------------------------- transformer


class FeedForward(nn.Module):
    """Layer norm, then ``out(value * gelu(gate))`` with ``value`` and ``gate`` from one matrix; no biases.

    (GEGLU, https://arxiv.org/abs/2002.05202.) The hidden width is two thirds of ``multiple`` times the channels.
    """

    multiple: float = 4.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... c) -> same
        width = int(self.multiple * (2 / 3) * x.shape[-1])
        y = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        value, gate = jnp.split(nn.Dense(2 * width, use_bias=False, dtype=self.dtype, name="hidden")(y), 2, axis=-1)
        return nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="out")(value * gelu(gate))


class Layer(nn.Module):
    """``x += position(x)``, ``x += attention(x)``, ``x += feed_forward(x)``.

    Attributes:
      attention: ``attention(name=...)`` makes the attention, norm included.
      position: makes the position convolution; ``None`` leaves it out.
      dtype: compute dtype.
    """

    attention: Factory
    position: Factory | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, bias: Array | None = None) -> Array:  # (b t h w c) -> same
        if self.position is not None:
            x = x + self.position(name="position")(x)
        options = {} if bias is None else {"bias": bias}
        x = x + self.attention(name="attention")(x, **options)
        return constrain_grid(x + FeedForward(dtype=self.dtype, name="feed_forward")(x))


class Run(nn.Module):
    """Equal layers one after the other, scanned: ``layer(name=...)`` makes one."""

    layer: Factory
    depth: int
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | None = None) -> Array:  # (b t h w c) -> same
        return scan_layers(self.layer(name="layers"), self.depth, x, remat="full" if self.remat else "none", bias=bias)


class Transformer(nn.Module):
    """`Layer`s and a layer norm with a scale only.

    Attributes:
      layers: ``layer(name=...)`` makes one, for each of them; a bias given to the call goes to all. Neighbours that are
        the same object are one `Run`, ``from{i}``, i being the place of its first layer.
      remat: recompute layers in the backward pass instead of keeping their activations.
      dtype: compute dtype.
    """

    layers: tuple[Factory, ...]
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, bias: Array | None = None) -> Array:  # (b t h w c) -> same
        start = 0
        for layer, equal in itertools.groupby(self.layers):
            depth = len(tuple(equal))
            x = Run(layer, depth, self.remat, name=f"from{start}")(x, bias)
            start += depth
        return LayerNorm(epsilon=1e-5, use_bias=False, dtype=self.dtype, name="norm_out")(x)


# ------------------------------------------------------------------------------------------------------------ patches


class PatchEmbed(nn.Module):
    """Patches of the first frame, and of every ``patch[0]`` frames after it, each through layers of their own.

    Layer norm, dense, layer norm: ``first_*`` and ``rest_*``. A patch's channels are ordered (c, t, h, w).
    Streaming: only the first chunk has a first frame.

    Attributes:
      width: channels of the tokens.
      patch: size along (time, height, width).
      dtype: compute dtype.
    """

    width: int
    patch: tuple[int, int, int]
    dtype: Any = None

    @nn.compact
    def __call__(self, pixels: Array) -> Array:  # (b 1+t*p h w c) -> (b 1+t h/p w/p d)
        alone = int(starts_clip(self))
        time, height, width = self.patch
        if (pixels.shape[1] - alone) % time or pixels.shape[2] % height or pixels.shape[3] % width:
            rule = f"{'1 + ' * alone}{time} k frames of multiples of {height} x {width} pixels"
            raise ValueError(f"pixels of shape {pixels.shape} cannot be cut into patches: {rule} can.")
        parts = []
        if alone:
            first = space_to_depth(pixels[:, :1], (height, width), order="channel_outer")
            parts.append(self._embed(first, "first"))
        if pixels.shape[1] > alone:
            rest = space_to_depth(pixels[:, alone:], self.patch, order="channel_outer")
            parts.append(self._embed(rest, "rest"))
        return constrain_grid(jnp.concatenate(parts, axis=1))

    def _embed(self, x: Array, name: str) -> Array:
        norm = functools.partial(LayerNorm, epsilon=1e-5, dtype=self.dtype)
        x = nn.Dense(self.width, dtype=self.dtype, name=f"{name}_dense")(norm(name=f"{name}_norm_in")(x))
        return norm(name=f"{name}_norm_out")(x)


class ToPixels(nn.Module):
    """The inverse: dense layers ``first`` and ``rest`` give the pixels of every patch. Fields as in `PatchEmbed`."""

    patch: tuple[int, int, int]
    channels: int = 3
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+t h w d) -> (b 1+t*p h*p w*p c)
        alone = int(starts_clip(self))
        frames = []
        if alone:
            frames.append(self._pixels(x[:, :1], self.patch[1:], "first"))
        if x.shape[1] > alone:
            frames.append(self._pixels(x[:, alone:], self.patch, "rest"))
        return constrain_grid(jnp.concatenate(frames, axis=1))

    def _pixels(self, x: Array, patch: Sequence[int], name: str) -> Array:
        x = nn.Dense(self.channels * math.prod(patch), dtype=self.dtype, name=name)(x)
        return depth_to_space(x, patch, order="channel_outer")
