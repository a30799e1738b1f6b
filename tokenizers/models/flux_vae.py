"""The image autoencoders of FLUX.1, FLUX.2 and Stable Diffusion 3: latent diffusion's, with 16 or 32 channels.

Esser et al., "Scaling rectified flow transformers for high-resolution image synthesis",
https://arxiv.org/abs/2403.03206, section 5.2.1 (why more channels); code: diffusers `AutoencoderKL` and
`AutoencoderKLFlux2`. The network is that of VQGAN (`nn.compvis`). What sets them apart from one another is how a
diffusion model sees their latents: shifted and scaled, or (FLUX.2) in patches of 2 x 2 that a batch norm without
parameters has brought to unit variance.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..nn.compvis import Decoder, Encoder
from ..nn.conv import Conv2d
from ..nn.resample import depth_to_space, space_to_depth
from ..nn.tiling import decode_in_tiles, encode_in_tiles
from ..parallel.constrain import constrain
from ..quantize.gaussian import DiagonalGaussian
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "flux_vae"

_AXES = ("batch", "height", "width", "channel")


class Model(nn.Module):
    """Encoder, mean and log-variance, decoder; with 1x1 convolutions around the latents in some.

    Latents are those of the autoencoder, as its authors' ``encode`` returns them; `scale_latents` gives what the
    diffusion models read.

    Attributes:
      bottleneck: the posterior.
      latent_channels: 16, or 32 for FLUX.2.
      pixel_channels: of the image.
      widths, stem, blocks, attention, middle_attention, num_groups, dropout, remat: see `nn.compvis`.
      decoder_widths: where the decoder is narrower (FLUX.2's small one); ``None`` is ``widths``.
      use_quant_conv, use_post_quant_conv: whether there are 1x1 convolutions on either side of the latents.
      scaling_factor, shift_factor: of `scale_latents`, one number or one per channel.
      patch_norm: height and width of the patches that `scale_latents` normalizes; ``None`` scales by the two numbers.
      patch_norm_epsilon: added to their running variance.
      tile_size: side of the tiles of `encode_tiled` and `decode_tiled`, in pixels.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = DiagonalGaussian()
    latent_channels: int = 16
    pixel_channels: int = 3
    widths: tuple[int, ...] = (128, 256, 512, 512)
    decoder_widths: tuple[int, ...] | None = None
    stem: int | None = None
    blocks: int = 2
    attention: tuple[int, ...] = ()
    middle_attention: bool = True
    num_groups: int = 32
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    scaling_factor: float | tuple[float, ...] = 0.3611
    shift_factor: float | tuple[float, ...] = 0.1159
    patch_norm: tuple[int, int] | None = None
    patch_norm_epsilon: float = 1e-4
    tile_size: int = 1024
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        names = ("blocks", "attention", "middle_attention", "num_groups", "dropout", "remat", "dtype")
        shared = {name: getattr(self, name) for name in names}
        moments = self.bottleneck.input_channels(self.latent_channels)
        self.encoder = Encoder(moments, widths=self.widths, stem=self.stem, **shared)
        self.decoder = Decoder(self.pixel_channels, widths=self.decoder_widths or self.widths, **shared)
        if self.use_quant_conv:
            self.quant_conv = Conv2d(moments, 1, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv2d(self.latent_channels, 1, dtype=self.dtype)
        if self.patch_norm is not None:
            shape = (self.latent_channels * self.patch_norm[0] * self.patch_norm[1],)
            self.patch_mean = self.variable("batch_stats", "patch_mean", jnp.zeros, shape, jnp.float32)
            self.patch_var = self.variable("batch_stats", "patch_var", jnp.ones, shape, jnp.float32)

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

    def scale_latents(self, latents: Array) -> Array:  # (b h' w' d) -> same, or (b h'/p w'/p d*p*p)
        """What the diffusion model reads; patches have the channels in the order (channel, row, column)."""
        if self.patch_norm is None:
            return (latents - np.asarray(self.shift_factor, np.float32)) * np.asarray(self.scaling_factor, np.float32)
        patches = space_to_depth(latents, self.patch_norm, order="channel_outer")
        return (patches - self.patch_mean.value) * jax.lax.rsqrt(self.patch_var.value + self.patch_norm_epsilon)

    def unscale_latents(self, latents: Array) -> Array:
        """The inverse of `scale_latents`."""
        if self.patch_norm is None:
            return latents / np.asarray(self.scaling_factor, np.float32) + np.asarray(self.shift_factor, np.float32)
        patches = latents * jnp.sqrt(self.patch_var.value + self.patch_norm_epsilon) + self.patch_mean.value
        return depth_to_space(patches, self.patch_norm, order="channel_outer")

    def encode_tiled(self, pixels: Array) -> Encoding:  # (b h w c) -> (b h' w' d)
        """`encode` of large images in the memory of a tile; see `nn.tiling`."""
        side = self.spec.compression[1]
        return self.bottleneck(encode_in_tiles(self.moments, pixels, tile=self.tile_size, side=side))

    def decode_tiled(self, latents: Array) -> Array:  # (b h' w' d) -> (b h w c)
        """`decode` of large images in the memory of a tile."""
        return decode_in_tiles(self.decode, latents, tile=self.tile_size, side=self.spec.compression[1])


VARIANTS = {
    "flux1-vae": Variant(
        config={"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        paper="https://arxiv.org/abs/2403.03206 (architecture)",
        source="https://huggingface.co/black-forest-labs/FLUX.1-schnell",
        license="Apache-2.0 with FLUX.1 [schnell]",
        note="also the autoencoder of FLUX.1 [dev]",
    ),
    "flux2-vae": Variant(
        config={
            "latent_channels": 32,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "patch_norm": (2, 2),
        },
        paper="https://bfl.ai/research/representation-comparison",
        source="https://huggingface.co/black-forest-labs/FLUX.2-dev",
        license="see the source",
        note="diffusion models read 2 x 2 patches of 128 channels with the variance of each set to one",
    ),
    "sd3-vae": Variant(
        config={"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        paper="https://arxiv.org/abs/2403.03206",
        source="https://huggingface.co/stabilityai/stable-diffusion-3-medium",
        license="Stability AI Community License",
        note="also the autoencoder of Stable Diffusion 3.5",
    ),
}
