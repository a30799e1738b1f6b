"""Lookup-free quantization (MAGVIT-v2, Yu et al., https://arxiv.org/abs/2310.05737): the sign of every channel."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import errors
from ..types import Encoding
from .entropy import FORMS, code_entropies
from .gradients import straight_through

Array = jax.Array

_HIGHEST = jax.lax.Precision.HIGHEST

# Weight of channel d of D in the index. "little": channel 0 is the least significant bit (Open-MAGVIT2);
# "big": it is the most significant one (vector-quantize-pytorch, BSQ).
BIT_ORDERS = {"little": lambda bits: 2 ** np.arange(bits), "big": lambda bits: 2 ** np.arange(bits)[::-1]}


class LFQ(nn.Module):
    """Quantizes ``z (..., D)`` to the corners of a cube: ``+scale`` where z > 0, else ``-scale``. No parameters.

    Returns ``commitment`` = mean((z - sg(codes))^2) always, and while training ``entropy_sample`` and
    ``entropy_codebook`` (weights w and -w * gamma). Several codebooks that share their statistics are an axis before
    the last. Spherical codes (BSQ) are ``scale = D**-0.5`` on unit vectors.

    Attributes:
      bits: D; the codebook size is 2^D.
      bit_order: ``little`` or ``big``, see `BIT_ORDERS`.
      scale: magnitude of the codes.
      factors: token factorization (section 3.4; Open-MAGVIT2's generators predict one factor after the other): bits of
        the first channels, of the next ones, ... become an index each, on a last axis of the indices. In the little
        order the index of a whole code is ``first + 2**bits_of_the_first * second``. Losses stay what they are.
      entropy: form of the entropy terms (``entropy.FORMS``): ``smoothed`` for MAGVIT and Open-MAGVIT2, ``clamped`` for
        vector-quantize-pytorch; None leaves them out.
      inverse_temperature: of the entropy terms; 100 in every release.
      entropy_chunk_size: positions of the global batch handled at once by the entropy terms in the forms other than
        ``smoothed``, which needs no array of positions x 2^bits.
      entropy_group_bits: take the entropies over groups of that many channels and add them up (BSQ, equation 9), which
        costs D / g * 2^g codes in place of 2^D; the default is one group. The sample term is the same but for the 1e-5.
    """

    bits: int
    bit_order: str = "little"
    scale: float = 1.0
    factors: tuple[int, ...] = ()
    entropy: str | None = "smoothed"
    inverse_temperature: float = 100.0
    entropy_chunk_size: int = 256
    entropy_group_bits: int | None = None

    def __post_init__(self):
        if not 1 <= self.bits <= 30:
            raise ValueError(f"LFQ takes 1 to 30 bits (int32 indices), got {self.bits}.")
        errors.pick("bit order", self.bit_order, BIT_ORDERS)
        if self.entropy is not None:
            errors.pick("entropy form", self.entropy, FORMS)
        group = self.entropy_group_bits
        if group is not None and (group < 1 or self.bits % group):
            raise ValueError(f"entropy_group_bits must divide the {self.bits} bits, got {group}.")
        if self.factors and (sum(self.factors) != self.bits or min(self.factors) < 1):
            raise ValueError(f"factors must add up to the {self.bits} bits, got {self.factors}.")
        super().__post_init__()

    @property
    def codebook_size(self) -> int:
        """2^bits; of the largest factor where there are factors."""
        return 2 ** max(self.factors or (self.bits,))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of values of each index."""
        return tuple(2**bits for bits in self.factors or (self.bits,))

    @property
    def codebooks(self) -> int:
        """Indices per position."""
        return len(self.codebook_sizes)

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for codes of that many channels."""
        if latent_channels != self.bits:
            raise ValueError(f"LFQ with bits={self.bits} makes {self.bits} channels, not {latent_channels}.")
        return latent_channels

    def __call__(self, z: Array, train: bool = False) -> Encoding:
        """Quantizes ``z (..., D)``, any float dtype and range -> float32 codes +-scale and int32 indices ``(...)``."""
        self._check(z.shape)
        z = z.astype(jnp.float32)
        codes = jnp.where(z > 0, self.scale, -self.scale).astype(jnp.float32)
        losses = {"commitment": jnp.mean(jnp.square(z - codes))}
        if self.entropy is not None and train:
            losses["entropy_sample"], losses["entropy_codebook"] = self._entropies(z)
        return Encoding(latents=straight_through(z, codes), indices=self.codes_to_indices(codes), losses=losses)

    def indices_to_codes(self, indices: Array) -> Array:
        """int ``(...)`` in [0, 2^D), or ``(..., factors)`` -> float32 codes ``(..., D)`` of +-scale."""
        if not self.factors:
            return self._corners(indices, self.bits)
        parts = [self._corners(indices[..., i], bits) for i, bits in enumerate(self.factors)]
        return jnp.concatenate(parts, axis=-1)

    def codes_to_indices(self, codes: Array) -> Array:
        """Codes ``(..., D)`` -> int32 ``(...)`` or ``(..., factors)``; only the signs count. Inverse of the above."""
        self._check(codes.shape)
        ones = (codes > 0).astype(jnp.int32)
        if not self.factors:
            return jnp.sum(ones * self._basis(self.bits), axis=-1)
        parts = jnp.split(ones, np.cumsum(self.factors)[:-1], axis=-1)
        return jnp.stack([jnp.sum(part * self._basis(part.shape[-1]), axis=-1) for part in parts], axis=-1)

    def _entropies(self, z: Array) -> tuple[Array, Array]:
        group = self.entropy_group_bits or self.bits
        if self.entropy == "smoothed":
            parts = [self._factorized(z[..., first : first + group]) for first in range(0, self.bits, group)]
            return sum(sample for sample, _ in parts), sum(mean for _, mean in parts)
        codebook = self._corners(jnp.arange(2**group, dtype=jnp.int32), group)
        scale = 2.0 * self.inverse_temperature
        terms = [
            code_entropies(z[..., first : first + group], codebook, scale, self.entropy, self.entropy_chunk_size)
            for first in range(0, self.bits, group)
        ]
        return sum(sample for sample, _ in terms), sum(mean for _, mean in terms)

    def _factorized(self, z: Array) -> tuple[Array, Array]:
        """The two entropies of ``z (..., g)`` without an array of positions x 2^g.

        The choice of a corner is one of its bits, each by itself: the entropy of a position is a sum over bits, and its
        probabilities are the outer product of those of two halves, so that their mean over positions is one product of
        two (positions, 2^(g/2)) matrices.
        """
        rows = z.reshape(-1, z.shape[-1])
        scale = 2.0 * self.inverse_temperature
        sample = jnp.mean(jnp.sum(_bit_entropy(2.0 * self.scale * scale * rows), axis=-1))
        half = rows.shape[-1] // 2
        first, second = (
            jax.nn.softmax(scale * jnp.matmul(part, self._corners(jnp.arange(2**bits), bits).T, precision=_HIGHEST))
            for part, bits in ((rows[:, :half], half), (rows[:, half:], rows.shape[-1] - half))
        )
        mean = jnp.matmul(first.T, second, precision=_HIGHEST) / rows.shape[0]
        return sample, FORMS["smoothed"].mean(mean.reshape(-1))

    def _basis(self, bits: int) -> np.ndarray:
        return BIT_ORDERS[self.bit_order](bits).astype(np.int32)

    def _corners(self, indices: Array, bits: int) -> Array:
        ones = (indices[..., None] // self._basis(bits)) % 2
        return (2.0 * ones.astype(jnp.float32) - 1.0) * self.scale

    def _check(self, shape: tuple[int, ...]):
        if shape[-1] != self.bits:
            raise ValueError(f"LFQ with {self.bits} bits needs {self.bits} channels, got shape {shape}.")


def _bit_entropy(logit: Array) -> Array:
    """Entropy in nats of a bit whose two values differ by that logit: exact where it nearly vanishes."""
    size = jnp.abs(logit)
    rest = jnp.exp(-size)
    return jnp.log1p(rest) + size * rest / (1.0 + rest)


def soft_clamp(z: Array, limit: float) -> Array:
    """``tanh(z / limit) * limit``: keeps what LFQ sees inside (-limit, limit). For use before the quantizer."""
    return jnp.tanh(z / limit) * limit
