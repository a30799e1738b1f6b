"""VQ-VAE (https://arxiv.org/abs/1711.00937) and VQ-VAE-2 with its two levels (https://arxiv.org/abs/1906.00446).

One level: two strided convolutions, a residual stack, a codebook, and the mirror of that. Two levels: a top encoder
halves the grid once more; what its codes explain is given to the bottom level, and the decoder reads both.

Facts that weights depend on: Sonnet's published example (one level) has pixels in [-0.5, 0.5] and a ReLU in front of
the encoder's residual stack, whose skip then carries activated values. DeepMind published no VQ-VAE-2; the widely used
port (rosinality's) has pixels in [-1, 1] and no such ReLU.

Tokens of two levels: the coarse map ``(H/8, W/8)`` in raster order, then the fine map ``(H/4, W/4)`` in raster order,
laid out in rows of W/8. So `Encoding.indices` is ``(B, 5 * H/8, W/8)`` and latents have the same rows; a row-major
reading is the sequence from coarse to fine that a prior models, and the shape still tells height and width.
`split_levels` and `join_levels` go to the two maps and back. Both levels have K codes of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..errors import pick
from ..nn.conv import Conv2d
from ..parallel.constrain import constrain
from ..quantize.vq import VectorQuantizer
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "vqvae"

_AXES = ("batch", "height", "width", "channel")


class ResBlock(nn.Module):
    """``x + conv1x1(relu(conv3x3(relu(x))))``."""

    features: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w c) -> (b h w c)
        h = Conv2d(self.hidden, 3, dtype=self.dtype, name="conv1")(nn.relu(x))
        h = Conv2d(self.features, 1, dtype=self.dtype, name="conv2")(nn.relu(h))
        return constrain(x + h, *_AXES)


class Encoder(nn.Module):
    """Strided 4x4 convolutions down to ``channels``, a 3x3 one, residual blocks, ReLU."""

    widths: tuple[int, ...]  # of the strided convolutions
    channels: int
    blocks: int
    block_channels: int
    relu_before_blocks: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w c) -> (b h/2^n w/2^n channels)
        for i, width in enumerate(self.widths):
            down = Conv2d(width, 4, strides=2, padding=1, dtype=self.dtype, name=f"down{i}")
            x = nn.relu(down(x))
        x = Conv2d(self.channels, 3, dtype=self.dtype, name="conv_in")(x)
        x = nn.relu(x) if self.relu_before_blocks else x
        for i in range(self.blocks):
            x = ResBlock(self.channels, self.block_channels, self.dtype, name=f"block{i}")(x)
        return nn.relu(x)


class Decoder(nn.Module):
    """A 3x3 convolution, residual blocks, ReLU, and transposed 4x4 convolutions with ReLUs between them."""

    widths: tuple[int, ...]  # of the transposed convolutions
    channels: int
    blocks: int
    block_channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w c) -> (b h*2^n w*2^n widths[-1])
        x = Conv2d(self.channels, 3, dtype=self.dtype, name="conv_in")(x)
        for i in range(self.blocks):
            x = ResBlock(self.channels, self.block_channels, self.dtype, name=f"block{i}")(x)
        for i, width in enumerate(self.widths):
            x = _upsample(width, self.dtype, f"up{i}")(nn.relu(x))
        return x


def _upsample(features: int, dtype: Any, name: str | None = None) -> nn.Module:
    return nn.ConvTranspose(features, (4, 4), (2, 2), padding="SAME", dtype=dtype, name=name)


class OneLevel(nn.Module):
    """VQ-VAE: an encoder, a codebook, a decoder. Fields as in `Model`."""

    bottleneck: nn.Module
    latent_channels: int
    channels: int
    blocks: int
    block_channels: int
    relu_before_blocks: bool
    dtype: Any

    def setup(self):
        stack = (self.channels, self.blocks, self.block_channels)
        widths = (self.channels // 2, self.channels)
        self.encoder = Encoder(widths, *stack, self.relu_before_blocks, self.dtype)
        self.to_codes = Conv2d(self.bottleneck.input_channels(self.latent_channels), 1, dtype=self.dtype)
        self.decoder = Decoder((self.channels // 2, 3), *stack, self.dtype)

    def encode(self, x: Array, train: bool) -> Encoding:  # (b h w 3) -> latents (b h/4 w/4 d)
        return self.bottleneck(self.to_codes(self.encoder(x)).astype(jnp.float32), train)

    def decode(self, latents: Array) -> Array:  # (b h/4 w/4 d) -> (b h w 3)
        return self.decoder(latents)

    def indices_to_latents(self, indices: Array) -> Array:
        return self.bottleneck.indices_to_codes(indices)


class TwoLevels(nn.Module):
    """VQ-VAE-2: the bottom level sees what the top codes say, the decoder reads both. Fields as in `Model`."""

    bottleneck: nn.Module
    latent_channels: int
    channels: int
    blocks: int
    block_channels: int
    relu_before_blocks: bool
    dtype: Any

    def setup(self):
        stack = (self.channels, self.blocks, self.block_channels)
        half, dtype = self.channels // 2, self.dtype
        # Unbound copies: the module of the field itself would have variables of its own.
        self.quantize_top, self.quantize_bottom = (self.bottleneck.clone(parent=None) for _ in range(2))
        code_channels = self.quantize_top.input_channels(self.latent_channels)
        self.encoder_bottom = Encoder((half, self.channels), *stack, self.relu_before_blocks, dtype)
        self.encoder_top = Encoder((half,), *stack, self.relu_before_blocks, dtype)
        self.to_codes_top = Conv2d(code_channels, 1, dtype=dtype)
        self.decoder_top = Decoder((self.latent_channels,), *stack, dtype)
        self.to_codes_bottom = Conv2d(code_channels, 1, dtype=dtype)
        self.upsample_top = _upsample(self.latent_channels, dtype)
        self.decoder = Decoder((half, 3), *stack, dtype)

    def encode(self, x: Array, train: bool) -> Encoding:  # (b h w 3) -> latents (b 5*h/8 w/8 d)
        features = self.encoder_bottom(x)
        z_top = self.to_codes_top(self.encoder_top(features))
        top = self.quantize_top(z_top.astype(jnp.float32), train)
        explained = self.decoder_top(top.latents.astype(self.dtype))
        z_bottom = self.to_codes_bottom(jnp.concatenate([explained, features], axis=-1))
        bottom = self.quantize_bottom(z_bottom.astype(jnp.float32), train)
        return Encoding(
            latents=join_levels(top.latents, bottom.latents),
            indices=join_levels(top.indices, bottom.indices),
            losses={name: top.losses[name] + bottom.losses[name] for name in top.losses},
        )

    def decode(self, latents: Array) -> Array:  # (b 5*h/8 w/8 d) -> (b h w 3)
        top, bottom = split_levels(latents)
        return self.decoder(jnp.concatenate([self.upsample_top(top), bottom], axis=-1))

    def indices_to_latents(self, indices: Array) -> Array:
        top, bottom = split_levels(indices)
        return join_levels(self.quantize_top.indices_to_codes(top), self.quantize_bottom.indices_to_codes(bottom))


def join_levels(top: Array, bottom: Array) -> Array:
    """Maps ``(B, h, w, ...)`` and ``(B, 2h, 2w, ...)`` -> ``(B, 5h, w, ...)``: coarse to fine, each in raster order."""
    b, h, w, *rest = top.shape
    return jnp.concatenate([top, bottom.reshape(b, 4 * h, w, *rest)], axis=1)


def split_levels(joined: Array) -> tuple[Array, Array]:
    """The inverse of `join_levels`: ``(B, 5h, w, ...)`` -> ``(B, h, w, ...)`` and ``(B, 2h, 2w, ...)``."""
    b, rows, w, *rest = joined.shape
    if rows % 5:
        raise ValueError(
            f"two levels have 5 rows of tokens for 8 rows of pixels; got an array of shape {joined.shape}."
        )
    h = rows // 5
    return joined[:, :h], joined[:, h:].reshape(b, 2 * h, 2 * w, *rest)


LEVELS = {1: OneLevel, 2: TwoLevels}


class Model(nn.Module):
    """VQ-VAE with one level, or VQ-VAE-2 with two.

    Attributes:
      bottleneck: a module of ``tokenizers/quantize``; two levels have one each, with these fields.
      latent_channels: channels of the codes.
      channels: width of encoder and decoder.
      blocks, block_channels: of the residual stacks.
      levels: 1 or 2.
      relu_before_blocks: a ReLU between the last convolution and the residual stack of an encoder (Sonnet).
      pixel_scale: pixels in [-1, 1] are multiplied with this on the way in and divided by it on the way out.
      dtype: compute dtype; parameters, bottleneck and pixels are float32.
    """

    bottleneck: nn.Module = VectorQuantizer(512, 64, learning="ema", initial_cluster_size=0.0, debias=True)
    latent_channels: int = 64
    channels: int = 128
    blocks: int = 2
    block_channels: int = 32
    levels: int = 1
    relu_before_blocks: bool = True
    pixel_scale: float = 0.5
    dtype: Any = jnp.float32

    def setup(self):
        network = pick("number of levels", self.levels, LEVELS)
        self.network = network(
            self.bottleneck.clone(parent=None),
            self.latent_channels,
            self.channels,
            self.blocks,
            self.block_channels,
            self.relu_before_blocks,
            self.dtype,
        )

    @property
    def spec(self) -> Spec:
        side = 4 * self.levels
        return Spec(
            compression=(1, side, side),
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            codebooks=getattr(self.bottleneck, "codebooks", 1),
            causal=True,
            video=False,
            last_layer="network/decoder/up1/kernel",
        )

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b h w 3) in [-1, 1]
        return self.network.encode(constrain(pixels * self.pixel_scale, *_AXES).astype(self.dtype), train)

    def decode(self, latents: Array, train: bool = False) -> Array:  # -> (b h w 3)
        return self.network.decode(latents.astype(self.dtype)).astype(jnp.float32) / self.pixel_scale

    def indices_to_latents(self, indices: Array) -> Array:
        return self.network.indices_to_latents(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


def _variant(levels: int, codebook: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    bottleneck = {"name": "vq", "codebook_size": 512, "code_dim": 64, "learning": "ema", "initial_cluster_size": 0.0}
    return {"bottleneck": bottleneck | codebook, "latent_channels": 64, "levels": levels, **fields}


VARIANTS = {
    "vqvae-f4-512": Variant(
        config=_variant(1, {"debias": True}, channels=128, blocks=2, block_channels=32),
        paper="https://arxiv.org/abs/1711.00937",
        source="https://github.com/google-deepmind/sonnet (examples/vqvae_example.ipynb)",
        license="Apache-2.0",
        note="Sonnet's example for CIFAR-10; no weights are published",
    ),
    "vqvae2-f4-f8-512": Variant(
        config=_variant(2, {}, channels=128, blocks=2, block_channels=32, relu_before_blocks=False, pixel_scale=1.0),
        paper="https://arxiv.org/abs/1906.00446",
        source="https://github.com/rosinality/vq-vae-2-pytorch",
        license="MIT",
        note="two levels, for 256x256 pixels; not DeepMind's code, which is not published",
    ),
}
