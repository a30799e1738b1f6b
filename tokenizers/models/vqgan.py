"""VQGAN: a convolutional autoencoder with a learned codebook, trained with a perceptual and a patch-based GAN loss.

Esser, Rombach, Ommer, "Taming transformers for high-resolution image synthesis", https://arxiv.org/abs/2012.09841,
section 3.1 and table 7; released code CompVis/taming-transformers `models/vqgan.py`. The VQ first stages of latent
diffusion (https://arxiv.org/abs/2112.10752, table 8) are the same model with narrower codes, and GumbelVQ replaces the
nearest code by a Gumbel-softmax choice.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..nn.compvis import Decoder, Encoder
from ..nn.conv import Conv2d
from ..parallel.constrain import constrain
from ..quantize.vq import VectorQuantizer
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "vqgan"

_AXES = ("batch", "height", "width", "channel")


class Model(nn.Module):
    """Encoder, 1x1 convolution, codebook, 1x1 convolution, decoder.

    The bottleneck's loss terms are unweighted. The released VQGANs weight ``commitment`` by 1 and ``codebook`` by 0.25:
    their code has the paper's two weights swapped (`quantize.vq`). GumbelVQ weights ``kl``.

    Attributes:
      bottleneck: `VectorQuantizer`, or `GumbelSoftmax(K, code_dim=D, project=True)`.
      latent_channels: channels of the codes (``embed_dim``).
      z_channels: channels between encoder or decoder and the 1x1 convolutions.
      pixel_channels: 3; depth maps have 1.
      widths, stem, blocks, attention, middle_attention, resample_conv, dropout, remat: see `nn.compvis`.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = VectorQuantizer(1024, 256)
    latent_channels: int = 256
    z_channels: int = 256
    pixel_channels: int = 3
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    stem: int = 128
    blocks: int = 2
    attention: tuple[int, ...] = (4,)
    middle_attention: bool = True
    resample_conv: bool = True
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        names = ("widths", "blocks", "attention", "middle_attention", "resample_conv", "dropout", "remat", "dtype")
        shared = {name: getattr(self, name) for name in names}
        self.encoder = Encoder(self.z_channels, stem=self.stem, **shared)
        self.quant_conv = Conv2d(self.bottleneck.input_channels(self.latent_channels), 1, dtype=self.dtype)
        self.post_quant_conv = Conv2d(self.z_channels, 1, dtype=self.dtype)
        self.decoder = Decoder(self.pixel_channels, **shared)

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
        return self.bottleneck(self.prequantized(pixels, train), train)

    def prequantized(self, pixels: Array, train: bool = False) -> Array:  # (b h w c) -> (b h' w' d)
        """What the bottleneck reads, float32."""
        x = constrain(pixels, *_AXES)
        return self.quant_conv(self.encoder(x, train)).astype(jnp.float32)

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b h' w' d) -> (b h w c)
        return self.decoder(self.post_quant_conv(constrain(latents, *_AXES).astype(self.dtype)), train)

    def indices_to_latents(self, indices: Array) -> Array:  # (b h' w') -> (b h' w' d)
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


_TAMING = "https://github.com/CompVis/taming-transformers"
_LDM = "https://github.com/CompVis/latent-diffusion"


def _vq(codes: int, dim: int) -> dict[str, Any]:
    return {"bottleneck": {"name": "vq", "codebook_size": codes, "code_dim": dim}, "latent_channels": dim}


def _taming(codes: int, note: str) -> Variant:
    return Variant(
        config=_vq(codes, 256),
        paper="https://arxiv.org/abs/2012.09841",
        source=_TAMING,
        license="MIT",
        note=note,
    )


def _ldm(codes: int, dim: int, widths: tuple[int, ...], attention: tuple[int, ...], note: str, **fields) -> Variant:
    return Variant(
        config=_vq(codes, dim) | {"z_channels": dim, "widths": widths, "attention": attention, **fields},
        paper="https://arxiv.org/abs/2112.10752",
        source=_LDM,
        license="MIT",
        note=note,
    )


VARIANTS = {
    "vqgan-imagenet-f16-1024": _taming(1024, "ImageNet; rFID 10.54 train, 7.94 val"),
    "vqgan-imagenet-f16-16384": _taming(16384, "ImageNet; rFID 7.41 train, 4.98 val"),
    "vqgan-faceshq-f16-1024": _taming(1024, "CelebA-HQ and FFHQ"),
    "vqgan-sflckr-f16-1024": _taming(1024, "landscapes from Flickr"),
    "vqgan-gumbel-f8-8192": Variant(
        config={
            "bottleneck": {"name": "gumbel", "codebook_size": 8192, "code_dim": 256, "project": True, "hard": True},
            "widths": (128, 128, 256, 512),
            "attention": (3,),
        },
        paper="https://arxiv.org/abs/2012.09841",
        source=_TAMING,
        license="MIT",
        note="OpenImages; rFID 3.24 train, 1.49 val; here encoding is deterministic, the released code samples",
    ),
    "ldm-vq-f4-8192": _ldm(8192, 3, (128, 256, 512), (), "OpenImages; rFID 0.58, PSNR 27.43"),
    "ldm-vq-f4-noattn-8192": _ldm(
        8192, 3, (128, 256, 512), (), "OpenImages; rFID 1.06, PSNR 25.21", middle_attention=False
    ),
    "ldm-vq-f8-16384": _ldm(16384, 4, (128, 256, 256, 512), (3,), "OpenImages; rFID 1.14, PSNR 23.07"),
    "ldm-vq-f8-256": _ldm(256, 4, (128, 256, 256, 512), (3,), "OpenImages; rFID 1.49, PSNR 22.35"),
    "ldm-vq-f16-16384": _ldm(16384, 8, (128, 128, 256, 256, 512), (4,), "OpenImages; rFID 5.15, PSNR 20.83"),
}
