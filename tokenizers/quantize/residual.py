"""Residual quantization: each layer quantizes what the layers before left over (SoundStream, section 3.3).

Zeghidour et al., https://arxiv.org/abs/2107.03312; for images Lee et al., https://arxiv.org/abs/2203.01941.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..types import Encoding
from .fsq import FSQ
from .lfq import LFQ

Array = jax.Array


class Residual(nn.Module):
    """The sum of the codes of several bottlenecks. A position has one index per layer: a last axis of the indices.

    Layer i sees ``(z - codes so far) / scales[i]``; its codes count ``scales[i]`` times. No gradient passes from one
    layer's residual to the layers before. Loss terms of one name are added up over the layers.

    Different indices may have (nearly) the same sum: `codes_to_indices` quantizes again, and finds the indices that
    encoding gave.

    Attributes:
      layers: bottlenecks with the same number of codes, each with parameters and statistics of its own.
      scales: per layer, a number or one per channel; None for all ones.
      soft_clamp: z is first kept inside (-limit, limit), one limit per channel, by ``tanh(z / limit) * limit``.
      fewest: while training only the first n layers are used, n drawn for each batch from ``fewest`` to all of them
        (rng stream ``bottleneck``): one tokenizer of several rates (SoundStream, section 3.4). Layers that are left out
        have index -1, no loss, and keep their statistics. 0: always all layers.
      repeat: how often the layers follow one another: ``Residual((vq,), repeat=4)`` is four layers with one codebook.
        Moving averages then collect over a pass, and codes move at its end.
    """

    layers: tuple[nn.Module, ...]
    scales: tuple[float | tuple[float, ...], ...] | None = None
    soft_clamp: tuple[float, ...] | None = None
    fewest: int = 0
    repeat: int = 1

    def __post_init__(self):
        if self.repeat < 1 or not 0 <= self.fewest <= self.codebooks:
            raise ValueError(
                f"repeat={self.repeat} must be at least 1, and fewest={self.fewest} between 0 and the number of "
                f"layers, {self.codebooks}."
            )
        if not self.layers:
            raise ValueError("residual quantization needs at least one layer.")
        if self.scales is not None and len(self.scales) != self.codebooks:
            raise ValueError(f"{self.codebooks} layers need as many scales, got {self.scales}.")
        super().__post_init__()

    @property
    def codebooks(self) -> int:
        """Indices per position."""
        return len(self.layers) * self.repeat

    @property
    def codebook_size(self) -> int:
        """Number of values of one index."""
        sizes = {layer.codebook_size for layer in self.layers}
        if len(sizes) != 1 or None in sizes:
            raise ValueError(f"layers of a residual quantizer need one codebook size, got {sorted(map(str, sizes))}.")
        return sizes.pop()

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for codes of that many channels."""
        for layer in self.layers:
            if layer.input_channels(latent_channels) != latent_channels:
                raise ValueError("layers of a residual quantizer must make as many channels as they read.")
        return latent_channels

    def __call__(self, z: Array, train: bool = False) -> Encoding:
        """``z (..., D)``, any float dtype -> float32 codes ``(..., D)`` and int32 indices ``(..., layers)``."""
        z = z.astype(jnp.float32)
        if self.soft_clamp is not None:
            limit = np.asarray(self.soft_clamp, np.float32)
            z = jnp.tanh(z / limit) * limit
        used = self.codebooks
        start = [layer.variables.get("codebook", {}).get("codes") for layer in self.layers]
        if train and self.fewest:
            used = jax.random.randint(self.make_rng("bottleneck"), (), self.fewest, used + 1)
        residual, total, indices, losses = z, jnp.zeros_like(z), [], {}
        for i, layer in enumerate(self.layers * self.repeat):
            encoding = self._called(layer, residual / self._scale(i), train, i < used)
            codes = encoding.latents * self._scale(i)
            residual = residual - jax.lax.stop_gradient(codes)
            total = total + codes
            indices.append(encoding.indices)
            for name, value in encoding.losses.items():
                losses[name] = losses.get(name, 0.0) + value
            self._hold_codes(start, i)
        return Encoding(latents=total, indices=jnp.stack(indices, axis=-1), losses=losses)

    def _called(self, layer: nn.Module, z: Array, train: bool, used: bool | Array) -> Encoding:
        """What a layer makes of its residual; nothing, and no trace in its statistics, where it is not used."""
        before = dict(layer.variables.get("codebook", {}))
        encoding = layer(z, train)
        if used is True or self.is_initializing():
            return encoding
        if self.is_mutable_collection("codebook"):
            for name, value in before.items():
                after = layer.get_variable("codebook", name)
                kept = jax.tree.map(lambda new, old: jnp.where(used, new, old), after, value)
                layer.put_variable("codebook", name, kept)
        return Encoding(
            latents=jnp.where(used, encoding.latents, 0.0),
            indices=jnp.where(used, encoding.indices, -1),
            losses={name: jnp.where(used, value, 0.0) for name, value in encoding.losses.items()},
        )

    def _hold_codes(self, start: list[Array | None], call: int) -> None:
        """Layers that come again see the codes that the pass began with."""
        place = call % len(self.layers)
        if start[place] is None or not self.is_mutable_collection("codebook") or self.is_initializing():
            return
        if call + len(self.layers) < self.codebooks:
            self.layers[place].put_variable("codebook", "codes", start[place])

    def indices_to_codes(self, indices: Array) -> Array:
        """int ``(..., layers)`` -> float32 codes ``(..., D)``.

        Fewer layers than all give a coarser code, and so do indices of -1.
        """
        if not 1 <= indices.shape[-1] <= self.codebooks:
            raise ValueError(f"indices of {self.codebooks} layers end in that axis, got shape {indices.shape}.")
        parts = [
            jnp.where(indices[..., i, None] < 0, 0.0, layer.indices_to_codes(jnp.maximum(indices[..., i], 0)))
            * self._scale(i)
            for i, layer in enumerate((self.layers * self.repeat)[: indices.shape[-1]])
        ]
        return sum(parts[1:], parts[0])

    def codes_to_indices(self, codes: Array) -> Array:
        """Codes ``(..., D)`` -> int32 ``(..., layers)`` by quantizing layer by layer."""
        residual, indices = codes.astype(jnp.float32), []
        for i, layer in enumerate(self.layers * self.repeat):
            encoding = layer(residual / self._scale(i))
            residual = residual - encoding.latents * self._scale(i)
            indices.append(encoding.indices)
        return jnp.stack(indices, axis=-1)

    def _scale(self, layer: int) -> np.ndarray:
        return np.float32(1.0) if self.scales is None else np.asarray(self.scales[layer], np.float32)


def residual_fsq(levels: tuple[int, ...], codebooks: int) -> Residual:
    """Residual FSQ as in vector-quantize-pytorch: layer i works at ``levels**-i``, on symmetric, hard-clamped grids."""
    layers = tuple(FSQ(tuple(levels), symmetric=True, bound="clamp", parent=None) for _ in range(codebooks))
    scales = tuple(tuple(float(size) ** -i for size in levels) for i in range(codebooks))
    limits = tuple(1.0 + 1.0 / (size - 1) for size in levels)
    return Residual(layers, scales=scales, soft_clamp=limits)


def residual_lfq(bits: int, codebooks: int, **fields) -> Residual:
    """Residual LFQ as in vector-quantize-pytorch: layer i has codes of magnitude ``2**-i``; fields are LFQ's."""
    return Residual(tuple(LFQ(bits, scale=2.0**-i, parent=None, **fields) for i in range(codebooks)))
