"""TiTok (https://arxiv.org/abs/2406.07550), TA-TiTok (https://arxiv.org/abs/2501.07730): images as 32 to 256 tokens.

Latent tokens travel through a ViT with the patches of the image and come out as the code; another ViT sees them beside
mask tokens, one per patch, and fills those in. TA-TiTok's decoder reads the features of a caption as well.

The first releases (L-32, B-64, S-128) decode in two stages: the ViT gives logits over the 1024 tokens of MaskGIT's
VQGAN, and the VQGAN's decoder, reading the mixture of its codes that they mean, gives pixels. The later ones give
patches. The first releases also read the encoder's output array as if its axes were swapped, which mixes tokens and
which their weights depend on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import pick
from ..nn.attention import Attention
from ..nn.blocks import MLP, TransformerBlock
from ..nn.conv import Conv2d
from ..nn.norm import LayerNorm
from ..nn.resample import depth_to_space
from ..nn.scan import scan_layers
from ..parallel.constrain import constrain
from ..quantize.vq import VectorQuantizer
from ..types import Array, Encoding, Spec, Variant
from . import maskgit_vqgan

SYSTEM = "titok"

# MaskGIT's VQGAN, whose tokens are the proxies: codes, channels of a code, widths and blocks of its decoder's levels.
PROXY = (1024, 256, (128, 128, 256, 256, 512), 2)

# width, layers, heads
SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}

_DENSE = nn.initializers.truncated_normal(0.02)


class Transformer(nn.Module):
    """Layer norm, blocks; the caller takes the tokens it wants, and normalizes them. ``size`` as in `SIZES`."""

    size: tuple[int, int, int]
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b n c) -> (b n c)
        width, depth, heads = self.size
        layer = TransformerBlock(
            attention=functools.partial(Attention, heads, fused_qkv=True, dtype=self.dtype),
            mlp=functools.partial(MLP, 4 * width, dtype=self.dtype),
            norm=functools.partial(LayerNorm, epsilon=1e-5, dtype=self.dtype),
            name="layers",
        )
        x = _norm(self.dtype, "norm_in")(x)
        return scan_layers(layer, depth, x, remat="full" if self.remat else "none")


def _norm(dtype: Any, name: str) -> LayerNorm:
    return LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


def _table(module: nn.Module, name: str, rows: int, width: int) -> Array:
    return module.param(name, nn.initializers.normal(width**-0.5), (rows, width), jnp.float32)


def _repeated(x: Array, batch: int) -> Array:
    return jnp.broadcast_to(x, (batch, *x.shape[-2:]))


class Encoder(nn.Module):
    """Class token, patches, latent tokens; the latter come out. Fields as in `Model`."""

    out_channels: int
    tokens: int
    patch: int
    size: tuple[int, int, int]
    swapped: bool
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, pixels: Array) -> Array:  # (b h w 3) in [0, 1] -> (b n d)
        width, batch = self.size[0], pixels.shape[0]
        patches = Conv2d(width, self.patch, strides=self.patch, padding="VALID", dtype=self.dtype, name="patches")
        x = patches(pixels.astype(self.dtype)).reshape(batch, -1, width)
        positions = _table(self, "positions", 1 + x.shape[1], width)
        x = jnp.concatenate([_repeated(_table(self, "class_token", 1, width), batch), x], axis=1) + positions
        latents = _table(self, "latent_tokens", self.tokens, width)
        latents = latents + _table(self, "latent_positions", self.tokens, width)
        x = jnp.concatenate([x, _repeated(latents, batch)], axis=1).astype(self.dtype)
        x = Transformer(self.size, self.dtype, self.remat, name="transformer")(x)[:, -self.tokens :]
        x = _norm(self.dtype, "norm_out")(x)
        if self.swapped:  # the (n c) numbers of an image, read row by row as (c n)
            x = x.reshape(batch, width, self.tokens).swapaxes(1, 2)
        return nn.Dense(self.out_channels, kernel_init=_DENSE, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Class token, mask tokens, latent tokens, text; the masks come out, as a grid. Fields as in `Model`."""

    grid: tuple[int, int]
    tokens: int
    size: tuple[int, int, int]
    text: tuple[int, int] | None
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, latents: Array, text: Array | None) -> Array:  # (b n d), (b l e) -> (b h/p w/p c)
        width, batch = self.size[0], latents.shape[0]
        count = self.grid[0] * self.grid[1]
        masks = jnp.broadcast_to(_table(self, "mask_token", 1, width), (count, width))
        masks = jnp.concatenate([_table(self, "class_token", 1, width), masks])
        masks = masks + _table(self, "positions", 1 + count, width)
        x = nn.Dense(width, kernel_init=_DENSE, dtype=self.dtype, name="embed")(latents.astype(self.dtype))
        x = x + _table(self, "latent_positions", self.tokens, width)
        parts = [_repeated(masks, batch), x]
        if self.text is not None:
            caption = nn.Dense(width, kernel_init=_DENSE, dtype=self.dtype, name="text")(text.astype(self.dtype))
            parts.append(caption + _table(self, "text_positions", self.text[0], width))
        x = jnp.concatenate(parts, axis=1).astype(self.dtype)
        x = Transformer(self.size, self.dtype, self.remat, name="transformer")(x)[:, 1 : 1 + count]
        return _norm(self.dtype, "norm_out")(x).reshape(batch, *self.grid, width)


