"""A causal tokenizer of four convolutions, for tests of the code around models: it compiles in seconds."""

import sys
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from tokenizers import registry
from tokenizers.nn.conv import CausalConv3d
from tokenizers.nn.norm import GroupNorm
from tokenizers.nn.resample import depth_to_space, space_to_depth
from tokenizers.parallel.constrain import constrain
from tokenizers.quantize.fsq import FSQ
from tokenizers.types import Spec

SYSTEM, VARIANTS = "tiny", {}
_AXES = ("batch", "time", "height", "width", "channel")


class Model(nn.Module):
    bottleneck: nn.Module = FSQ((4, 4, 4))
    latent_channels: int = 3
    channels: int = 8
    video: bool = True
    dtype: Any = jnp.float32

    @property
    def spec(self) -> Spec:
        return Spec(
            compression=(1, 4, 4),
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            causal=True,
            video=self.video,
            last_layer="conv_out/kernel",
            first_frame_alone=self.video,
        )

    def setup(self):
        self.conv_in = CausalConv3d(self.channels, dtype=self.dtype)
        self.norm = GroupNorm(num_groups=4, per_frame=True, dtype=self.dtype)
        self.to_latents = CausalConv3d(self.bottleneck.input_channels(self.latent_channels), 1, dtype=self.dtype)
        self.conv_middle = CausalConv3d(self.channels, dtype=self.dtype)
        self.conv_out = CausalConv3d(48, 1, dtype=self.dtype)

    def encode(self, pixels, train=False):
        x = pixels if self.video else pixels[:, None]
        x = constrain(space_to_depth(x.astype(self.dtype), (4, 4)), *_AXES)
        x = self.to_latents(nn.swish(self.norm(self.conv_in(x))))
        return self.bottleneck((x if self.video else x[:, 0]).astype(jnp.float32), train)

    def decode(self, latents, train=False):
        x = constrain(latents if self.video else latents[:, None], *_AXES)
        x = nn.swish(self.conv_middle(x))
        x = depth_to_space(self.conv_out(x), (4, 4)).astype(jnp.float32)
        return x if self.video else x[:, 0]

    def indices_to_latents(self, indices):
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels, train=False):
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


def register() -> None:
    """Makes ``config.model.name = "tiny"`` known in this process."""
    registry.systems()[SYSTEM] = sys.modules[__name__]
