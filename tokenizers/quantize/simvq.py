"""SimVQ (Zhu et al., https://arxiv.org/abs/2411.02038): a fixed random table seen through one learned linear map.

Every step of the map moves all codes, used or not, so that none dies.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import errors
from ..types import Encoding
from .gradients import ESTIMATORS
from .nearest import nearest

Array = jax.Array


class SimVQ(nn.Module):
    """Replaces every vector of ``z (..., D)`` by the nearest of K codes ``table @ kernel``.

    ``losses["codebook"]`` = mean((code - sg(z))^2) trains the map, ``losses["commitment"]`` = mean((sg(code) - z)^2)
    the encoder; the released weights are 1 and 0.25. The table is in the collection ``codebook`` (``table (K, D)``) and
    never changes; the parameter is ``kernel (D, D)``.

    Attributes:
      codebook_size: K.
      code_dim: D.
      estimator: of the gradient that z receives from the latents; ``rotation_trick`` in vector-quantize-pytorch.
    """

    codebook_size: int
    code_dim: int
    estimator: str = "straight_through"

    def __post_init__(self):
        errors.pick("gradient estimator", self.estimator, ESTIMATORS)
        super().__post_init__()

    def setup(self):
        shape, scale = (self.codebook_size, self.code_dim), self.code_dim**-0.5
        self.table = self.variable(
            "codebook", "table", lambda: scale * jax.random.normal(self.make_rng("params"), shape, jnp.float32)
        )
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.code_dim, self.code_dim), jnp.float32)

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for codes of that many channels."""
        if latent_channels != self.code_dim:
            raise ValueError(f"a codebook of code_dim={self.code_dim} does not make {latent_channels} channels.")
        return latent_channels

    def codebook(self) -> Array:
        """The codes ``(K, D)``, float32."""
        return jnp.matmul(jax.lax.stop_gradient(self.table.value), self.kernel, precision=jax.lax.Precision.HIGHEST)

    def __call__(self, z: Array, train: bool = False) -> Encoding:
        """Quantizes ``z (..., D)``, any float dtype -> float32 codes, int32 indices ``(...)`` and the loss terms."""
        if z.shape[-1] != self.code_dim:
            raise ValueError(f"the codebook has codes of {self.code_dim} channels, got shape {z.shape}.")
        z, codebook = z.astype(jnp.float32), self.codebook()
        indices = nearest(z, codebook)
        codes = jnp.take(codebook, indices, axis=0)
        losses = {
            "commitment": jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - z)),
            "codebook": jnp.mean(jnp.square(codes - jax.lax.stop_gradient(z))),
        }
        return Encoding(latents=ESTIMATORS[self.estimator](z, codes), indices=indices, losses=losses)

    def indices_to_codes(self, indices: Array) -> Array:
        """int ``(...)`` in [0, K) -> float32 codes ``(..., D)``; NaN where an index is out of range."""
        return jnp.take(self.codebook(), indices, axis=0)

    def codes_to_indices(self, codes: Array) -> Array:
        """Codes ``(..., D)`` -> int32 ``(...)``: the nearest code, the lowest index of equal ones."""
        return nearest(codes.astype(jnp.float32), self.codebook())
