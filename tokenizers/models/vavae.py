"""VA-VAE: a KL autoencoder of factor 16 with many channels, whose latents are aligned with a vision foundation model.

Yao et al., "Reconstruction vs. generation: taming optimization dilemma in latent diffusion models",
https://arxiv.org/abs/2501.01423; code hustvl/LightningDiT (`tokenizer/autoencoder.py`, training in `vavae/`). The
network is latent diffusion's (`nn.compvis`) with attention at the deepest level. What is new is in training: latents
resemble the features of a frozen DINOv2 or MAE (`losses.alignment`), which diffusion models of them profit from.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ..nn.compvis import Decoder, Encoder
from ..nn.conv import Conv2d
from ..parallel.constrain import constrain
from ..quantize.gaussian import DiagonalGaussian
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "vavae"

_AXES = ("batch", "height", "width", "channel")


class Model(nn.Module):
    """Encoder, 1x1 convolution, mean and log-variance, 1x1 convolution, decoder.

    Diffusion models see samples of the posterior, each channel shifted and scaled by statistics over a data set:
    `scale_latents`. Those statistics are no part of the weight files.

    Attributes:
      bottleneck: the posterior.
      latent_channels: channels of the latents (``embed_dim``).
      z_channels: channels between encoder or decoder and the 1x1 convolutions; ``None`` is ``latent_channels``.
      pixel_channels: of the image.
      widths, stem, blocks, attention, middle_attention, resample_conv, num_groups, dropout, remat: see `nn.compvis`.
      latent_mean, latent_std: of `scale_latents`, one number or one per channel.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = DiagonalGaussian()
    latent_channels: int = 32
    z_channels: int | None = None
    pixel_channels: int = 3
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    stem: int | None = None
    blocks: int = 2
    attention: tuple[int, ...] = (4,)
    middle_attention: bool = True
    resample_conv: bool = True
    num_groups: int = 32
    latent_mean: float | tuple[float, ...] = 0.0
    latent_std: float | tuple[float, ...] = 1.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        names = (
            "widths", "blocks", "attention", "middle_attention", "resample_conv", "num_groups", "dropout", "remat",
            "dtype",
        )  # fmt: skip
        shared = {name: getattr(self, name) for name in names}
        inner, moments = self.z_channels or self.latent_channels, self.bottleneck.input_channels
        self.encoder = Encoder(moments(inner), stem=self.stem, **shared)
        self.quant_conv = Conv2d(moments(self.latent_channels), 1, dtype=self.dtype)
        self.post_quant_conv = Conv2d(inner, 1, dtype=self.dtype)
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
        return self.bottleneck(self.moments(constrain(pixels, *_AXES), train), train)

    def moments(self, pixels: Array, train: bool = False) -> Array:  # (b h w c) -> (b h' w' 2d)
        """Mean and log-variance, not clamped, float32."""
        return self.quant_conv(self.encoder(pixels, train)).astype(jnp.float32)

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b h' w' d) -> (b h w c)
        return self.decoder(self.post_quant_conv(constrain(latents, *_AXES).astype(self.dtype)), train)

    def indices_to_latents(self, indices: Array) -> Array:
        raise ValueError("a KL autoencoder is continuous: it has no indices.")

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding

    def scale_latents(self, latents: Array) -> Array:  # (b h' w' d) -> same
        """What a diffusion model trained on these latents reads: ``(latents - mean) / std``."""
        return (latents - np.asarray(self.latent_mean, np.float32)) / np.asarray(self.latent_std, np.float32)

    def unscale_latents(self, latents: Array) -> Array:  # (b h' w' d) -> same
        """The inverse of `scale_latents`."""
        return latents * np.asarray(self.latent_std, np.float32) + np.asarray(self.latent_mean, np.float32)


def _variant(channels: int, note: str) -> Variant:
    return Variant(
        config={"latent_channels": channels},
        paper="https://arxiv.org/abs/2501.01423",
        source="https://github.com/hustvl/LightningDiT",
        license="MIT",
        note=note,
    )


# Table 2 of the paper, ImageNet validation at 256x256: reconstruction; and FID of LightningDiT-XL after 80 epochs.
VARIANTS = {
    "vavae-f16d16-ldm": _variant(16, "no alignment, 50 epochs; rFID 0.49, PSNR 26.10; generation 8.28"),
    "vavae-f16d16-mae": _variant(16, "aligned with MAE, 50 epochs; rFID 0.51, PSNR 26.01; generation 9.19"),
    "vavae-f16d16-dinov2": _variant(16, "aligned with DINOv2, 50 epochs; rFID 0.55, PSNR 25.29; generation 8.71"),
    "vavae-f16d32-ldm": _variant(32, "no alignment, 50 epochs; rFID 0.26, PSNR 28.59; generation 10.92"),
    "vavae-f16d32-mae": _variant(32, "aligned with MAE, 50 epochs; rFID 0.28, PSNR 28.33; generation 9.92"),
    "vavae-f16d32-dinov2": _variant(
        32, "aligned with DINOv2; 50 epochs: rFID 0.28, PSNR 27.96, generation 8.22; released after 130: rFID 0.28"
    ),
    "vavae-f16d64-ldm": _variant(64, "no alignment, 50 epochs; rFID 0.17, PSNR 31.03; generation 17.24"),
    "vavae-f16d64-mae": _variant(64, "aligned with MAE, 50 epochs; rFID 0.15, PSNR 31.03; generation 11.69"),
    "vavae-f16d64-dinov2": _variant(64, "aligned with DINOv2, 50 epochs; rFID 0.14, PSNR 30.71; generation 11.98"),
}
