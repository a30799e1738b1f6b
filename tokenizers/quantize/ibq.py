"""Index backpropagation quantization (Shi et al., https://arxiv.org/abs/2412.02692): gradients reach all codes.

The choice of a code is a softmax over inner products, made hard with a straight-through gradient, so that the decoder's
gradient and the first loss term move every code, and large codebooks stay in use.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import errors
from ..parallel.constrain import constrain
from ..types import Encoding
from .entropy import FORMS, code_entropies
from .nearest import nearest

Array = jax.Array


class IBQ(nn.Module):
    """Replaces every vector of ``z (..., D)`` by the code of K with the largest inner product.

    Loss terms, means over all elements, and their released weights: ``index_propagation`` = mean((latents - z)^2),
    whose gradient passes the softmax (1); ``commitment`` = mean((sg(code) - z)^2) (1); ``codebook`` =
    mean((code - sg(z))^2) (0.25); and while training ``entropy_sample`` (0.05) and ``entropy_codebook`` (-0.05).

    Attributes:
      codebook_size: K.
      code_dim: D.
      entropy: form of the entropy terms (``entropy.FORMS``); None leaves them out.
      inverse_temperature: of the entropy terms; the softmax of the choice has temperature one.
      chunk_size: positions of the global batch handled at once while training: positions x K never exists as a whole.
      codebook_init: initializer of the table.
    """

    codebook_size: int
    code_dim: int
    entropy: str | None = "smoothed"
    inverse_temperature: float = 100.0
    chunk_size: int = 256
    codebook_init: Callable[..., Array] = nn.initializers.normal(1.0)

    def __post_init__(self):
        if self.entropy is not None:
            errors.pick("entropy form", self.entropy, FORMS)
        super().__post_init__()

    def setup(self):
        self.codebook = self.param("codebook", self.codebook_init, (self.codebook_size, self.code_dim), jnp.float32)

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for codes of that many channels."""
        if latent_channels != self.code_dim:
            raise ValueError(f"a codebook of code_dim={self.code_dim} does not make {latent_channels} channels.")
        return latent_channels

    def __call__(self, z: Array, train: bool = False) -> Encoding:
        """Quantizes ``z (..., D)``, any float dtype -> float32 codes, int32 indices ``(...)`` and the loss terms."""
        if z.shape[-1] != self.code_dim:
            raise ValueError(f"the codebook has codes of {self.code_dim} channels, got shape {z.shape}.")
        z = z.astype(jnp.float32)
        indices = self._largest(z)
        codes = jnp.take(self.codebook, indices, axis=0)
        latents = codes
        if train:
            soft = mixture(z, self.codebook, self.chunk_size)
            latents = codes + (soft - jax.lax.stop_gradient(soft))  # exactly the code
        losses = {
            "index_propagation": jnp.mean(jnp.square(latents - z)),
            "commitment": jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - z)),
            "codebook": jnp.mean(jnp.square(codes - jax.lax.stop_gradient(z))),
        }
        if train and self.entropy is not None:
            losses["entropy_sample"], losses["entropy_codebook"] = code_entropies(
                z, self.codebook, self.inverse_temperature, self.entropy, self.chunk_size
            )
        return Encoding(latents=latents, indices=indices, losses=losses)

    def indices_to_codes(self, indices: Array) -> Array:
        """int ``(...)`` in [0, K) -> float32 codes ``(..., D)``; NaN where an index is out of range."""
        return jnp.take(self.codebook, indices, axis=0)

    def codes_to_indices(self, codes: Array) -> Array:
        """Codes ``(..., D)`` -> int32 ``(...)``: the nearest code (the largest inner product may be another one's)."""
        return nearest(codes.astype(jnp.float32), self.codebook)

    def _largest(self, z: Array) -> Array:
        return nearest(z, self.codebook, "cosine")  # compares inner products of what it is given


def mixture(z: Array, codebook: Array, chunk_size: int) -> Array:
    """``softmax(z @ codebook.T) @ sg(codebook)``: ``(..., D) -> (..., D)``, a few positions of the batch at once.

    The backward pass computes each chunk again. The codebook has its gradient through the softmax alone.
    """
    rows = z.reshape(-1, z.shape[-1])
    count = rows.shape[0]
    chunk_size = min(chunk_size, count)
    chunks = -(-count // chunk_size)
    rows = jnp.pad(rows, ((0, chunks * chunk_size - count), (0, 0))).reshape(chunk_size, chunks, -1)
    # As in code_entropies: the batch stays the major axis of a chunk, and all devices work on every chunk.
    rows = constrain(rows, "batch", None, None).swapaxes(0, 1)
    highest = jax.lax.Precision.HIGHEST

    @jax.checkpoint
    def of_chunk(rows):
        choice = jax.nn.softmax(jnp.matmul(rows, codebook.T, precision=highest), axis=-1)
        return jnp.matmul(choice, jax.lax.stop_gradient(codebook), precision=highest)

    mixed = jax.lax.map(of_chunk, rows).swapaxes(0, 1).reshape(chunks * chunk_size, -1)
    return mixed[:count].reshape(z.shape)
