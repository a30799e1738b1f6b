"""Product quantization: channels in groups, a bottleneck and an index for each (Jegou et al., 2011; wav2vec 2.0).

https://inria.hal.science/inria-00514462; for images Open-MAGVIT2's factorised tokens, https://arxiv.org/abs/2409.04410.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..types import Encoding

Array = jax.Array


class Grouped(nn.Module):
    """Cuts the channels into equal parts, one bottleneck each. The indices have a last axis of one per part.

    Loss terms of one name are averaged over the groups, which keeps means over elements what they are.

    Attributes:
      groups: bottlenecks with the same number of codes, each with parameters and statistics of its own; or a single
        one, which serves all parts (one codebook for all).
      parts: number of parts that a single bottleneck serves.
    """

    groups: tuple[nn.Module, ...]
    parts: int = 1

    def __post_init__(self):
        if not self.groups:
            raise ValueError("grouped quantization needs at least one group.")
        if self.parts < 1 or (self.parts > 1 and len(self.groups) > 1):
            raise ValueError(f"parts={self.parts} needs a single group, got {len(self.groups)}.")
        super().__post_init__()

    @property
    def codebooks(self) -> int:
        """Indices per position."""
        return len(self.groups) * self.parts

    @property
    def codebook_size(self) -> int:
        """Number of values of one index."""
        sizes = {group.codebook_size for group in self.groups}
        if len(sizes) != 1 or None in sizes:
            raise ValueError(f"groups need one codebook size, got {sorted(map(str, sizes))}.")
        return sizes.pop()

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for codes of that many channels."""
        if latent_channels % self.codebooks:
            raise ValueError(f"{self.codebooks} groups do not divide {latent_channels} channels.")
        each = latent_channels // self.codebooks
        return sum(group.input_channels(each) for group in self.groups) * self.parts

    def __call__(self, z: Array, train: bool = False) -> Encoding:
        """``z (..., D)``, any float dtype -> float32 codes ``(..., D)`` and int32 indices ``(..., parts)``."""
        if self.parts > 1:
            encoding = self.groups[0](self._folded(z), train)
            return encoding.replace(latents=_merged(encoding.latents))
        parts = [group(part, train) for group, part in zip(self.groups, self._cut(z), strict=True)]
        return Encoding(
            latents=jnp.concatenate([part.latents for part in parts], axis=-1),
            indices=jnp.stack([part.indices for part in parts], axis=-1),
            losses={name: sum(part.losses[name] for part in parts) / len(parts) for name in parts[0].losses},
        )

    def indices_to_codes(self, indices: Array) -> Array:
        """int ``(..., parts)`` -> float32 codes ``(..., D)``."""
        if indices.shape[-1] != self.codebooks:
            raise ValueError(f"indices of {self.codebooks} groups end in that axis, got shape {indices.shape}.")
        if self.parts > 1:
            return _merged(self.groups[0].indices_to_codes(indices))
        parts = [group.indices_to_codes(indices[..., i]) for i, group in enumerate(self.groups)]
        return jnp.concatenate(parts, axis=-1)

    def codes_to_indices(self, codes: Array) -> Array:
        """Codes ``(..., D)`` -> int32 ``(..., parts)``; the inverse of `indices_to_codes`."""
        if self.parts > 1:
            return self.groups[0].codes_to_indices(self._folded(codes))
        parts = zip(self.groups, self._cut(codes), strict=True)
        return jnp.stack([group.codes_to_indices(part) for group, part in parts], axis=-1)

    def _cut(self, x: Array) -> list[Array]:
        folded = self._folded(x)
        return [folded[..., i, :] for i in range(self.codebooks)]

    def _folded(self, x: Array) -> Array:
        if x.shape[-1] % self.codebooks:
            raise ValueError(f"{self.codebooks} groups do not divide the channels of shape {x.shape}.")
        return x.reshape(*x.shape[:-1], self.codebooks, -1)


def _merged(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], -1)
