"""Encoder and decoder of VQGAN and latent diffusion, which most later image autoencoders kept.

VQGAN, https://arxiv.org/abs/2012.09841, table 7; the code is CompVis/taming-transformers
`modules/diffusionmodules/model.py`, and diffusers' `AutoencoderKL` is the same network under other names. A
convolution, then levels of residual blocks (group norm, swish, convolution, twice) with a strided convolution between
two levels, a middle of residual block, attention, residual block, and norm, swish, convolution. The decoder is the
mirror image with one more residual block per level.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .attention import SpatialAttention
from .blocks import AttentionBlock, ResBlock
from .conv import Conv2d
from .norm import GroupNorm
from .resample import Downsample, Upsample, average_pool, upsample_nearest

Array = jax.Array


class _Coder(nn.Module):
    """Fields and layers that encoder and decoder share.

    Attributes:
      out_channels: channels of the result.
      widths: channels of each level, from pixels to latents: level i works at 1 / 2^i of the size of the image.
      blocks: residual blocks per level of the encoder; the decoder has one more.
      attention: levels (0 is that of the pixels) whose residual blocks are each followed by attention. The placement
        belongs to the network: it does not follow the size of the image.
      middle_attention: attention between the two residual blocks of the middle.
      resample_conv: a 3x3 convolution where the size changes; otherwise bare average pooling and repetition.
      num_groups: of all group norms.
      dropout: rate inside of the residual blocks, in training (rng stream ``dropout``).
      remat: recompute residual blocks in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, statistics of norms and softmax are float32.
    """

    out_channels: int
    widths: tuple[int, ...]
    blocks: int = 2
    attention: tuple[int, ...] = ()
    middle_attention: bool = True
    resample_conv: bool = True
    num_groups: int = 32
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    def norm(self, name: str) -> GroupNorm:
        return GroupNorm(num_groups=self.num_groups, epsilon=1e-6, name=name)

    def conv(self, features: int, name: str, kernel_size: int = 3) -> Conv2d:
        return Conv2d(features, kernel_size, dtype=self.dtype, name=name)

    def residual(self, x: Array, features: int, train: bool, name: str) -> Array:
        block = nn.remat(ResBlock, static_argnums=(2,)) if self.remat else ResBlock
        norm = functools.partial(GroupNorm, num_groups=self.num_groups, epsilon=1e-6)
        conv = functools.partial(Conv2d, dtype=self.dtype)
        return block(features, conv, norm, dropout=self.dropout, name=name)(x, train)

    def attend(self, x: Array, name: str) -> Array:
        norm = functools.partial(GroupNorm, num_groups=self.num_groups, epsilon=1e-6)
        return AttentionBlock(functools.partial(SpatialAttention, dtype=self.dtype), norm, name=name)(x)

    def level(self, x: Array, index: int, count: int, train: bool, name: str) -> Array:
        """``count`` residual blocks, each followed by attention where the level has it."""
        for i in range(count):
            x = self.residual(x, self.widths[index], train, f"{name}_block{i}")
            if index in self.attention:
                x = self.attend(x, f"{name}_attn{i}")
        return x

    def middle(self, x: Array, train: bool) -> Array:
        x = self.residual(x, self.widths[-1], train, "mid_block0")
        if self.middle_attention:
            x = self.attend(x, "mid_attn0")
        return self.residual(x, self.widths[-1], train, "mid_block1")

    def finish(self, x: Array) -> Array:
        return self.conv(self.out_channels, "conv_out")(nn.swish(self.norm("norm_out")(x)))


class Encoder(_Coder):
    """Pixels to the input of the bottleneck (without a `quant_conv`).

    Attributes:
      stem: channels of the first convolution; ``None`` is those of level 0.
    """

    stem: int | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:  # (b h w c) -> (b h/2^l w/2^l d), sizes rounded down
        x = self.conv(self.stem or self.widths[0], "conv_in")(x.astype(self.dtype))
        for index, features in enumerate(self.widths):
            x = self.level(x, index, self.blocks, train, f"down{index}")
            if index + 1 < len(self.widths):
                x = self._smaller(x, features, f"down{index}_downsample")
        return self.finish(self.middle(x, train))

    def _smaller(self, x: Array, features: int, name: str) -> Array:
        if self.resample_conv:
            return Downsample(features, dtype=self.dtype, name=name)(x)
        *_, h, w, _ = x.shape
        return average_pool(x[..., : h // 2 * 2, : w // 2 * 2, :], (2, 2))


class Decoder(_Coder):
    """Latents (behind a `post_quant_conv`, where there is one) to pixels, float32, without an output activation."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:  # (b h w d) -> (b 2^l*h 2^l*w c)
        x = self.middle(self.conv(self.widths[-1], "conv_in")(x.astype(self.dtype)), train)
        for index in reversed(range(len(self.widths))):
            x = self.level(x, index, self.blocks + 1, train, f"up{index}")
            if index:
                x = self._larger(x, self.widths[index], f"up{index}_upsample")
        return self.finish(x).astype(jnp.float32)

    def _larger(self, x: Array, features: int, name: str) -> Array:
        return Upsample(features, dtype=self.dtype, name=name)(x) if self.resample_conv else upsample_nearest(x, (2, 2))
