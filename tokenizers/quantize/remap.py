"""Indices of the codes that a data set uses, for generators that need no others (taming-transformers' ``remap``)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def to_used(indices: Array, used: tuple[int, ...]) -> Array:
    """int ``(...)`` -> int32 position in ``used``; ``len(used)`` for every other code."""
    hits = jnp.asarray(indices)[..., None] == np.asarray(used)
    return jnp.where(hits.any(-1), jnp.argmax(hits, axis=-1), len(used)).astype(jnp.int32)


def from_used(indices: Array, used: tuple[int, ...]) -> Array:
    """The inverse; what stood for other codes becomes the first used one."""
    table = np.asarray((*used, used[0]), np.int32)
    return jnp.take(table, indices, axis=0)
