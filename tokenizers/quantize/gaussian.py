"""Diagonal Gaussian bottleneck of a KL autoencoder (Kingma & Welling, https://arxiv.org/abs/1312.6114; LDM)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..types import Encoding

Array = jax.Array


class DiagonalGaussian(nn.Module):
    """Reads ``z (B, ..., 2D)`` as mean and log-variance ``(B, ..., D)`` each (mean first). No parameters, no indices.

    ``latents`` are a sample while training (rng stream ``bottleneck``) and the mean otherwise. ``losses["kl"]`` is the
    KL to N(0, 1) SUMMED over all values of an item and averaged over the batch: weights such as the 1e-6 of latent
    diffusion and VidTok are for this sum. A recipe that averages over latent values divides its weight by their number.

    Attributes:
      min_logvar, max_logvar: the log-variance is clamped to them before everything else.
    """

    min_logvar: float = -30.0
    max_logvar: float = 20.0

    @property
    def codebook_size(self) -> None:
        """A continuous bottleneck has no codebook."""
        return None

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` (mean and log-variance) for latents of that many channels."""
        return 2 * latent_channels

    def __call__(self, z: Array, train: bool = False) -> Encoding:
        """Posterior of ``z (B, ..., 2D)``, any float dtype -> latents, mean, logvar float32 ``(B, ..., D)``."""
        mean, logvar = split_posterior(z, self.min_logvar, self.max_logvar)
        latents = mean
        if train:
            noise = jax.random.normal(self.make_rng("bottleneck"), mean.shape, jnp.float32)
            latents = reparameterize(mean, logvar, noise)
        return Encoding(latents=latents, mean=mean, logvar=logvar, losses={"kl": kl_to_standard_normal(mean, logvar)})


def split_posterior(z: Array, min_logvar: float = -30.0, max_logvar: float = 20.0) -> tuple[Array, Array]:
    """``(..., 2D)`` -> float32 mean and clamped log-variance ``(..., D)``."""
    if z.shape[-1] % 2:
        raise ValueError(f"a Gaussian posterior needs an even number of channels (mean, logvar), got shape {z.shape}.")
    mean, logvar = jnp.split(z.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, min_logvar, max_logvar)


def reparameterize(mean: Array, logvar: Array, noise: Array) -> Array:
    """``mean + exp(logvar / 2) * noise``."""
    return mean + jnp.exp(0.5 * logvar) * noise


def kl_to_standard_normal(mean: Array, logvar: Array) -> Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over the values of an item and averaged over the leading axis."""
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar) / mean.shape[0]