class Patches(nn.Module):
    """Pixels of every patch, and a convolution over the whole image."""

    patch: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h/p w/p c) -> (b h w 3) in [0, 1]
        x = nn.Dense(3 * self.patch**2, kernel_init=_DENSE, dtype=self.dtype, name="to_pixels")(x)
        x = depth_to_space(x, (self.patch, self.patch))
        return Conv2d(3, 3, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)


class Proxies(nn.Module):
    """Logits over the tokens of MaskGIT's VQGAN."""

    codes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h/p w/p c) -> (b h/p w/p 1024), float32
        x = nn.Dense(2 * x.shape[-1], kernel_init=_DENSE, dtype=self.dtype, name="hidden")(x)
        x = nn.Dense(self.codes, kernel_init=_DENSE, dtype=self.dtype, name="logits")(jnp.tanh(x))
        return x.astype(jnp.float32)


class ProxyPixels(nn.Module):
    """`Proxies`, the mixture of codes that they mean, and the VQGAN's decoder."""

    proxy: tuple[int, int, tuple[int, ...], int]
    dtype: Any
    remat: bool

    def setup(self):
        codes, channels, widths, blocks = self.proxy
        self.proxies = Proxies(codes, self.dtype)
        start = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        self.codebook = self.param("codebook", start, (codes, channels))
        self.pixels = maskgit_vqgan.Decoder(3, widths, blocks, self.dtype, self.remat)

    def __call__(self, x: Array) -> Array:  # (b h/16 w/16 c) -> (b h w 3) in [0, 1]
        return self.pixels(self.mixture(self.proxies(x)))

    def mixture(self, logits: Array) -> Array:  # (b h/16 w/16 1024) -> (b h/16 w/16 256)
        return jnp.matmul(jax.nn.softmax(logits, axis=-1), self.codebook, precision=jax.lax.Precision.HIGHEST)


# What follows the decoder's transformer: from the model.
HEADS = {
    "patches": lambda model: Patches(model.patch, model.dtype),
    "proxies": lambda model: Proxies(model.proxy[0], model.dtype),
    "proxy_pixels": lambda model: ProxyPixels(model.proxy, model.dtype, model.remat),
}


class Model(nn.Module):
    """Encoder, bottleneck, decoder. The networks work on pixels in [0, 1]; here they come and go in [-1, 1].

    Attributes:
      bottleneck: a `VectorQuantizer` (``cosine`` in the first releases) or a Gaussian.
      latent_channels: channels of the codes.
      tokens: of an image.
      input_size: height and width of the images; tables of positions belong to it.
      patch: side of the patches of both transformers.
      encoder, decoder: width, layers and heads of the transformers, see `SIZES`.
      head: ``patches``; ``proxy_pixels``; or ``proxies``: a model of the first training stage, which has no pixels and
        whose `decode` gives the logits over MaskGIT's tokens ``(b h/p w/p 1024)``.
      proxy: codes, channels, widths and blocks of the VQGAN behind the heads that know it, see `PROXY`.
      swapped: read the encoder's output with its axes swapped, as the first releases do.
      text: number and channels of the caption's features that the decoder reads, or None.
      remat: recompute transformer blocks in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = VectorQuantizer(4096, 12, distance="cosine")
    latent_channels: int = 12
    tokens: int = 32
    input_size: tuple[int, int] = (256, 256)
    patch: int = 16
    encoder: tuple[int, int, int] = SIZES["large"]
    decoder: tuple[int, int, int] = SIZES["large"]
    head: str = "patches"
    proxy: tuple[int, int, tuple[int, ...], int] = PROXY
    swapped: bool = False
    text: tuple[int, int] | None = None
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        height, width = self.input_size
        if height % self.patch or width % self.patch:
            raise ValueError(f"patch={self.patch} must divide input_size={self.input_size}.")
        side = 2 ** (len(self.proxy[2]) - 1)
        if self.head == "proxy_pixels" and self.patch != side:
            raise ValueError(f"a proxy of {len(self.proxy[2])} levels has {side} pixels per token, not {self.patch}.")
        out_channels = self.bottleneck.input_channels(self.latent_channels)
        self.encode_tokens = Encoder(
            out_channels, self.tokens, self.patch, self.encoder, self.swapped, self.dtype, self.remat
        )
        grid = (height // self.patch, width // self.patch)
        self.decode_tokens = Decoder(grid, self.tokens, self.decoder, self.text, self.dtype, self.remat)
        self.to_pixels = pick("head", self.head, HEADS)(self)

    @property
    def spec(self) -> Spec:
        last = {"patches": "conv_out", "proxies": "logits", "proxy_pixels": "pixels/conv_out"}
        return Spec(
            compression=(1, self.patch, self.patch),
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            causal=True,
            video=False,
            last_layer=f"to_pixels/{last[self.head]}/kernel",
            tokens_per_item=self.tokens,
        )

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b h w 3) in [-1, 1] -> (b n d)
        return self.bottleneck(self.prequantized(pixels), train)

    def prequantized(self, pixels: Array) -> Array:  # (b h w 3) -> (b n d), or (b n 2d)
        """What the bottleneck reads, float32."""
        pixels = constrain(pixels, "batch", "height", "width", "channel")
        return self.encode_tokens((pixels + 1) / 2).astype(jnp.float32)

    def decode(self, latents: Array, train: bool = False, text: Array | None = None) -> Array:  # (b n d) -> (b h w 3)
        decoded = self.to_pixels(self.filled(latents, text))
        return decoded if self.head == "proxies" else decoded * 2 - 1

    def guess(self, pixels: Array, train: bool = False, text: Array | None = None) -> tuple[Array, Encoding]:
        """Logits over the tokens of the VQGAN ``(b h/p w/p 1024)``: what the first of two training stages compares."""
        encoding = self.encode(pixels, train)
        proxies = self.to_pixels if self.head == "proxies" else self.to_pixels.proxies
        return proxies(self.filled(encoding.latents, text)), encoding

    def filled(self, latents: Array, text: Array | None = None) -> Array:  # (b n d) -> (b h/p w/p c)
        """What the decoder's transformer puts in the place of the masks."""
        if self.text is not None and text is None and self.is_initializing():
            text = jnp.zeros((latents.shape[0], *self.text), jnp.float32)
        if (self.text is None) != (text is None) or (text is not None and text.shape[1:] != self.text):
            wanted = "no text" if self.text is None else f"text=features of shape (B, {self.text[0]}, {self.text[1]})"
            raise ValueError(f"this decoder reads {wanted}, got {None if text is None else text.shape}.")
        return self.decode_tokens(latents, text)

    def indices_to_latents(self, indices: Array) -> Array:  # (b n) -> (b n d)
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False, text: Array | None = None) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train, text), encoding


