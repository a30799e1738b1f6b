"""Entropy terms of an implicit codebook, in chunks: positions x codes never exists at once.

``p(code | z) = softmax(scale * <z, code>)``. Two terms, both in nats and neither weighted:

* ``entropy_sample``: mean over positions of H(p). Recipes give it a positive weight: each position should be sure.
* ``entropy_codebook``: H of the mean of p over the global batch. Recipes give it a NEGATIVE weight: all codes in use.

(Jansen et al., https://arxiv.org/abs/1911.02001; MAGVIT-v2, https://arxiv.org/abs/2310.05737.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import errors
from ..parallel.constrain import constrain
from .gradients import straight_through

Array = jax.Array
_MINIMUM = 1e-5


class EntropyForm(NamedTuple):
    """Where the 1e-5 that keeps logarithms finite goes; released weights were trained with one or the other."""

    sample: Callable[[Array], Array]  # log-probabilities (..., K) -> entropies (...)
    mean: Callable[[Array], Array]  # mean probabilities (K,) -> entropy ()
    probabilities: Callable[[Array], Array] = jnp.exp  # what the mean is of


def _clamped(log_p: Array) -> Array:
    return -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, jnp.log(_MINIMUM)), axis=-1)


def _exact(log_p: Array) -> Array:
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _smoothed(p: Array, minimum: float) -> Array:
    return -jnp.sum(p * jnp.log(p + minimum), axis=-1)


def _chosen(log_p: Array) -> Array:
    """The most likely code, as a one-hot vector with the gradient of the probabilities."""
    one_hot = jax.nn.one_hot(jnp.argmax(log_p, axis=-1), log_p.shape[-1], dtype=log_p.dtype)
    return straight_through(jnp.exp(log_p), one_hot)


# "clamped": -sum p log max(p, 1e-5) in both terms (vector-quantize-pytorch, VidTok).
# "smoothed": exact in the sample term, -sum p log(p + 1e-5) of the mean (MAGVIT, Open-MAGVIT2, IBQ). With 2^18 codes a
# uniform p is below 1e-5, so that this term and its gradient saturate: the released behaviour.
# "smoothed_1e-8": -sum p log(p + 1e-8) in both terms (BSQ).
# "smoothed_argmax": "smoothed", of the most likely code in place of p outside the logarithm (MAGVIT and MaskGIT, where
# their loss type is argmax).
FORMS = {
    "clamped": EntropyForm(_clamped, lambda p: -jnp.sum(p * jnp.log(jnp.maximum(p, _MINIMUM)))),
    "smoothed": EntropyForm(_exact, lambda p: -jnp.sum(p * jnp.log(p + _MINIMUM))),
    "smoothed_1e-8": EntropyForm(lambda log_p: _smoothed(jnp.exp(log_p), 1e-8), lambda p: _smoothed(p, 1e-8)),
    "smoothed_argmax": EntropyForm(
        lambda log_p: -jnp.sum(_chosen(log_p) * log_p, axis=-1), lambda p: -jnp.sum(p * jnp.log(p + _MINIMUM)), _chosen
    ),
}


def code_entropies(
    z: Array, codebook: Array, scale: float, form: str, chunk_size: int, mask: Array | None = None
) -> tuple[Array, Array]:
    """(entropy of the assignment, entropy of the mean assignment) for all positions of the global batch.

    Args:
      z: float32 ``(..., D)``; gradients flow to it through both terms.
      codebook: float32 ``(K, D)``.
      scale: factor of the inner products, 2 / temperature for codes of one length (then it is a softmax of negative
        squared distances).
      form: one of `FORMS`.
      chunk_size: positions handled at once, of the global batch: memory is about ``4 * chunk_size * K`` bytes a few
        times over, divided by the devices that share the batch. The backward pass computes each chunk again.
      mask: ``(...)``, positions that count.

    Returns:
      two float32 scalars, in nats.
    """
    form = errors.pick("entropy form", form, FORMS)
    rows = z.reshape(-1, z.shape[-1])
    count = rows.shape[0]
    chunk_size = min(chunk_size, count)
    chunks = -(-count // chunk_size)
    padding = chunks * chunk_size - count
    weights = jnp.ones(count, jnp.float32) if mask is None else mask.reshape(-1).astype(jnp.float32)
    total = jnp.sum(weights)
    weights = jnp.pad(weights, (0, padding))
    # Chunk c holds the positions c, c + chunks, ...: the batch stays the major axis of a chunk, so that all devices
    # work on every chunk. (The order of positions is irrelevant to both means.)
    rows = constrain(jnp.pad(rows, ((0, padding), (0, 0))).reshape(chunk_size, chunks, -1), "batch", None, None)
    rows, weights = rows.swapaxes(0, 1), weights.reshape(chunk_size, chunks).swapaxes(0, 1)

    @jax.checkpoint
    def of_chunk(rows, weights):
        logits = scale * jnp.matmul(rows, codebook.T, precision=jax.lax.Precision.HIGHEST)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        return jnp.sum(weights * form.sample(log_p)), jnp.sum(weights[:, None] * form.probabilities(log_p), axis=0)

    def add(sums, chunk):
        # The running sums stay outside of_chunk: the backward pass would otherwise keep a copy of them per chunk.
        return jax.tree.map(jnp.add, sums, of_chunk(*chunk)), None

    start = jnp.zeros((), jnp.float32), jnp.zeros(codebook.shape[0], jnp.float32)
    (entropy, probabilities), _ = jax.lax.scan(add, start, (rows, weights))
    return entropy / total, form.mean(probabilities / total)
