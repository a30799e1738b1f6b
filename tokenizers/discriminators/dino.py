"""A discriminator that judges features of a frozen DINOv2, as in StyleGAN-T (https://arxiv.org/abs/2301.09515, 3.2).

Small heads read the tokens of several depths of the transformer, each gives one logit per token. Only the heads learn.
StyleGAN-T's reads DINO of the small size, and augments what it sees; this one reads DINOv2 and does not augment.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import unknown
from ..pixels import IMAGENET_MEAN, IMAGENET_STD

Array = jax.Array

NORMS = ("batch", "group")
_VIRTUAL_BATCH = 8


class LocalBatchNorm(nn.Module):
    """Batch normalisation with the statistics of at most 8 items of the batch, at all times: there are no running ones.

    The number of items per group is the largest divisor of the batch size that is at most 8.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b n c) -> (b n c)
        items, channels = x.shape[0], x.shape[-1]
        size = max(n for n in range(1, _VIRTUAL_BATCH + 1) if items % n == 0)
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        groups = x.astype(jnp.float32).reshape(items // size, size, -1, channels)
        mean = groups.mean((1, 2), keepdims=True)
        variance = jnp.square(groups - mean).mean((1, 2), keepdims=True)
        groups = (groups - mean) * jax.lax.rsqrt(variance + 1e-5)
        return (groups.reshape(x.shape) * scale + bias).astype(self.dtype)


class Head(nn.Module):
    """Convolutions along the sequence of tokens, spectrally normalised, to one logit per token.

    Attributes:
      width: channels inside; 0: those of the tokens.
      blocks: residual blocks with convolutions over 9 tokens (circular padding).
      norm: ``batch`` (`LocalBatchNorm`) or ``group``.
      dtype: compute dtype; norms' statistics and logits are float32.
    """

    width: int = 0
    blocks: int = 1
    norm: str = "batch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, train: bool = False) -> tuple[Array, Array]:  # (b n c) -> (b n 1), (b n d)
        width = self.width or tokens.shape[-1]
        x = self._block(tokens, width, 1, "block_in", train)
        for i in range(self.blocks):
            x = (x + self._block(x, width, 9, f"block{i}", train)) / math.sqrt(2)
        return self._convolution(x, 1, 1, "logits", train).astype(jnp.float32), x

    def _block(self, x: Array, width: int, kernel: int, name: str, train: bool) -> Array:
        x = self._convolution(x, width, kernel, name, train)
        if self.norm == "batch":
            x = LocalBatchNorm(self.dtype, name=f"{name}_norm")(x)
        else:
            x = nn.GroupNorm(
                math.gcd(32, width), epsilon=1e-6, use_fast_variance=False, dtype=self.dtype, name=f"{name}_norm"
            )(x)
        return nn.leaky_relu(x, 0.2)

    def _convolution(self, x: Array, width: int, kernel: int, name: str, train: bool) -> Array:
        layer = nn.Conv(width, (kernel,), padding="CIRCULAR", dtype=self.dtype, name=name)
        return nn.SpectralNorm(layer, collection_name="batch_stats", name=f"{name}_spectral")(x, update_stats=train)


class DinoDiscriminator(nn.Module):
    """Logits from the tokens of a frozen vision transformer, at several depths.

    The transformer's variables are no parameters: they are handed in as the collection ``frozen``, under ``weights``.

    Attributes:
      network: a `networks.foundation.VisionTransformer`.
      depths: blocks whose output a head reads, counted from 0; a further head reads the embedded patches before them.
      width, blocks, norm, dtype: of the heads, see `Head`.
    """

    network: nn.Module
    depths: tuple[int, ...] = (2, 5, 8, 11)
    width: int = 0
    blocks: int = 1
    norm: str = "batch"
    dtype: Any = jnp.float32

    def __call__(self, pixels: Array, train: bool = False) -> Array:
        """Images ``(B, H, W, 3)`` (or clips, frame by frame) in [-1, 1], sides multiples of 16 -> float32 logits.

        Returns:
          ``(B, heads * tokens, 1)``.
        """
        return self.features(pixels, train)[0]

    @nn.compact
    def features(self, pixels: Array, train: bool = False) -> tuple[Array, tuple[Array, ...]]:
        """Like a call, and what each head has last before its logits, too: (logits, features)."""
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        x = pixels.reshape(-1, *pixels.shape[-3:]).astype(jnp.float32)
        x = ((x + 1) / 2 - IMAGENET_MEAN) / IMAGENET_STD  # as the transformer was trained
        network = self.network.clone(parent=None)
        frozen = self.variable("frozen", "weights", lambda: network.init(jax.random.key(0), x)).value
        taps = network.apply(frozen, x, self.depths, method="tokens")[1]
        logits, features = [], []
        for i, tokens in enumerate(taps):
            tokens = tokens[:, 1:] + tokens[:, :1]  # each patch with the class token added
            head = Head(self.width, self.blocks, self.norm, self.dtype, name=f"head{i}")
            found, last = head(tokens.astype(self.dtype), train)
            logits.append(found)
            features.append(last)
        return jnp.concatenate(logits, axis=1), tuple(features)


def dino_2d(
    network: nn.Module, width: int = 0, layers: int = 1, norm: str = "batch", dtype: Any = jnp.float32
) -> DinoDiscriminator:
    """Four heads at equal distances in depth, and one before the first block.

    Args:
      network: a `networks.foundation.VisionTransformer`.
      width: channels of the heads; 0: those of the transformer.
      layers: residual blocks of a head.
      norm: see `Head`.
      dtype: compute dtype of the heads.
    """
    depths = tuple(network.depth * (i + 1) // 4 - 1 for i in range(4))
    return DinoDiscriminator(network, depths, width, layers, norm, dtype)
