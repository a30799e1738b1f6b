"""Heads that self-distillation puts on a backbone."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .norm import UnitNorm

Array = jax.Array


class PrototypeHead(nn.Module):
    """Hidden layers, unit length, similarities with prototypes: the head of DINO (https://arxiv.org/abs/2104.14294).

    Parameters: dense layers ``hidden_0``, ..., the last of them of ``bottleneck`` channels; ``prototypes``
    ``(bottleneck, K)`` and, with ``weight_norm``, ``prototype_norms`` ``(K,)``, the length each one is given.

    Attributes:
      prototypes: K.
      hidden: width of the hidden layers.
      bottleneck: channels that are normalised.
      layers: dense layers, at least 1.
      weight_norm: prototypes have a direction and a learned length (initially 1).
      dtype: compute dtype; normalisation and logits are float32.
    """

    prototypes: int
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    weight_norm: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... d) -> (... k)
        init = nn.initializers.truncated_normal(0.02)
        for layer in range(self.layers):
            last = layer == self.layers - 1
            width = self.bottleneck if last else self.hidden
            x = nn.Dense(width, kernel_init=init, dtype=self.dtype, name=f"hidden_{layer}")(x)
            x = x if last else nn.gelu(x, approximate=False)
        x = UnitNorm(use_scale=False)(x.astype(jnp.float32))
        kernel = self.param("prototypes", init, (self.bottleneck, self.prototypes), jnp.float32)
        if self.weight_norm:
            norms = self.param("prototype_norms", nn.initializers.ones, (self.prototypes,), jnp.float32)
            kernel = kernel * (norms / jnp.linalg.norm(kernel, axis=0))
        return x @ kernel
