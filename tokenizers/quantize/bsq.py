"""Binary spherical quantization (Zhao et al., https://arxiv.org/abs/2406.07548): signs of a unit vector."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import errors
from ..types import Encoding
from .entropy import code_entropies
from .gradients import straight_through
from .lfq import LFQ

Array = jax.Array
_MINIMUM = 1e-8


class BSQ(nn.Module):
    """Quantizes ``z (..., D)``, scaled to length one, to corners of the cube inside the unit sphere. No parameters.

    ``losses["commitment"]`` = mean over positions of |z - sg(code)|^2 (released weight 0.25), and while training
    ``entropy_sample`` and ``entropy_codebook`` (weights w and -w; the official code divides both by
    ``inverse_temperature``). Channel 0 is the most significant bit of an index. The straight-through gradient is that
    of the signs times D^-0.5, as in the official code, which scales after the sign.

    Attributes:
      bits: D; the codebook size is 2^D.
      entropy: ``grouped`` takes both entropies over groups of channels and adds them up (equation 9); ``analytical``
        over single bits, which for the sample term is exact (equation 8) and for the codebook an upper bound.
      group_bits: channels in a group; 2^group_bits codes are handled at once.
      inverse_temperature: of the entropy terms.
      entropy_chunk_size: positions of the global batch handled at once by the entropy terms.
      normalise: scale z to length one; off where the caller does it.
    """

    bits: int
    entropy: str = "grouped"
    group_bits: int = 9
    inverse_temperature: float = 1.0
    entropy_chunk_size: int = 256
    normalise: bool = True

    def __post_init__(self):
        if self.entropy not in ("analytical", "grouped"):
            raise errors.unknown("entropy of BSQ", self.entropy, ("analytical", "grouped"))
        if self.group_bits < 1 or self.bits % self.group_bits:
            raise ValueError(f"group_bits must divide the {self.bits} bits, got {self.group_bits}.")
        LFQ(self.bits, parent=None)  # refuses bits that no index holds
        super().__post_init__()

    @property
    def codebook_size(self) -> int:
        """2^bits."""
        return 2**self.bits

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for codes of that many channels."""
        return self._signs.input_channels(latent_channels)

    def __call__(self, z: Array, train: bool = False) -> Encoding:
        """Quantizes ``z (..., D)``, any float dtype -> float32 codes +-D^-0.5 and int32 indices ``(...)``."""
        z = z.astype(jnp.float32)
        if self.normalise:
            z = z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
        signs = self._signs(z)
        codes = jax.lax.stop_gradient(signs.latents)
        losses = {"commitment": jnp.mean(jnp.sum(jnp.square(codes - z), axis=-1))}
        if train:
            losses["entropy_sample"], losses["entropy_codebook"] = self._entropies(z)
        return Encoding(latents=straight_through(self._scale * z, codes), indices=signs.indices, losses=losses)

    def indices_to_codes(self, indices: Array) -> Array:
        """int ``(...)`` in [0, 2^D) -> float32 codes ``(..., D)``, unit vectors."""
        return self._signs.indices_to_codes(indices)

    def codes_to_indices(self, codes: Array) -> Array:
        """Codes ``(..., D)`` -> int32 ``(...)``; only the signs count. The inverse of `indices_to_codes`."""
        return self._signs.codes_to_indices(codes)

    @property
    def _signs(self) -> LFQ:
        return LFQ(self.bits, bit_order="big", scale=self._scale, entropy=None, parent=None)

    @property
    def _scale(self) -> float:
        return 1.0 / math.sqrt(self.bits)

    def _entropies(self, z: Array) -> tuple[Array, Array]:
        slope = 2.0 * self.inverse_temperature
        if self.entropy == "analytical":
            logits = 2.0 * slope * self._scale * z
            p = jnp.stack([jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)])  # one minus the first would round
            sample = jnp.mean(jnp.sum(_entropy(p), axis=(0, -1)))
            return sample, jnp.sum(_entropy(jnp.mean(p.reshape(2, -1, self.bits), axis=1)))
        group = LFQ(self.group_bits, bit_order="big", scale=self._scale, entropy=None, parent=None)
        corners = group.indices_to_codes(jnp.arange(group.codebook_size, dtype=jnp.int32))
        terms = [
            code_entropies(part, corners, slope, "smoothed_1e-8", self.entropy_chunk_size)
            for part in jnp.split(z, self.bits // self.group_bits, axis=-1)
        ]
        return tuple(sum(values) for values in zip(*terms, strict=True))


def _entropy(p: Array) -> Array:
    return -p * jnp.log(p + _MINIMUM)
