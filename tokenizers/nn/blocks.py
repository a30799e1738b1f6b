"""Residual and transformer blocks composed of the layers of this package.

A block takes its layers as partials, e.g. ``conv=functools.partial(CausalConv3d, dtype=dtype)``, and names them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .attention import constrain_grid

Array = jax.Array
Activation = Callable[[Array], Array]
Factory = Callable[..., nn.Module]


def gelu(x: Array) -> Array:
    """``x`` times the normal distribution function (the exact form, not the tanh one)."""
    return nn.gelu(x, approximate=False)


class ResBlock(nn.Module):
    """Pre-activation residual block, https://arxiv.org/abs/1603.05027: norm, activation, conv, twice, plus a shortcut.

    Layers ``norm1``, ``conv1``, ``norm2``, ``conv2`` and, where the channels change, ``shortcut``.

    Attributes:
      features: output channels.
      conv: ``conv(features, name=...)`` makes a convolution that keeps the size: 2D or 3D, causal or not.
      norm: ``norm(name=...)`` makes a normalization.
      activation: swish in most papers.
      shortcut: ``shortcut(features, name=...)``; ``None`` is ``conv`` with ``kernel_size=1``.
      dropout: rate before the second convolution (rng stream ``dropout``).
      last: makes ``conv2`` where it differs from ``conv``, in its initial values for instance.
    """

    features: int
    conv: Factory
    norm: Factory
    activation: Activation = nn.swish
    shortcut: Factory | None = None
    dropout: float = 0.0
    last: Factory | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:  # (b [t] h w c) -> (b [t] h w d)
        y = self.conv(self.features, name="conv1")(self.activation(self.norm(name="norm1")(x)))
        y = self.activation(self.norm(name="norm2")(y))
        if self.dropout:
            y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = (self.last or self.conv)(self.features, name="conv2")(y)
        if x.shape[-1] != self.features:
            if self.shortcut is None:
                x = self.conv(self.features, kernel_size=1, name="shortcut")(x)
            else:
                x = self.shortcut(self.features, name="shortcut")(x)
        return constrain_grid(x + y)


class AttentionBlock(nn.Module):
    """``x + attention(norm(x))``, with the layers ``norm`` and ``attention``; keywords go to the attention."""

    attention: Factory
    norm: Factory

    @nn.compact
    def __call__(self, x: Array, **options: Any) -> Array:
        return x + self.attention(name="attention")(self.norm(name="norm")(x), **options)


class MLP(nn.Module):
    """Dense ``fc1``, activation, dense ``fc2``.

    Attributes:
      hidden: channels between.
      features: output channels; ``None`` is those of the input.
      activation: the exact GELU unless told.
    """

    hidden: int
    features: int | None = None
    activation: Activation = gelu
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... c) -> (... d)
        y = self.activation(nn.Dense(self.hidden, use_bias=self.use_bias, dtype=self.dtype, name="fc1")(x))
        return nn.Dense(self.features or x.shape[-1], use_bias=self.use_bias, dtype=self.dtype, name="fc2")(y)


class SwiGLU(nn.Module):
    """``down(swish(gate(x)) * up(x))``, https://arxiv.org/abs/2002.05202.

    Attributes:
      hidden: channels between.
      features: output channels; ``None`` is those of the input.
      activation: in place of the swish: with `gelu` this is GEGLU.
    """

    hidden: int
    features: int | None = None
    activation: Activation = nn.swish
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... c) -> (... d)
        gate = nn.Dense(self.hidden, use_bias=self.use_bias, dtype=self.dtype, name="gate")(x)
        up = nn.Dense(self.hidden, use_bias=self.use_bias, dtype=self.dtype, name="up")(x)
        features = self.features or x.shape[-1]
        return nn.Dense(features, use_bias=self.use_bias, dtype=self.dtype, name="down")(self.activation(gate) * up)


class LayerScale(nn.Module):
    """Multiplies each channel with a learned ``scale`` ``(C,)``, https://arxiv.org/abs/2103.17239."""

    initial: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... c) -> same
        scale = self.param("scale", nn.initializers.constant(self.initial), x.shape[-1:], jnp.float32)
        return x * scale.astype(x.dtype)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: ``x += scale1(attention(norm1(x)))``, ``x += scale2(mlp(norm2(x)))``.

    Attributes:
      attention: ``attention(name=...)`` makes an attention module, over tokens, space, windows or time.
      mlp: ``mlp(name=...)`` makes an `MLP` or a `SwiGLU`.
      norm: ``norm(name=...)`` makes a normalization.
      layer_scale: initial value of the two `LayerScale`s; ``None`` leaves them out.
    """

    attention: Factory
    mlp: Factory
    norm: Factory
    layer_scale: float | None = None

    @nn.compact
    def __call__(self, x: Array, *, keep: Array | None = None, **options: Any) -> Array:
        """``(B, ..., C)`` -> same. ``keep`` ``(2, B)`` are the `survivors` of each branch; options: the attention's."""
        y = self.attention(name="attention")(self.norm(name="norm1")(x), **options)
        x = x + self._branch(y, "scale1", None if keep is None else keep[0])
        y = self.mlp(name="mlp")(self.norm(name="norm2")(x))
        return x + self._branch(y, "scale2", None if keep is None else keep[1])

    def _branch(self, y: Array, name: str, keep: Array | None) -> Array:
        y = y if self.layer_scale is None else LayerScale(self.layer_scale, name=name)(y)
        if keep is None:
            return y
        share = keep / keep.mean(dtype=jnp.float32)
        return y * share.reshape(-1, *[1] * (y.ndim - 1)).astype(y.dtype)


def survivors(key: Array, layers: int, batch: int, rate: float) -> Array:
    """Stochastic depth (https://arxiv.org/abs/1603.09382) as DINOv2 has it: which items pass which branch.

    Returns:
      bool ``(layers, 2, batch)``, in every row ``max(int(batch * (1 - rate)), 1)`` of them true. Blocks scale what is
      left up by their share.
    """
    kept = max(int(batch * (1 - rate)), 1)
    places = jnp.argsort(jax.random.uniform(key, (layers, 2, batch)), axis=-1)  # random permutations
    return places < kept
