"""A small causal 3D-convolutional video tokenizer: images and clips through one set of weights.

The plan is that of MAGVIT-v2 (https://arxiv.org/abs/2310.05737, section 3.2) and its successors: every convolution
over time sees only the past, so the first frame is encoded alone and an image is a clip of one frame. Two choices keep
it light enough for a laptop: pixels enter as patches (space-to-depth, as in Cosmos), and residual blocks convolve space
and time one after the other. Any bottleneck fits; FSQ (https://arxiv.org/abs/2309.15505) is the default.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..nn.conv import CausalConv3d, FactorizedConv3d, starts_clip
from ..nn.norm import GroupNorm
from ..nn.resample import (
    CausalTimeDownsample,
    CausalTimeUpsample,
    Downsample,
    Upsample,
    average_pool,
    causal_average_pool_time,
    causal_upsample_time,
    depth_to_space,
    space_to_depth,
    upsample_nearest,
)
from ..parallel.constrain import constrain
from ..quantize.fsq import FSQ
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "causal3d"

# The network starts as a linear autoencoder (patches, averages, repetition, 1x1 convolutions); what is not linear
# starts small and grows. From a start at full scale, the first hundreds of steps go into undoing it.
_SMALL = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
_ZEROS = nn.initializers.zeros_init()

_AXES = ("batch", "time", "height", "width", "channel")


class ResBlock(nn.Module):
    """norm, swish, factorized convolution, twice, and a skip; statistics of each frame alone keep it causal."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b t h w d)
        h = FactorizedConv3d(self.features, dtype=self.dtype, name="conv1")(self._activate(x, "norm1"))
        h = FactorizedConv3d(
            self.features,
            dtype=self.dtype,
            kernel_init=_SMALL,
            name="conv2",
        )(self._activate(h, "norm2"))
        if x.shape[-1] != self.features:
            x = CausalConv3d(self.features, 1, dtype=self.dtype, name="shortcut")(x)
        return constrain(x + h, *_AXES)

    def _activate(self, x: Array, name: str) -> Array:
        return nn.swish(_norm(x.shape[-1], self.dtype, name)(x))


def _norm(channels: int, dtype: Any, name: str | None = None) -> GroupNorm:
    return GroupNorm(num_groups=math.gcd(channels, 8), per_frame=True, dtype=dtype, name=name)


class Encoder(nn.Module):
    """Pixels to the bottleneck's input. Fields as in `Model`."""

    out_channels: int
    channels: tuple[int, ...]
    blocks: int
    patch: int
    space_down: tuple[bool, ...]
    time_down: tuple[bool, ...]
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, pixels: Array) -> Array:  # (b 1+k*t h w c) -> (b 1+k h' w' d)
        block = nn.remat(ResBlock) if self.remat else ResBlock
        first = starts_clip(self)
        x = space_to_depth(pixels.astype(self.dtype), (self.patch, self.patch))
        x = CausalConv3d(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        for level, features in enumerate(self.channels):
            for i in range(self.blocks):
                x = block(features, self.dtype, name=f"level{level}_block{i}")(x)
            if self.space_down[level]:
                kept = average_pool(x, (2, 2))
                x = kept + Downsample(features, dtype=self.dtype, kernel_init=_SMALL, name=f"level{level}_space")(x)
            if self.time_down[level]:
                kept = causal_average_pool_time(x, 2, first_frame_alone=first)
                x = kept + CausalTimeDownsample(
                    features, dtype=self.dtype, kernel_init=_SMALL, name=f"level{level}_time"
                )(x)
        x = block(self.channels[-1], self.dtype, name="middle")(x)
        h = nn.swish(_norm(x.shape[-1], self.dtype, "norm_out")(x))
        h = CausalConv3d(self.out_channels, dtype=self.dtype, kernel_init=_ZEROS, name="conv_out")(h)
        return h + CausalConv3d(self.out_channels, 1, dtype=self.dtype, name="linear_out")(x)


class Decoder(nn.Module):
    """Latents to pixels, the mirror of `Encoder`."""

    pixel_channels: int
    channels: tuple[int, ...]
    blocks: int
    patch: int
    space_down: tuple[bool, ...]
    time_down: tuple[bool, ...]
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, latents: Array) -> Array:  # (b 1+k h' w' d) -> (b 1+k*t h w c)
        block = nn.remat(ResBlock) if self.remat else ResBlock
        first = starts_clip(self)
        x = CausalConv3d(self.channels[-1], dtype=self.dtype, name="conv_in")(latents.astype(self.dtype))
        x = block(self.channels[-1], self.dtype, name="middle")(x)
        for level in reversed(range(len(self.channels))):
            features = self.channels[level]
            if level + 1 < len(self.channels):
                x = CausalConv3d(features, 1, dtype=self.dtype, name=f"level{level}_in")(x)
            if self.time_down[level]:
                kept = causal_upsample_time(x, 2, first_frame_alone=first)
                x = kept + CausalTimeUpsample(
                    features, dtype=self.dtype, kernel_init=_SMALL, name=f"level{level}_time"
                )(x)
            if self.space_down[level]:
                kept = upsample_nearest(x, (2, 2))
                x = kept + Upsample(features, dtype=self.dtype, kernel_init=_SMALL, name=f"level{level}_space")(x)
            for i in range(self.blocks):
                x = block(features, self.dtype, name=f"level{level}_block{i}")(x)
        h = nn.swish(_norm(x.shape[-1], self.dtype, "norm_out")(x))
        size = self.pixel_channels * self.patch**2
        h = CausalConv3d(size, dtype=self.dtype, kernel_init=_ZEROS, name="conv_out")(h)
        x = h + CausalConv3d(size, 1, dtype=self.dtype, name="linear_out")(x)
        return depth_to_space(x, (self.patch, self.patch)).astype(jnp.float32)


