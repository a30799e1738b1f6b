"""MAGVIT's 3D VQ: the VQGAN of MaskGIT with 3D convolutions, 4 x 8 x 8 pixels per token. Not causal.

Yu et al., "MAGVIT: masked generative video transformer", https://arxiv.org/abs/2212.05199, section 3.1 and appendix
A.1; code google-research/magvit (`videogvt/models/enc_dec_3dcnn.py`). No weights are released.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..nn.blocks import ResBlock
from ..nn.conv import Conv3d
from ..nn.norm import GroupNorm
from ..nn.resample import average_pool
from ..parallel.constrain import constrain
from ..quantize.vq import VectorQuantizer
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "magvit"

_AXES = ("batch", "time", "height", "width", "channel")
_norm = functools.partial(GroupNorm, epsilon=1e-6)


def pool(x: Array, factors: tuple[int, int, int]) -> Array:
    """Mean of blocks; those at the end may be incomplete: (b t h w c) -> (b ceil(t/f) ceil(h/f) ceil(w/f) c)."""
    pads = [(0, -size % factor) for size, factor in zip(x.shape[1:-1], factors, strict=True)]
    # The mean of a block of 2 with one element is that element, as if it were there twice.
    return average_pool(jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="edge"), factors)


class _Network(nn.Module):
    """Fields and blocks of encoder and decoder; fields as in `Model`."""

    out_channels: int
    widths: tuple[int, ...]
    time_levels: tuple[int, ...]
    blocks: int
    dtype: Any
    remat: bool

    def residual(self, x: Array, features: int, name: str) -> Array:
        """``blocks`` residual blocks without biases."""
        block = nn.remat(ResBlock) if self.remat else ResBlock
        conv = functools.partial(Conv3d, use_bias=False, dtype=self.dtype)
        for i in range(self.blocks):
            x = block(features, conv, _norm, name=f"{name}_block{i}")(x)
        return x

    def factors(self, level: int) -> tuple[int, int, int]:
        """Between this level and the next smaller one."""
        return (2 if level in self.time_levels else 1, 2, 2)


class Encoder(_Network):
    """Levels of residual blocks with average pooling between them."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b t' h' w' d)
        x = Conv3d(self.widths[0], use_bias=False, dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        for level, features in enumerate(self.widths):
            x = self.residual(x, features, f"down{level}")
            if level + 1 < len(self.widths):
                x = pool(x, self.factors(level))
        x = nn.swish(_norm(name="norm_out")(self.residual(x, self.widths[-1], "mid")))
        return Conv3d(self.out_channels, 1, dtype=self.dtype, name="conv_out")(x)


class Decoder(_Network):
    """The mirror image, with a repetition and a convolution at the end of each level but the last."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t' h' w' d) -> (b t h w c)
        x = Conv3d(self.widths[-1], dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        x = self.residual(x, self.widths[-1], "mid")
        for level in reversed(range(len(self.widths))):
            features = self.widths[level]
            x = self.residual(x, features, f"up{level}")
            if level:
                factors = self.factors(level - 1)
                x = Conv3d(features, repeats=factors, dtype=self.dtype, name=f"up{level}_upsample")(x)
        x = nn.swish(_norm(name="norm_out")(x))
        return Conv3d(self.out_channels, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)


class Model(nn.Module):
    """Encoder, codebook, decoder. The networks work on pixels in [0, 1]; here they come and go in [-1, 1].

    Attributes:
      bottleneck: a `VectorQuantizer`; the authors' weights are ``commitment`` 0.25, ``codebook`` 1 and, with
        ``entropy="smoothed"``, ``entropy_sample`` 0.1 and ``entropy_codebook`` -0.1.
      latent_channels: channels of the codes.
      widths: channels of each level, from pixels to latents.
      time_levels: levels after which time is halved as well as space.
      encoder_blocks, decoder_blocks: residual blocks per level, and in the middle.
      remat: recompute residual blocks in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = VectorQuantizer(1024, 256, entropy="smoothed")
    latent_channels: int = 256
    widths: tuple[int, ...] = (64, 128, 128, 256)
    time_levels: tuple[int, ...] = (0, 1)
    encoder_blocks: int = 2
    decoder_blocks: int = 2
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        shared, options = (self.widths, self.time_levels), (self.dtype, self.remat)
        channels = self.bottleneck.input_channels(self.latent_channels)
        self.encoder = Encoder(channels, *shared, self.encoder_blocks, *options)
        self.decoder = Decoder(3, *shared, self.decoder_blocks, *options)

    @property
    def spec(self) -> Spec:
        side = 2 ** (len(self.widths) - 1)
        return Spec(
            compression=(2 ** len(self.time_levels), side, side),
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            causal=False,
            video=True,
            last_layer="decoder/conv_out/kernel",
        )

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b t h w 3) in [-1, 1] -> (b t' h' w' d)
        return self.bottleneck(self.prequantized(pixels), train)

    def prequantized(self, pixels: Array) -> Array:  # (b t h w 3) -> (b t' h' w' d)
        """What the bottleneck reads, float32."""
        return self.encoder((constrain(pixels, *_AXES) + 1) / 2).astype(jnp.float32)

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b t' h' w' d) -> (b t h w 3)
        return self.decoder(constrain(latents, *_AXES)) * 2 - 1

    def indices_to_latents(self, indices: Array) -> Array:  # (b t' h' w') -> (b t' h' w' d)
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


def _published(width: int, blocks: int, codes: int, dim: int, note: str) -> Variant:
    return Variant(
        config={
            "bottleneck": {"name": "vq", "codebook_size": codes, "code_dim": dim, "entropy": "smoothed"},
            "latent_channels": dim,
            "widths": tuple(width * factor for factor in (1, 2, 2, 4)),
            "encoder_blocks": blocks,
            "decoder_blocks": blocks,
        },
        paper="https://arxiv.org/abs/2212.05199",
        source="https://github.com/google-research/magvit (code; no weights)",
        license="Apache-2.0 (code)",
        note=note,
    )


VARIANTS = {
    "magvit-3dvq-b-1024": _published(64, 2, 1024, 256, "16 frames of 128 x 128; UCF-101 class-conditional FVD 159"),
    "magvit-3dvq-l-1024": _published(128, 2, 1024, 256, "16 frames of 128 x 128; UCF-101 class-conditional FVD 76"),
    "magvit-3dvq-h-4096": _published(128, 4, 4096, 512, "16 frames of 128 x 128"),
}
