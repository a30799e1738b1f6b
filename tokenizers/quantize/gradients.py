"""How the gradient of the decoder passes a rounding or a table look-up: estimators `(z, codes) -> codes`.

The value of every estimator is exactly ``codes``; they differ only in the gradient that ``z`` receives. None of them
sends a gradient to ``codes``: a learned codebook is trained by its own loss term.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def straight_through(z: Array, codes: Array) -> Array:
    """``codes`` with the gradient of the identity in ``z`` (Bengio et al., https://arxiv.org/abs/1308.3432).

    Args:
      z: what was quantized, ``(..., D)``.
      codes: the result, the same shape.
    """
    # z - sg(z) is exactly zero, so that the value is the code to the last bit; z + sg(codes - z) would round.
    return jax.lax.stop_gradient(codes) + (z - jax.lax.stop_gradient(z))


def rotation_trick(z: Array, codes: Array) -> Array:
    """``codes`` as a rotation and rescaling of ``z`` held constant (Fifty et al., https://arxiv.org/abs/2410.06424).

    The gradient of the decoder is turned by the angle between code and input, and scaled by the ratio of their norms.

    Args:
      z: float32 ``(..., D)``.
      codes: float32, the same shape.
    """
    z_constant, codes = jax.lax.stop_gradient(z), jax.lax.stop_gradient(codes)
    source, target = unit_norm(z_constant), unit_norm(codes)
    middle = unit_norm(source + target)
    ratio = _norm(codes) / _norm(z_constant)
    # Householder form of the rotation that takes source to target, without a D x D matrix.
    rotated = ratio * (z - 2.0 * middle * _dot(middle, z) + 2.0 * target * _dot(source, z))
    return codes + (rotated - jax.lax.stop_gradient(rotated))


ESTIMATORS = {"straight_through": straight_through, "rotation_trick": rotation_trick}


def unit_norm(x: Array, minimum: float = 1e-6) -> Array:
    """``x / max(|x|, minimum)`` over the last axis; the gradient is finite at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), minimum**2))


def _norm(x: Array, minimum: float = 1e-6) -> Array:
    return jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), minimum)


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=-1, keepdims=True)
