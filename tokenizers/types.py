"""The values that travel between bottlenecks, models, the trainer and the public API."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import struct

Array = jax.Array


@struct.dataclass
class Encoding:
    """What an encoder (or a bottleneck alone) returns.

    Attributes:
      latents: what the decoder reads: quantized codes, or the posterior mean (a sample of it while training),
        ``(B, T', H', W', D)``, ``(B, H', W', D)`` or ``(B, N, D)``.
      indices: int32 token ids, the shape of ``latents`` without the channel axis; ``None`` for continuous tokenizers.
      mean: posterior mean of a KL tokenizer, else ``None``.
      logvar: posterior log-variance of a KL tokenizer, else ``None``.
      losses: named, unweighted float32 scalars of the bottleneck (``commitment``, ``codebook``, ``kl``, ...).
    """

    latents: Array
    indices: Array | None = None
    mean: Array | None = None
    logvar: Array | None = None
    losses: dict[str, Array] = struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Facts about a tokenizer that the code around it needs.

    Attributes:
      compression: input pixels per token along (time, height, width).
      latent_channels: channels of ``Encoding.latents``.
      codebook_size: number of codes, ``None`` for continuous tokenizers.
      causal: a change of frame t never changes anything computed for frames before t (but see ``lookahead``).
      video: the module takes ``(B, T, H, W, C)``; an image tokenizer takes ``(B, H, W, C)``.
      last_layer: parameter path of the decoder's last kernel, for the adaptive GAN weight.
      first_frame_alone: the first frame has a latent of its own, so clips of 1 + k * compression[0] frames fit.
      channels: pixel channels.
      tokens_per_item: number of tokens of a 1-D tokenizer, whatever the input size; ``None`` for grids.
      codebooks: indices per latent; if there are several (residual quantizers), they are a last axis of the indices.
      codebook_sizes: number of codes of each, where they differ; ``codebook_size`` is then the largest.
      fills_front: clips of any length fit: the module puts copies of the first frame in front, up to a multiple of
        ``compression[0]``, and ``decode`` gives those frames too. The clip is the end of what comes out.
      lookahead: latent frames after its own that a decoded frame depends on. A stream is decoded that much later, and
        its last chunk by a call that leaves no history.
    """

    compression: tuple[int, int, int]
    latent_channels: int
    codebook_size: int | None
    causal: bool
    video: bool
    last_layer: str
    first_frame_alone: bool = False
    channels: int = 3
    tokens_per_item: int | None = None
    codebooks: int = 1
    codebook_sizes: tuple[int, ...] = ()
    fills_front: bool = False
    lookahead: int = 0

    @property
    def bits_per_token(self) -> float | None:
        """log2 of the codebook size, of all codebooks together; ``None`` for continuous tokenizers."""
        if self.codebook_size is None:
            return None
        return sum(math.log2(size) for size in self.codebook_sizes or (self.codebook_size,) * self.codebooks)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A released size of a tokenizer: the fields of its ``Model`` and where it comes from."""

    config: Mapping[str, Any]
    paper: str
    source: str = ""
    license: str = ""
    note: str = ""

    def __post_init__(self):
        object.__setattr__(self, "config", MappingProxyType(dict(self.config)))
