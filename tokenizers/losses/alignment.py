"""Alignment of latents with the features of a frozen vision foundation model (VA-VAE's VF loss).

https://arxiv.org/abs/2501.01423, section 3.2; official function `LPIPSWithDiscriminator.forward` of LightningDiT's
`vavae/ldm/modules/losses/contperceptual.py`. Latents ``z`` (behind a matrix that brings them to the features' channels)
and features ``f`` share a grid of positions::

    marginal cosine similarity           mean relu(1 - m1 - cos(z_i, f_i))
    marginal distance matrix similarity  mean relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m2), i and j of one image

Their sum is weighted by how strongly it and the reconstruction pull at the last layer of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def project(x: Array, projection: Mapping[str, Array]) -> Array:
    """``(..., C) -> (..., D)`` by ``kernel`` ``(C, D)`` and, where there is one, ``bias`` ``(D,)``; float32.

    The authors bring latents to the features' channels without a bias, or (``reverse_proj: false``) features to the
    latents' with one.
    """
    y = jnp.matmul(x.astype(jnp.float32), projection["kernel"], precision=jax.lax.Precision.HIGHEST)
    return y + projection["bias"] if "bias" in projection else y


def cosine(latents: Array, features: Array, margin: float = 0.0) -> Array:
    """Mean over positions of ``relu(1 - margin - cosine similarity)``, float32 scalar.

    Args:
      latents, features: ``(B, ..., C)``, same shape.
      margin: similarities from ``1 - margin`` on are good enough.
    """
    _check(latents, features)
    similarity = jnp.sum(_unit(latents, 1e-8) * _unit(features, 1e-8), axis=-1)
    return jnp.mean(jax.nn.relu(1.0 - margin - similarity))


def distance_matrix(latents: Array, features: Array, margin: float = 0.0) -> Array:
    """Mean over pairs of positions of ``relu(|difference of their cosine similarities| - margin)``, float32 scalar.

    Args:
      latents, features: ``(B, ..., C)``, same grid of positions; the channels may differ. Pairs are of one item.
      margin: differences up to it do not count.
    """
    if latents.shape[:-1] != features.shape[:-1]:
        _check(latents, features)
    difference = jnp.abs(_similarities(latents) - _similarities(features))
    return jnp.mean(jax.nn.relu(difference - margin))


def adaptive_weight(reconstruction: Any, alignment: Any, *, epsilon: float = 1e-4, maximum: float = 1e8) -> Array:
    """``|reconstruction| / (|alignment| + epsilon)``, clipped, without a gradient: a float32 scalar.

    Args:
      reconstruction, alignment: gradients of the two losses for the last kernel of the encoder (trees). That of the
        reconstruction is of pixel and perceptual loss, without the KL term.
    """
    norms = [optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), g)) for g in (reconstruction, alignment)]
    return jax.lax.stop_gradient(jnp.clip(norms[0] / (norms[1] + epsilon), 0.0, maximum))


def _similarities(x: Array) -> Array:
    """``(B, ..., C) -> (B, N, N)``."""
    x = _unit(x, 1e-12).reshape(x.shape[0], -1, x.shape[-1])
    return jnp.einsum("bnc,bmc->bnm", x, x, precision=jax.lax.Precision.HIGHEST)


def _unit(x: Array, least: float) -> Array:
    """Vectors of length 1; those shorter than ``least`` are divided by it."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, least**2))  # finite gradient at 0


def _check(latents: Array, features: Array) -> None:
    if latents.shape != features.shape:
        raise ValueError(
            f"latents of shape {latents.shape} and features of shape {features.shape} must have the same grid of "
            "positions and, projected, the same channels."
        )
