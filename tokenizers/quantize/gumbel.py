"""Gumbel-softmax bottleneck (Jang et al., https://arxiv.org/abs/1611.01144) of GumbelVQ (VQGAN) and DALL-E's dVAE."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..types import Encoding
from .gradients import straight_through
from .nearest import nearest
from .scheduled import scheduled

Array = jax.Array


class GumbelSoftmax(nn.Module):
    """A categorical choice of a code per position, sampled and relaxed while training, the argmax otherwise.

    GumbelVQ is ``GumbelSoftmax(K, code_dim=D, project=True, hard=True)``; dVAE is
    ``GumbelSoftmax(K, code_dim=None, project=False, hard=False)``: the encoder gives the logits and the decoder, whose
    first layer is the table, reads the relaxed one-hot vector. (The official GumbelVQ also samples when it encodes;
    here evaluation is deterministic, as dVAE's tokens are.)

    ``losses["kl"]`` is the KL of softmax(logits), without temperature, to the uniform distribution: summed over codes,
    averaged over positions and batch. dVAE's objective, a sum over positions divided by the number of pixel values, is
    this times (positions / pixel values).

    Attributes:
      codebook_size: K.
      code_dim: channels D of the learned table; None for one-hot codes of K channels.
      project: a learned linear map from z to the logits; otherwise z is the logits.
      hard: while training the code is one table row (with the gradient of the relaxed choice), not a mixture of rows.
      temperature: of the relaxation, where neither the call nor a schedule (``config.schedules.model``) gives one.
    """

    codebook_size: int
    code_dim: int | None = None
    project: bool = True
    hard: bool = True
    temperature: float = 1.0

    SCHEDULED = ("temperature",)

    def setup(self):
        if self.project:
            self.proj = nn.Dense(self.codebook_size, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST)
        if self.code_dim is not None:
            shape = (self.codebook_size, self.code_dim)
            self.embedding = self.param("embedding", nn.initializers.normal(1.0), shape, jnp.float32)

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for latents of that many channels: the logits, or anything that is projected to them."""
        made = self.codebook_size if self.code_dim is None else self.code_dim
        if latent_channels != made:
            raise ValueError(f"this bottleneck makes latents of {made} channels, not {latent_channels}.")
        return latent_channels if self.project else self.codebook_size

    def __call__(self, z: Array, train: bool = False, temperature: float | Array | None = None) -> Encoding:
        """Chooses codes for ``z``.

        Args:
          z: ``(..., C)``, any float dtype; C = K when ``project`` is off.
          train: sample with the rng stream ``bottleneck``.
          temperature: of the relaxation, a number or traced scalar; by default the schedule's or the attribute. The
            argmax has none.

        Returns:
          float32 latents ``(..., D)`` or ``(..., K)``, int32 indices ``(...)`` of the sample or the argmax, and ``kl``.
        """
        logits = self.logits(z)
        losses = {"kl": kl_to_uniform(logits)}
        if not train:
            indices = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return Encoding(latents=self.indices_to_codes(indices), indices=indices, losses=losses)
        noise = jax.random.gumbel(self.make_rng("bottleneck"), logits.shape, jnp.float32)
        temperature = scheduled(self, "temperature") if temperature is None else temperature
        choice, indices = gumbel_softmax(logits, noise, temperature, self.hard)
        return Encoding(latents=self.mix(choice), indices=indices, losses=losses)

    def logits(self, z: Array) -> Array:
        """float32 logits ``(..., K)`` of ``z (..., C)``."""
        z = z.astype(jnp.float32)
        if self.project:
            return self.proj(z)
        if z.shape[-1] != self.codebook_size:
            raise ValueError(
                f"GumbelSoftmax without a projection needs {self.codebook_size} logits, got shape {z.shape}."
            )
        return z

    def mix(self, choice: Array) -> Array:
        """Latents of a (relaxed) one-hot choice ``(..., K)``: the weighted sum of table rows, or the choice itself."""
        if self.code_dim is None:
            return choice
        return jnp.matmul(choice, self.embedding, precision=jax.lax.Precision.HIGHEST)

    def indices_to_codes(self, indices: Array) -> Array:
        """int ``(...)`` -> float32 table rows ``(..., D)``, or one-hot vectors ``(..., K)``."""
        if self.code_dim is None:
            return jax.nn.one_hot(indices, self.codebook_size, dtype=jnp.float32)
        return jnp.take(self.embedding, indices, axis=0)

    def codes_to_indices(self, codes: Array) -> Array:
        """Codes -> int32 ``(...)``: the nearest table row, or the largest entry of a one-hot vector."""
        codes = codes.astype(jnp.float32)
        if self.code_dim is None:
            return jnp.argmax(codes, axis=-1).astype(jnp.int32)
        return nearest(codes, self.embedding)


class GumbelNearest(GumbelSoftmax):
    """The logits are minus the squared distances to the codes: the argmax is the nearest code (MaskGIT's GumbelVQ).

    MaskGIT mixes codes while training (``hard=False``) and has no loss on the choice (a weight of 0 for ``kl``).

    Attributes: as above; ``project`` must be off and the table is there.
    """

    code_dim: int | None = 256
    project: bool = False
    hard: bool = False

    def __post_init__(self):
        if self.project or self.code_dim is None:
            raise ValueError(
                f"distances to codes need project=False and a code_dim, got {self.project} and {self.code_dim}."
            )
        super().__post_init__()

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for latents of that many channels."""
        if latent_channels != self.code_dim:
            raise ValueError(f"a codebook of code_dim={self.code_dim} does not make {latent_channels} channels.")
        return latent_channels

    def logits(self, z: Array) -> Array:
        """float32 logits ``(..., K)`` of ``z (..., D)``."""
        z = z.astype(jnp.float32)
        products = jnp.matmul(z, self.embedding.T, precision=jax.lax.Precision.HIGHEST)
        squares = jnp.sum(jnp.square(self.embedding), axis=-1)
        return 2 * products - squares - jnp.sum(jnp.square(z), axis=-1, keepdims=True)


def gumbel_softmax(logits: Array, noise: Array, temperature: float | Array, hard: bool) -> tuple[Array, Array]:
    """Relaxed one-hot sample ``(..., K)`` and its int32 argmax ``(...)``.

    Args:
      logits: float32 ``(..., K)``.
      noise: standard Gumbel numbers, the same shape.
      temperature: positive.
      hard: return the one-hot vector of the argmax, with the gradient of the relaxed sample.
    """
    soft = jax.nn.softmax((logits + noise) / temperature, axis=-1)
    indices = jnp.argmax(soft, axis=-1).astype(jnp.int32)
    if not hard:
        return soft, indices
    return straight_through(soft, jax.nn.one_hot(indices, soft.shape[-1], dtype=soft.dtype)), indices


def kl_to_uniform(logits: Array) -> Array:
    """KL(softmax(logits) || uniform) of ``(..., K)``, in nats, averaged over all positions -> float32 scalar."""
    log_q = jax.nn.log_softmax(logits, axis=-1)
    divergence = jnp.sum(jnp.exp(log_q) * log_q, axis=-1) + jnp.log(jnp.float32(logits.shape[-1]))
    return jnp.mean(divergence)
