"""C-ViViT, the video tokenizer of Phenaki (https://arxiv.org/abs/2210.02399, section 2.1).

The first frame and every few frames after it are cut into patches. The encoder attends over the positions of each
frame, then over the past of each position; the decoder does so in the reverse order. An image is a clip of one frame.

Neither code nor weights were released. This is the network of lucidrains/phenaki-pytorch, whose layer of positions over
time is not causal (``layout="scrambled"``): its weights need it. ``layout="grid"`` is the network of the paper.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..nn.vivit import (
    Layer,
    PatchEmbed,
    PositionConv,
    SpatialBias,
    SpatialCosineAttention,
    TemporalCosineAttention,
    ToPixels,
    Transformer,
    alibi,
)
from ..parallel.constrain import constrain
from ..quantize.lfq import LFQ
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "cvivit"


class Model(nn.Module):
    """Patches, transformers over space and time, codes, transformers over time and space, patches.

    The networks work on pixels in [0, 1]; here they come and go in [-1, 1].

    Attributes:
      bottleneck: an `LFQ` between two dense layers, or a `VectorQuantizer` of the width of the transformers.
      latent_channels: channels of the codes.
      patch: size along (time, height, width).
      width: of the transformers.
      spatial_depth, temporal_depth: layers over space and over time, in the encoder and in the decoder.
      heads, head_dim: of the attention.
      layout: what the convolutions of positions see, ``grid`` or ``scrambled``; see `nn.vivit.PositionConv`.
      attention_window: the last so many latent frames that one sees, itself included; ``None`` is all of its past, as
        trained. A number makes the state of a stream constant.
      channels: of the pixels.
      remat: recompute layers in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = LFQ(16, bit_order="big", entropy="clamped")
    latent_channels: int = 16
    patch: tuple[int, int, int] = (2, 32, 32)
    width: int = 512
    spatial_depth: int = 4
    temporal_depth: int = 4
    heads: int = 8
    head_dim: int = 64
    layout: str = "grid"
    attention_window: int | None = None
    channels: int = 3
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        self.to_tokens = PatchEmbed(self.width, self.patch, dtype=self.dtype)
        # One network of biases for all layers over space.
        self.spatial_bias = SpatialBias(self.heads, self.width)
        self.encoder_space, self.decoder_space = self._over_space(), self._over_space()
        self.encoder_time, self.decoder_time = self._over_time(), self._over_time()
        self.to_pixels = ToPixels(self.patch, self.channels, dtype=self.dtype)
        z_channels = self.bottleneck.input_channels(self.latent_channels)
        self.to_codes = nn.Dense(z_channels, dtype=self.dtype) if z_channels != self.width else None
        self.from_codes = nn.Dense(self.width, dtype=self.dtype) if z_channels != self.width else None

    def _over_space(self) -> Transformer:
        attention = functools.partial(SpatialCosineAttention, self.heads, head_dim=self.head_dim, dtype=self.dtype)
        layer = functools.partial(Layer, attention=attention, dtype=self.dtype)
        return Transformer((layer,) * self.spatial_depth, self.remat, self.dtype)

    def _over_time(self) -> Transformer:
        attention = functools.partial(
            TemporalCosineAttention,
            self.heads,
            head_dim=self.head_dim,
            window=self.attention_window,
            bias=functools.partial(alibi, heads=self.heads),
            dtype=self.dtype,
        )
        position = functools.partial(PositionConv, layout=self.layout, dtype=self.dtype)
        layer = functools.partial(Layer, attention=attention, position=position, dtype=self.dtype)
        return Transformer((layer,) * self.temporal_depth, self.remat, self.dtype)

    @property
    def spec(self) -> Spec:
        return Spec(
            compression=self.patch,
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            causal=self.layout == "grid",
            video=True,
            last_layer="to_pixels/rest/kernel",
            first_frame_alone=True,
            channels=self.channels,
        )

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b 1+t*p h w c) in [-1, 1] -> (b 1+t h' w' d)
        return self.bottleneck(self.prequantized(pixels), train)

    def prequantized(self, pixels: Array) -> Array:  # (b 1+t*p h w c) -> (b 1+t h' w' d)
        """What the bottleneck reads, float32."""
        pixels = constrain(pixels, "batch", "time", "height", "width", "channel")
        x = self.to_tokens((pixels.astype(self.dtype) + 1) / 2)
        x = self.encoder_space(x, self.spatial_bias(*x.shape[2:4]))
        x = self.encoder_time(x)
        return (x if self.to_codes is None else self.to_codes(x)).astype(jnp.float32)

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b 1+t h' w' d) -> (b 1+t*p h w c)
        x = latents.astype(self.dtype)
        x = x if self.from_codes is None else self.from_codes(x)
        x = self.decoder_time(constrain(x, "batch", "time", "height", "width", "channel"))
        x = self.decoder_space(x, self.spatial_bias(*x.shape[2:4]))
        return self.to_pixels(x).astype(jnp.float32) * 2 - 1

    def indices_to_latents(self, indices: Array) -> Array:  # (b 1+t h' w') -> (b 1+t h' w' d)
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


def _bits(bits: int) -> dict[str, Any]:
    return {"name": "lfq", "bits": bits, "bit_order": "big", "entropy": "clamped"}


_PAPER, _CODE = "https://arxiv.org/abs/2210.02399", "https://github.com/lucidrains/phenaki-pytorch"
_CAUSES = "weights of that code need layout=scrambled, which is not causal"

VARIANTS = {
    "cvivit-phenaki": Variant(
        config={"bottleneck": _bits(13), "latent_channels": 13, "patch": (2, 8, 8)},
        paper=_PAPER,
        source=_CODE,
        license="MIT",
        note=f"sizes of the paper: 11 frames of 128 x 128 pixels are 1536 of 8192 tokens; no weights exist; {_CAUSES}",
    ),
    "cvivit-phenaki-pytorch": Variant(
        config={"bottleneck": _bits(16), "latent_channels": 16, "patch": (2, 32, 32), "layout": "scrambled"},
        paper=_PAPER,
        source=_CODE,
        license="MIT",
        note="sizes of that code's README; no weights exist; not causal in time: its positions over time are mixed up",
    ),
}