class Model(nn.Module):
    """Encoder, bottleneck, decoder.

    Attributes:
      bottleneck: any module of ``tokenizers/quantize``.
      channels: width of each level, from pixels to latents.
      blocks: residual blocks per level and side.
      patch: side of the patches in which pixels enter and leave.
      space_down: whether each level ends by halving height and width.
      time_down: whether each level ends by halving time (the first frame stays).
      remat: recompute residual blocks in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = FSQ((8,) * 8, commitment=True)
    latent_channels: int = 8
    channels: tuple[int, ...] = (128, 128)
    blocks: int = 1
    patch: int = 8
    space_down: tuple[bool, ...] = (False, False)
    time_down: tuple[bool, ...] = (True, True)
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        if not len(self.channels) == len(self.space_down) == len(self.time_down):
            raise ValueError(
                f"channels {self.channels}, space_down {self.space_down} and time_down {self.time_down} need one entry "
                "per level each."
            )
        shared = (self.channels, self.blocks, self.patch, self.space_down, self.time_down, self.dtype, self.remat)
        self.encoder = Encoder(self.bottleneck.input_channels(self.latent_channels), *shared)
        self.decoder = Decoder(3, *shared)

    @property
    def spec(self) -> Spec:
        side = self.patch * 2 ** sum(self.space_down)
        return Spec(
            compression=(2 ** sum(self.time_down), side, side),
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            codebooks=getattr(self.bottleneck, "codebooks", 1),
            causal=True,
            video=True,
            last_layer="decoder/conv_out/kernel",
            first_frame_alone=True,
        )

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b 1+k*t h w 3) in [-1, 1]
        return self.bottleneck(self.encoder(constrain(pixels, *_AXES)).astype(jnp.float32), train)

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b 1+k h' w' d) -> (b 1+k*t h w 3)
        return self.decoder(constrain(latents, *_AXES))

    def indices_to_latents(self, indices: Array) -> Array:  # (b 1+k h' w') -> (b 1+k h' w' d)
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


VARIANTS = {
    "causal3d-fsq-488-16777216": Variant(
        config={
            "bottleneck": {"name": "fsq", "levels": (8,) * 8, "commitment": True},
            "latent_channels": 8,
            "channels": (128, 128),
            "patch": 8,
            "space_down": (False, False),
            "time_down": (True, True),
        },
        paper="https://arxiv.org/abs/2310.05737 (architecture), https://arxiv.org/abs/2309.15505 (FSQ)",
        license="this repository's",
        note="the quickstart's size; trained by configs/quickstart.py, no published weights",
    ),
}
