"""DALL-E's discrete VAE (https://arxiv.org/abs/2102.12092, section 2.1, appendix A): 8x8 pixels to one of 8192 tokens.

The encoder gives logits over the vocabulary, the decoder reads a one-hot map (relaxed while training) and gives mean
and log-scale of a logit-Laplace distribution of every pixel value (appendix A.3). Pixels in [0, 1] are mapped to
[0.1, 0.9] first: the density has no finite limit at 0 and 1. Released with inference code only; the likelihood and the
schedules of the recipe are the paper's.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..nn.conv import Conv2d
from ..nn.resample import upsample_nearest
from ..parallel.constrain import constrain
from ..quantize.gumbel import GumbelSoftmax
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "dvae"

LAPLACE_EPS = 0.1
_AXES = ("batch", "height", "width", "channel")
_GROUPS = (1, 2, 4, 8)  # widths of the four groups of blocks, from pixels to tokens
_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def map_pixels(pixels: Array) -> Array:
    """[-1, 1] -> [0.1, 0.9] (official ``map_pixels``, which takes [0, 1])."""
    return (1 - 2 * LAPLACE_EPS) * (pixels + 1) / 2 + LAPLACE_EPS


def unmap_pixels(mapped: Array) -> Array:
    """[0.1, 0.9] -> [-1, 1]; what lies outside is clipped (official ``unmap_pixels``, which gives [0, 1])."""
    return 2 * jnp.clip((mapped - LAPLACE_EPS) / (1 - 2 * LAPLACE_EPS), 0, 1) - 1


def logit_laplace_nll(statistics: Array, mapped: Array) -> Array:
    """-log of the logit-Laplace density, equation 2 of appendix A.3.

    Args:
      statistics: float32 ``(..., 2 * C)``, means and then log-scales of the logits.
      mapped: values in (0, 1), ``(..., C)``.

    Returns:
      nats per value, ``(..., C)``.
    """
    mean, log_scale = jnp.split(statistics, 2, axis=-1)
    log_x, log_rest = jnp.log(mapped), jnp.log1p(-mapped)
    return math.log(2) + log_scale + log_x + log_rest + jnp.abs(log_x - log_rest - mean) * jnp.exp(-log_scale)


class Block(nn.Module):
    """Identity, or a 1x1 convolution of it where the width changes, plus a scaled stack of four ReLU-convolutions.

    Attributes:
      features: output channels; the stack has a quarter of them.
      kernels: sizes of the four kernels: (3, 3, 3, 1) in the encoder, (1, 3, 3, 3) in the decoder.
      gain: of the stack.
    """

    features: int
    kernels: tuple[int, ...]
    gain: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w c) -> (b h w d)
        widths = (*(self.features // 4,) * 3, self.features)
        h = x  # not activated: the identity path carries raw values
        for i, (width, kernel) in enumerate(zip(widths, self.kernels, strict=True), start=1):
            h = _conv(width, kernel, self.dtype, f"conv_{i}")(nn.relu(h))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.dtype, "id_path")(x)
        return constrain(x + self.gain * h, *_AXES)


def _conv(features: int, kernel: int, dtype: Any, name: str) -> Conv2d:
    return Conv2d(features, kernel, dtype=dtype, kernel_init=_INIT, name=name)


class Encoder(nn.Module):
    """Mapped pixels to logits: four groups of blocks, the first three halve the grid."""

    vocabulary: int
    hidden: int
    blocks: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w 3) -> (b h/8 w/8 k)
        gain = 1 / (len(_GROUPS) * self.blocks) ** 2
        x = _conv(self.hidden, 7, self.dtype, "input")(x)
        for group, factor in enumerate(_GROUPS, start=1):
            for i in range(1, self.blocks + 1):
                x = Block(factor * self.hidden, (3, 3, 3, 1), gain, self.dtype, name=f"group_{group}_block_{i}")(x)
            if group < len(_GROUPS):
                x = nn.max_pool(x, (2, 2), (2, 2))
        # The released code leaves half precision here, too: tokens are an argmax.
        return _conv(self.vocabulary, 1, jnp.float32, "output")(nn.relu(x))


class Decoder(nn.Module):
    """One-hot tokens to the statistics of mapped pixels: four groups of blocks, the first three double the grid."""

    embed: int
    hidden: int
    blocks: int
    dtype: Any

    @nn.compact
    def __call__(self, choice: Array) -> Array:  # (b h w k) -> (b 8h 8w 6), float32
        gain = 1 / (len(_GROUPS) * self.blocks) ** 2
        x = _conv(self.embed, 1, jnp.float32, "input")(choice).astype(self.dtype)
        for group, factor in enumerate(reversed(_GROUPS), start=1):
            for i in range(1, self.blocks + 1):
                x = Block(factor * self.hidden, (1, 3, 3, 3), gain, self.dtype, name=f"group_{group}_block_{i}")(x)
            if group < len(_GROUPS):
                x = upsample_nearest(x, (2, 2))
        return _conv(6, 1, self.dtype, "output")(nn.relu(x)).astype(jnp.float32)


class Model(nn.Module):
    """Encoder, Gumbel-softmax, decoder. Calling it adds ``losses["nll"]``, the mean per value of `logit_laplace_nll`.

    The paper's loss per pixel value is ``nll + beta * kl / 192`` with ``kl`` per position: 64 pixels of 3 values each.

    Attributes:
      bottleneck: one that makes one-hot codes of its logits.
      latent_channels: size of the vocabulary.
      hidden: width of the blocks nearest to the pixels.
      blocks: blocks per group.
      embed: width into which the decoder embeds tokens.
      dtype: compute dtype; parameters, logits, the bottleneck and pixels are float32.
    """

    bottleneck: nn.Module = GumbelSoftmax(8192, code_dim=None, project=False, hard=False)
    latent_channels: int = 8192
    hidden: int = 256
    blocks: int = 2
    embed: int = 128
    dtype: Any = jnp.float32

    def setup(self):
        logits = self.bottleneck.input_channels(self.latent_channels)
        self.encoder = Encoder(logits, self.hidden, self.blocks, self.dtype)
        self.decoder = Decoder(self.embed, self.hidden, self.blocks, self.dtype)

    @property
    def spec(self) -> Spec:
        return Spec(
            compression=(1, 8, 8),
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            causal=True,
            video=False,
            last_layer="decoder/output/kernel",
        )

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b h w 3) in [-1, 1] -> (b h/8 w/8 k)
        return self.bottleneck(self.logits(pixels), train)

    def logits(self, pixels: Array) -> Array:  # (b h w 3) in [-1, 1] -> (b h/8 w/8 k)
        return self.encoder(constrain(map_pixels(pixels), *_AXES).astype(self.dtype))

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b h w k) -> (b 8h 8w 3) in [-1, 1]
        return _pixels(self.statistics(latents))

    def statistics(self, latents: Array) -> Array:  # (b h w k) -> (b 8h 8w 6): means, log-scales
        return self.decoder(constrain(latents, *_AXES))

    def indices_to_latents(self, indices: Array) -> Array:  # (b h w) -> (b h w k)
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        statistics = self.statistics(encoding.latents)
        nll = jnp.mean(logit_laplace_nll(statistics, map_pixels(pixels.astype(jnp.float32))))
        return _pixels(statistics), encoding.replace(losses=encoding.losses | {"nll": nll})


def _pixels(statistics: Array) -> Array:
    return unmap_pixels(jax.nn.sigmoid(statistics[..., : statistics.shape[-1] // 2]))


VARIANTS = {
    "dvae-dalle-f8-8192": Variant(
        config={
            "bottleneck": {"name": "gumbel", "codebook_size": 8192, "code_dim": None, "project": False, "hard": False},
            "latent_channels": 8192,
            "hidden": 256,
            "blocks": 2,
            "embed": 128,
        },
        paper="https://arxiv.org/abs/2102.12092",
        source="https://github.com/openai/DALL-E (encoder.pkl and decoder.pkl)",
        license="MIT (modified)",
        note="the only released size; two files, see convert/dvae.py",
    ),
}