_FIRST = {
    "bottleneck": {"name": "vq", "codebook_size": 4096, "code_dim": 12, "distance": "cosine"},
    "latent_channels": 12,
    "head": "proxy_pixels",
    "swapped": True,
}
_VQ = {"bottleneck": {"name": "vq", "codebook_size": 8192, "code_dim": 64}, "latent_channels": 64}
_VAE = {"bottleneck": {"name": "gaussian"}, "latent_channels": 16}


def _released(name: str, encoder: str, decoder: str, tokens: int, kind: Mapping[str, Any], rfid: float) -> Variant:
    aware = name.startswith("tatitok")
    owner = "turkeyju" if aware else "yucornetto"
    return Variant(
        config={**kind, "tokens": tokens, "encoder": SIZES[encoder], "decoder": SIZES[decoder]}
        | ({"text": (77, 768)} if aware else {}),
        paper="https://arxiv.org/abs/2501.07730" if aware else "https://arxiv.org/abs/2406.07550",
        source=f"https://huggingface.co/{owner}/tokenizer_{name}",
        license="Apache-2.0",
        note=f"rFID {rfid} on ImageNet at 256 x 256" + ("; text: CLIP ViT-L/14@336" if aware else ""),
    )


VARIANTS = {
    "titok-l32": _released("titok_l32_imagenet", "large", "large", 32, _FIRST, 2.21),
    "titok-b64": _released("titok_b64_imagenet", "base", "base", 64, _FIRST, 1.70),
    "titok-s128": _released("titok_s128_imagenet", "small", "small", 128, _FIRST, 1.71),
    "titok-bl64-vq8k": _released("titok_bl64_vq8k_imagenet", "base", "large", 64, _VQ, 2.06),
    "titok-bl128-vq8k": _released("titok_bl128_vq8k_imagenet", "base", "large", 128, _VQ, 1.49),
    "titok-sl256-vq8k": _released("titok_sl256_vq8k_imagenet", "small", "large", 256, _VQ, 1.03),
    "titok-ll32-vae-c16": _released("titok_ll32_vae_c16_imagenet", "large", "large", 32, _VAE, 1.61),
    "titok-bl64-vae-c16": _released("titok_bl64_vae_c16_imagenet", "base", "large", 64, _VAE, 1.25),
    "titok-bl128-vae-c16": _released("titok_bl128_vae_c16_imagenet", "base", "large", 128, _VAE, 0.84),
    "tatitok-bl32-vq": _released("tatitok_bl32_vq", "base", "large", 32, _VQ, 3.95),
    "tatitok-bl64-vq": _released("tatitok_bl64_vq", "base", "large", 64, _VQ, 2.43),
    "tatitok-bl128-vq": _released("tatitok_bl128_vq", "base", "large", 128, _VQ, 1.53),
    "tatitok-bl32-vae": _released("tatitok_bl32_vae", "base", "large", 32, _VAE, 1.53),
    "tatitok-bl64-vae": _released("tatitok_bl64_vae", "base", "large", 64, _VAE, 1.47),
    "tatitok-sl128-vae": _released("tatitok_sl128_vae", "small", "large", 128, _VAE, 0.90),
}
