"""Nearest code of every position, without the whole table of distances when that would be large."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .. import errors

Array = jax.Array

# Most scores (positions x codes) computed at once: 512 MiB of float32 over all devices together.
_MAX_SCORES = 2**27
_SMALLEST_CHUNK = 1024


def _euclidean(codes: Array) -> tuple[float, Array]:
    return 2.0, -jnp.sum(jnp.square(codes), axis=-1)


def _cosine(codes: Array) -> tuple[float, Array]:
    return 1.0, jnp.zeros(codes.shape[:1], codes.dtype)


# The code to pick is the argmax of gain * <z, code> + bias: the term |z|^2 is the same for all codes.
DISTANCES = {"euclidean": _euclidean, "cosine": _cosine, "direction": _cosine}


def nearest(z: Array, codes: Array, distance: str = "euclidean", codes_per_chunk: int | None = None) -> Array:
    """Index of the nearest code, the lowest one on ties.

    Args:
      z: float32 ``(..., D)``.
      codes: float32 ``(K, D)``; unit vectors for ``distance="cosine"`` and ``"direction"``.
      distance: ``euclidean``, ``cosine`` or ``direction``, which here is the same as ``cosine``.
      codes_per_chunk: codes compared at once. By default all of them, and a part when positions x K is large: memory is
        then bounded and the running best is kept over the parts.

    Returns:
      int32 ``(...)``. No gradient.
    """
    z, codes = jax.lax.stop_gradient(z), jax.lax.stop_gradient(codes)
    gain, bias = errors.pick("distance", distance, DISTANCES)(codes)
    size, dim = codes.shape
    if codes_per_chunk is None:
        codes_per_chunk = max(_SMALLEST_CHUNK, _MAX_SCORES // max(1, z.size // dim))
    if codes_per_chunk >= size:
        return jnp.argmax(_scores(z, codes, gain, bias), axis=-1).astype(jnp.int32)

    chunks = -(-size // codes_per_chunk)
    padding = chunks * codes_per_chunk - size
    codes = jnp.pad(codes, ((0, padding), (0, 0))).reshape(chunks, codes_per_chunk, dim)
    bias = jnp.pad(bias, (0, padding), constant_values=-jnp.inf).reshape(chunks, codes_per_chunk)

    def compare(best, chunk):
        offset, chunk_codes, chunk_bias = chunk
        scores = _scores(z, chunk_codes, gain, chunk_bias)
        score, index = jnp.max(scores, axis=-1), jnp.argmax(scores, axis=-1).astype(jnp.int32) + offset
        better = score > best[0]  # strict: an equal score keeps the lower index
        return (jnp.where(better, score, best[0]), jnp.where(better, index, best[1])), None

    start = jnp.full(z.shape[:-1], -jnp.inf, z.dtype), jnp.zeros(z.shape[:-1], jnp.int32)
    offsets = jnp.arange(chunks, dtype=jnp.int32) * codes_per_chunk
    (_, indices), _ = jax.lax.scan(compare, start, (offsets, codes, bias))
    return indices


def _scores(z: Array, codes: Array, gain: float, bias: Array) -> Array:
    # No flattening of z: its batch and spatial sharding stays. Full float32: a bfloat16 product swaps close codes.
    return gain * jnp.einsum("...d,kd->...k", z, codes, precision=jax.lax.Precision.HIGHEST) + bias
