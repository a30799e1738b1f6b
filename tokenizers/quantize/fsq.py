"""Finite scalar quantization (Mentzer et al., https://arxiv.org/abs/2309.15505): a few levels per channel."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import errors
from ..types import Encoding
from .entropy import FORMS, code_entropies
from .gradients import straight_through

Array = jax.Array
# Widens the range a little, so that the outermost levels are reached at finite inputs (the official value).
_WIDEN = 1e-3
BOUNDS = ("tanh", "clamp")


class FSQ(nn.Module):
    """Rounds channel ``d`` to ``levels[d]`` values in [-1, 1]. No parameters.

    The shifted grid (the paper, vector-quantize-pytorch, Cosmos, VidTok) has the levels ``k / (L // 2)``: symmetric for
    odd L, ``[-1, 1 - 2 / L]`` for even L. The symmetric grid has L evenly spaced levels from -1 to 1.

    Attributes:
      levels: number of levels of each channel; their product is the codebook size.
      symmetric: the symmetric grid.
      entropy: also return ``entropy_sample`` and ``entropy_codebook`` while training, in this form of ``entropy.FORMS``
        (VidTok: ``clamped``; weights w and -w). They cost positions x codebook size; None leaves them out.
      inverse_temperature: of the entropy terms.
      entropy_chunk_size: positions of the global batch handled at once by the entropy terms.
      bound: ``tanh``, or ``clamp``, which cuts z at -1 and 1 on the symmetric grid (residual FSQ).
      commitment: also return ``commitment`` = mean((z - sg(codes))^2), measured on z before the tanh (VidTok).
    """

    levels: tuple[int, ...]
    symmetric: bool = False
    entropy: str | None = None
    inverse_temperature: float = 100.0
    entropy_chunk_size: int = 256
    commitment: bool = False
    bound: str = "tanh"

    def __post_init__(self):
        if self.bound not in BOUNDS:
            raise errors.unknown("bound", self.bound, BOUNDS)
        if self.bound == "clamp" and not self.symmetric:
            raise ValueError("bound='clamp' needs the symmetric grid.")
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"FSQ levels must be at least 2 each, got {tuple(self.levels)}.")
        if math.prod(self.levels) >= 2**31:
            raise ValueError(f"FSQ levels {tuple(self.levels)} give more codes than int32 indices can name (2^31 - 1).")
        if self.entropy is not None:
            errors.pick("entropy form", self.entropy, FORMS)
        super().__post_init__()

    @property
    def codebook_size(self) -> int:
        """Product of the levels."""
        return math.prod(self.levels)

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for codes of that many channels."""
        if latent_channels != len(self.levels):
            raise ValueError(
                f"FSQ levels {tuple(self.levels)} need {len(self.levels)} channels, not {latent_channels}."
            )
        return latent_channels

    def __call__(self, z: Array, train: bool = False) -> Encoding:
        """Quantizes ``z (..., D)``, any float dtype and range -> float32 codes in [-1, 1] and int32 indices ``(...)``.

        The gradient is that of the tanh: only the rounding is straight-through.
        """
        self._check(z.shape)
        z = z.astype(jnp.float32)
        bounded = self._bound(z)
        codes = straight_through(bounded, jnp.round(bounded)) if not self.symmetric else _floor(bounded)
        codes = self._normalise(codes)
        losses = {}
        if self.commitment:
            losses["commitment"] = jnp.mean(jnp.square(z - jax.lax.stop_gradient(codes)))
        if self.entropy is not None and train:
            codebook = self.indices_to_codes(jnp.arange(self.codebook_size, dtype=jnp.int32))
            losses["entropy_sample"], losses["entropy_codebook"] = code_entropies(
                z, codebook, 2.0 * self.inverse_temperature, self.entropy, self.entropy_chunk_size
            )
        return Encoding(latents=codes, indices=self.codes_to_indices(codes), losses=losses)

    def indices_to_codes(self, indices: Array) -> Array:
        """int ``(...)`` in [0, codebook_size) -> float32 codes ``(..., D)``. The first channel varies fastest."""
        steps = (indices[..., None] // self._basis) % np.asarray(self.levels, np.int32)
        return self._normalise(steps.astype(jnp.float32) - (0.0 if self.symmetric else self._half))

    def codes_to_indices(self, codes: Array) -> Array:
        """Codes ``(..., D)`` -> int32 ``(...)``; the inverse of `indices_to_codes`."""
        self._check(codes.shape)
        codes = jax.lax.stop_gradient(codes).astype(jnp.float32)
        steps = (codes + 1.0) / 2.0 * (self._sizes - 1.0) if self.symmetric else codes * self._half + self._half
        return jnp.sum(jnp.round(steps).astype(jnp.int32) * self._basis, axis=-1)

    @property
    def _sizes(self) -> np.ndarray:
        return np.asarray(self.levels, np.float32)

    @property
    def _half(self) -> np.ndarray:
        return np.asarray([size // 2 for size in self.levels], np.float32)

    @property
    def _basis(self) -> np.ndarray:
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)

    def _bound(self, z: Array) -> Array:
        # z -> the real line of steps, where rounding (shifted) or flooring (symmetric) happens.
        if self.symmetric:
            bounded = jnp.tanh(z) if self.bound == "tanh" else jnp.clip(z, -1.0, 1.0)
            return (self._sizes - 1.0) * (bounded + 1.0) / 2.0 + 0.5
        half_range = (self._sizes - 1.0) * np.float32(1.0 + _WIDEN) / 2.0
        offset = np.asarray([0.5 if size % 2 == 0 else 0.0 for size in self.levels], np.float32)
        shift = np.arctanh(offset / half_range).astype(np.float32)
        return jnp.tanh(z + shift) * half_range - offset

    def _normalise(self, steps: Array) -> Array:
        return steps * (2.0 / (self._sizes - 1.0)) - 1.0 if self.symmetric else steps / self._half

    def _check(self, shape: tuple[int, ...]):
        if shape[-1] != len(self.levels):
            raise ValueError(
                f"FSQ with levels {tuple(self.levels)} needs {len(self.levels)} channels, got shape {shape}."
            )


def _floor(x: Array) -> Array:
    return straight_through(x, jnp.floor(x))
