"""The bottleneck of a plain autoencoder: latents are what the encoder gives."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..types import Encoding

Array = jax.Array


class Identity(nn.Module):
    """Passes ``z (..., D)`` on as float32 latents. No parameters, no indices, no losses."""

    @property
    def codebook_size(self) -> None:
        """A continuous bottleneck has no codebook."""
        return None

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for latents of that many channels."""
        return latent_channels

    def __call__(self, z: Array, train: bool = False) -> Encoding:
        """``z (..., D)``, any float dtype -> latents, float32."""
        return Encoding(latents=z.astype(jnp.float32))
