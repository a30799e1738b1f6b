"""Residual finite scalar quantization: FSQ (https://arxiv.org/abs/2309.15505) of what the quantizers before left over.

That of the Cosmos tokenizer (ResidualFSQuantizer of NVIDIA/Cosmos-Tokenizer): the residual is not scaled between the
quantizers.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..types import Encoding
from .fsq import FSQ

Array = jax.Array


class ResidualFSQ(nn.Module):
    """Sum of the codes of ``codebooks`` quantizers; each quantizes the residual of the ones before. No parameters.

    A position has one index per quantizer, the last axis of the indices. Different indices may have the same sum, so
    there is no way back from codes to indices.

    Attributes:
      levels: of each channel, the same in every quantizer.
      codebooks: number of quantizers.
    """

    levels: tuple[int, ...]
    codebooks: int = 4

    def __post_init__(self):
        if self.codebooks < 1:
            raise ValueError(f"residual FSQ needs at least one quantizer, got codebooks={self.codebooks}.")
        FSQ(self.levels, parent=None)  # refuses levels that no quantizer takes
        super().__post_init__()

    @property
    def codebook_size(self) -> int:
        """Number of values of one index."""
        return self._quantizer.codebook_size

    @property
    def _quantizer(self) -> FSQ:
        return FSQ(self.levels, parent=None)

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for codes of that many channels."""
        return self._quantizer.input_channels(latent_channels)

    def __call__(self, z: Array, train: bool = False) -> Encoding:
        """``z (..., D)``, any float dtype -> float32 codes ``(..., D)`` and int32 indices ``(..., codebooks)``.

        The gradient is that of the tanh of each quantizer; the residual that the next one sees passes none of its own.
        """
        residual, codes, indices = z.astype(jnp.float32), 0.0, []
        for _ in range(self.codebooks):
            encoding = self._quantizer(residual, train)
            residual = residual - jax.lax.stop_gradient(encoding.latents)
            codes = codes + encoding.latents
            indices.append(encoding.indices)
        return Encoding(latents=codes, indices=jnp.stack(indices, axis=-1))

    def indices_to_codes(self, indices: Array) -> Array:
        """int ``(..., codebooks)`` -> float32 codes ``(..., D)``."""
        if indices.shape[-1] != self.codebooks:
            raise ValueError(f"indices of {self.codebooks} quantizers end in that axis; got shape {indices.shape}.")
        return self._quantizer.indices_to_codes(indices).sum(axis=-2)
