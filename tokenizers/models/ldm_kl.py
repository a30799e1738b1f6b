"""The KL autoencoder of latent diffusion, and of Stable Diffusion and SDXL: VQGAN's network with a Gaussian posterior.

Rombach et al., "High-resolution image synthesis with latent diffusion models", https://arxiv.org/abs/2112.10752,
sections 3.1 and G; released code CompVis/latent-diffusion `models/autoencoder.py`, and diffusers `AutoencoderKL`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ..nn.compvis import Decoder, Encoder
from ..nn.conv import Conv2d
from ..nn.tiling import decode_in_tiles, encode_in_tiles
from ..parallel.constrain import constrain
from ..quantize.gaussian import DiagonalGaussian
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "ldm_kl"

_AXES = ("batch", "height", "width", "channel")


class Model(nn.Module):
    """Encoder, 1x1 convolution, mean and log-variance, 1x1 convolution, decoder.

    Latents are those of the autoencoder. Diffusion models see them shifted and scaled: `scale_latents`.

    Attributes:
      bottleneck: the posterior.
      latent_channels: channels of the latents (``embed_dim``).
      z_channels: channels between encoder or decoder and the 1x1 convolutions; ``None`` is ``latent_channels``.
      pixel_channels: of the image.
      widths, stem, blocks, attention, middle_attention, resample_conv, num_groups, dropout, remat: see `nn.compvis`.
      use_quant_conv, use_post_quant_conv: whether there are 1x1 convolutions on either side of the latents.
      scaling_factor, shift_factor: of `scale_latents`, one number or one per channel.
      tile_size: side of the tiles of `encode_tiled` and `decode_tiled`, in pixels.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = DiagonalGaussian()
    latent_channels: int = 4
    z_channels: int | None = None
    pixel_channels: int = 3
    widths: tuple[int, ...] = (128, 256, 512, 512)
    stem: int | None = None
    blocks: int = 2
    attention: tuple[int, ...] = ()
    middle_attention: bool = True
    resample_conv: bool = True
    num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float | tuple[float, ...] = 1.0
    shift_factor: float | tuple[float, ...] = 0.0
    tile_size: int = 256
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
        self.decoder = Decoder(self.pixel_channels, **shared)
        if self.use_quant_conv:
            self.quant_conv = Conv2d(moments(self.latent_channels), 1, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv2d(inner, 1, dtype=self.dtype)

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
        x = self.encoder(pixels, train)
        return (self.quant_conv(x) if self.use_quant_conv else x).astype(jnp.float32)

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b h' w' d) -> (b h w c)
        x = constrain(latents, *_AXES).astype(self.dtype)
        return self.decoder(self.post_quant_conv(x) if self.use_post_quant_conv else x, train)

    def indices_to_latents(self, indices: Array) -> Array:
        raise ValueError("a KL autoencoder is continuous: it has no indices.")

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding

    def scale_latents(self, latents: Array) -> Array:  # (b h' w' d) -> same
        """What a diffusion model trained on these latents reads: ``(latents - shift) * scale``."""
        return (latents - np.asarray(self.shift_factor, np.float32)) * np.asarray(self.scaling_factor, np.float32)

    def unscale_latents(self, latents: Array) -> Array:  # (b h' w' d) -> same
        """The inverse of `scale_latents`."""
        return latents / np.asarray(self.scaling_factor, np.float32) + np.asarray(self.shift_factor, np.float32)

    def encode_tiled(self, pixels: Array) -> Encoding:  # (b h w c) -> (b h' w' d)
        """`encode` of large images in the memory of a tile; see `nn.tiling`."""
        side = self.spec.compression[1]
        return self.bottleneck(encode_in_tiles(self.moments, pixels, tile=self.tile_size, side=side))

    def decode_tiled(self, latents: Array) -> Array:  # (b h' w' d) -> (b h w c)
        """`decode` of large images in the memory of a tile."""
        return decode_in_tiles(self.decode, latents, tile=self.tile_size, side=self.spec.compression[1])


_LDM = "https://github.com/CompVis/latent-diffusion"


def _kl(channels: int, widths: tuple[int, ...], attention: tuple[int, ...], note: str) -> Variant:
    return Variant(
        config={"latent_channels": channels, "widths": widths, "attention": attention},
        paper="https://arxiv.org/abs/2112.10752",
        source=_LDM,
        license="MIT",
        note=note,
    )


def _diffusers(source: str, license: str, tile_size: int, scaling_factor: float, note: str, paper: str) -> Variant:
    return Variant(
        config={"latent_channels": 4, "tile_size": tile_size, "scaling_factor": scaling_factor},
        paper=paper,
        source=source,
        license=license,
        note=note,
    )


VARIANTS = {
    "kl-f4": _kl(3, (128, 256, 512), (), "OpenImages; rFID 0.27, PSNR 27.53"),
    "kl-f8": _kl(4, (128, 256, 512, 512), (), "OpenImages; rFID 0.90, PSNR 24.19"),
    "kl-f16": _kl(16, (128, 128, 256, 256, 512), (4,), "OpenImages; rFID 0.87, PSNR 24.08"),
    "kl-f32": _kl(64, (128, 128, 256, 256, 512, 512), (4, 5), "OpenImages; rFID 2.04, PSNR 22.27"),
    "sd-vae-ft-ema": _diffusers(
        "https://huggingface.co/stabilityai/sd-vae-ft-ema",
        "MIT",
        256,
        0.18215,
        "kl-f8 of Stable Diffusion 1 and 2, its decoder trained further with L1 and LPIPS",
        "https://arxiv.org/abs/2112.10752",
    ),
    "sd-vae-ft-mse": _diffusers(
        "https://huggingface.co/stabilityai/sd-vae-ft-mse",
        "MIT",
        256,
        0.18215,
        "kl-f8 of Stable Diffusion 1 and 2, its decoder trained further with MSE and a little LPIPS",
        "https://arxiv.org/abs/2112.10752",
    ),
    "sdxl-vae": _diffusers(
        "https://huggingface.co/stabilityai/sdxl-vae",
        "MIT",
        1024,
        0.13025,
        "the architecture of kl-f8, trained anew; its activations overflow float16",
        "https://arxiv.org/abs/2307.01952",
    ),
}
