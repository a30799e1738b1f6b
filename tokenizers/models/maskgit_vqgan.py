"""The VQGAN of MaskGIT: no attention, no strided convolutions, 16 x 16 pixels per token of 1024 codes.

Chang et al., "MaskGIT: masked generative image transformer", https://arxiv.org/abs/2202.04200, section 3.1; released
code google-research/maskgit `nets/vqgan_tokenizer.py`, and its PyTorch port that TiTok and RAR use
(bytedance/1d-tokenizer `modeling/modules/maskgit_vqgan.py`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..nn.conv import Conv2d
from ..nn.norm import GroupNorm
from ..nn.resample import average_pool
from ..parallel.constrain import constrain
from ..quantize.vq import VectorQuantizer
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "maskgit_vqgan"

_AXES = ("batch", "height", "width", "channel")


class ResBlock(nn.Module):
    """norm, swish, convolution, twice, and a skip. No biases.

    Where the channels change, the "skip" is a 1x1 convolution of the block's own output, so that no identity path is
    left: an accident of the released code (a variable used twice) that the weights depend on.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w c) -> (b h w d)
        h = x
        for i in (1, 2):
            h = nn.swish(GroupNorm(epsilon=1e-6, name=f"norm{i}")(h))
            h = Conv2d(self.features, use_bias=False, dtype=self.dtype, name=f"conv{i}")(h)
        if x.shape[-1] != self.features:
            x = Conv2d(self.features, 1, use_bias=False, dtype=self.dtype, name="shortcut")(h)
        return constrain(x + h, *_AXES)


class Encoder(nn.Module):
    """Levels of residual blocks with 2x2 average pooling between them. Fields as in `Model`."""

    out_channels: int
    widths: tuple[int, ...]
    blocks: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w c) -> (b h/2^l w/2^l d), sizes rounded down
        block = nn.remat(ResBlock) if self.remat else ResBlock
        x = Conv2d(self.widths[0], use_bias=False, dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        for level, features in enumerate(self.widths):
            for i in range(self.blocks):
                x = block(features, self.dtype, name=f"down{level}_block{i}")(x)
            if level + 1 < len(self.widths):
                _, h, w, _ = x.shape
                x = average_pool(x[:, : h // 2 * 2, : w // 2 * 2], (2, 2))
        for i in range(self.blocks):
            x = block(self.widths[-1], self.dtype, name=f"mid_block{i}")(x)
        x = nn.swish(GroupNorm(epsilon=1e-6, name="norm_out")(x))
        return Conv2d(self.out_channels, 1, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """The mirror image, with a repetition and a convolution at the end of each level but the last."""

    pixel_channels: int
    widths: tuple[int, ...]
    blocks: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w d) -> (b 2^l*h 2^l*w c)
        block = nn.remat(ResBlock) if self.remat else ResBlock
        x = Conv2d(self.widths[-1], dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        for i in range(self.blocks):
            x = block(self.widths[-1], self.dtype, name=f"mid_block{i}")(x)
        for level in reversed(range(len(self.widths))):
            features = self.widths[level]
            for i in range(self.blocks):
                x = block(features, self.dtype, name=f"up{level}_block{i}")(x)
            if level:
                x = Conv2d(features, repeats=2, dtype=self.dtype, name=f"up{level}_upsample")(x)
        x = nn.swish(GroupNorm(epsilon=1e-6, name="norm_out")(x))
        return Conv2d(self.pixel_channels, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)


class Model(nn.Module):
    """Encoder, codebook, decoder. The networks work on pixels in [0, 1]; here they come and go in [-1, 1].

    Attributes:
      bottleneck: a `VectorQuantizer`; the authors' weights are ``commitment`` 0.25, ``codebook`` 1 and, with
        ``entropy="smoothed"``, ``entropy_sample`` 0.1 and ``entropy_codebook`` -0.1.
      latent_channels: channels of the codes.
      pixel_channels: of the image.
      widths: channels of each level, from pixels to latents.
      blocks: residual blocks per level, and in the middle.
      remat: recompute residual blocks in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = VectorQuantizer(1024, 256)
    latent_channels: int = 256
    pixel_channels: int = 3
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 2
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        shared = (self.widths, self.blocks, self.dtype, self.remat)
        self.encoder = Encoder(self.bottleneck.input_channels(self.latent_channels), *shared)
        self.decoder = Decoder(self.pixel_channels, *shared)

    @property
    def spec(self) -> Spec:
        side = 2 ** (len(self.widths) - 1)
        return Spec(
            compression=(1, side, side),
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            causal=True,
            video=False,
            last_layer="decoder/conv_out/kernel",
            channels=self.pixel_channels,
        )

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b h w c) in [-1, 1] -> (b h' w' d)
        return self.bottleneck(self.prequantized(pixels), train)

    def prequantized(self, pixels: Array) -> Array:  # (b h w c) -> (b h' w' d)
        """What the bottleneck reads, float32."""
        return self.encoder((constrain(pixels, *_AXES) + 1) / 2).astype(jnp.float32)

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b h' w' d) -> (b h w c)
        return self.decoder(constrain(latents, *_AXES)) * 2 - 1

    def indices_to_latents(self, indices: Array) -> Array:  # (b h' w') -> (b h' w' d)
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


def _released(size: int, note: str) -> Variant:
    return Variant(
        config={"bottleneck": {"name": "vq", "codebook_size": 1024, "code_dim": 256}},
        paper="https://arxiv.org/abs/2202.04200",
        source=f"https://storage.googleapis.com/maskgit-public/checkpoints/tokenizer_imagenet{size}_checkpoint",
        license="Apache-2.0",
        note=note,
    )


VARIANTS = {
    "maskgit-vqgan-imagenet256-f16-1024": _released(
        256, "ImageNet; rFID 2.28; PyTorch weights: fun-research/TiTok maskgit-vqgan-imagenet-f16-256.bin"
    ),
    "maskgit-vqgan-imagenet512-f16-1024": _released(512, "ImageNet at 512 x 512; rFID 1.97"),
}
