"""OmniTokenizer: images and video with one set of weights (https://arxiv.org/abs/2406.09399).

The first frame and every few frames after it are cut into patches. The encoder attends over the positions of each frame
(everywhere, or inside windows), then over time; the decoder does so in the reverse order. Codes are nearest neighbours
of unit vectors, or samples of a Gaussian. An image is a clip of one frame.

It is trained in stages: images at one size; then images and video in turn at several sizes; then, as a VAE, the same
with another bottleneck. `next_stage` brings the weights of one to the next.

The released weights are not causal, although their attention and convolutions are: over time, the convolutions that
tell positions read an array whose axes are mixed up (``layout="scrambled"``). ``layout="grid"`` is what the paper
means.
No position encoding depends on the size of the pictures, so that every size works as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ..errors import pick
from ..nn.attention import WindowAttention
from ..nn.conv import starts_clip
from ..nn.norm import LayerNorm
from ..nn.resample import average_pool, causal_average_pool_time, causal_upsample_time, upsample_nearest
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
    offsets,
)
from ..parallel.constrain import constrain
from ..quantize.gradients import unit_norm
from ..quantize.vq import VectorQuantizer
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "omnitokenizer"


# ---------------------------------------------------------------------------------------------------------- attention


def axial_angles(h: int, w: int, head_dim: int) -> np.ndarray:
    """Pairs of channels turn by column and row in alternation, at 10000^(-4 j / D): float32 ``(h w, head_dim / 2)``."""
    frequencies = 10000.0 ** (-4 * np.arange(head_dim // 4) / head_dim)
    row, column = (a.reshape(-1, 1) * frequencies for a in np.meshgrid(np.arange(h), np.arange(w), indexing="ij"))
    return np.stack([column, row], axis=-1).reshape(h * w, -1).astype(np.float32)


class BiasedAttention(nn.Module):
    """Attention over the positions of a frame, with a network of biases of its own."""

    heads: int
    head_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> same
        bias = SpatialBias(self.heads, x.shape[-1], name="bias")(*x.shape[2:4])
        return SpatialCosineAttention(self.heads, head_dim=self.head_dim, dtype=self.dtype, name="attention")(
            x, bias=bias
        )


class WindowedAttention(nn.Module):
    """Layer norm, attention inside windows with a table of biases (Swin, https://arxiv.org/abs/2103.14030, no shift).

    Where windows do not divide height and width the last ones hold fewer positions; the authors' code refuses those.
    """

    heads: int
    window: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> same
        h, w, side = *x.shape[2:4], self.window
        table = self.param("bias", nn.initializers.truncated_normal(0.02), ((2 * side - 1) ** 2, self.heads))
        bias = jnp.moveaxis(table[offsets(side, side)], -1, 0)
        x = LayerNorm(epsilon=1e-5, use_bias=False, dtype=self.dtype, name="norm")(x)
        missing = ((0, -h % side), (0, -w % side))
        mask = None
        if any(map(any, missing)):
            x = jnp.pad(x, ((0, 0), (0, 0), *missing, (0, 0)))
            mask = _inside((h, w), x.shape[2:4], side)
        attention = WindowAttention(
            self.heads,
            qkv_bias=False,
            fused_qkv=True,
            window=(side, side),
            dtype=self.dtype,
            name="windows",
        )
        return attention(x, bias=bias, mask=mask)[:, :, :h, :w]


def _inside(size: tuple[int, int], padded: tuple[int, int], side: int) -> np.ndarray:
    """Which positions of every window are no padding: bool ``(windows, 1, 1, side^2)``."""
    real = (np.arange(padded[0])[:, None] < size[0]) & (np.arange(padded[1]) < size[1])
    rows, columns = padded[0] // side, padded[1] // side
    return real.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(rows * columns, 1, 1, -1)


# What tells positions inside a frame besides the convolutions: makes attention of (heads, head_dim, dtype).
def _rotary(heads: int, head_dim: int, dtype: Any) -> Any:
    angles = functools.partial(axial_angles, head_dim=head_dim)
    return functools.partial(SpatialCosineAttention, heads, head_dim=head_dim, angles=angles, dtype=dtype)


SPATIAL_POSITIONS = {
    "rotary": _rotary,
    "bias": lambda heads, head_dim, dtype: functools.partial(BiasedAttention, heads, head_dim, dtype=dtype),
    "none": lambda heads, head_dim, dtype: functools.partial(
        SpatialCosineAttention, heads, head_dim=head_dim, dtype=dtype
    ),
}
# The same over time: biases of (heads).
TEMPORAL_POSITIONS = {"alibi": lambda heads: functools.partial(alibi, heads=heads), "none": lambda heads: None}


# ------------------------------------------------------------------------------------------------------------- pooling


class Pool(nn.Module):
    """Means of ``factors`` (time, space) tokens, those of the first frame apart in time. Streams."""

    factors: tuple[int, int]

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+t*p h*s w*s c) -> (b 1+t h w c)
        time, space = self.factors
        x = causal_average_pool_time(x, time, first_frame_alone=starts_clip(self)) if time > 1 else x
        return average_pool(x, (space, space)) if space > 1 else x


class Unpool(nn.Module):
    """Repeats tokens: the counterpart of `Pool`. Streams."""

    factors: tuple[int, int]

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+t h w c) -> (b 1+t*p h*s w*s c)
        time, space = self.factors
        x = causal_upsample_time(x, time, first_frame_alone=starts_clip(self)) if time > 1 else x
        return upsample_nearest(x, (space, space)) if space > 1 else x


# --------------------------------------------------------------------------------------------------------------- model


class Model(nn.Module):
    """Patches, transformers over space and time, codes, transformers over time and space, patches.

    The networks work on pixels in [-0.5, 0.5]; here they come and go in [-1, 1].

    Attributes:
      bottleneck: a `VectorQuantizer` of unit vectors, or a Gaussian.
      latent_channels: channels of the codes.
      unit_codes: whether the bottleneck reads vectors of length one.
      patch: input pixels per token along (time, height, width).
      pool: of these, the part that is pooled after the encoder, along (time, space).
      width: of the transformers.
      encoder_blocks, decoder_blocks: layers over space, one letter each: ``t`` attends everywhere, ``w`` in windows.
      temporal_depth: layers over time, in the encoder and in the decoder.
      heads, head_dim: of the attention.
      window: height and width of windows, in tokens.
      spatial_positions: of the layers ``t``: ``rotary``, ``bias`` or ``none``.
      temporal_positions: ``alibi`` or ``none``.
      causal_attention, causal_positions: whether attention and position convolutions over time look back only.
      layout: what the convolutions of positions over time see, ``grid`` or ``scrambled``; see `nn.vivit.PositionConv`.
      attention_window: the last so many latent frames that one sees, itself included; ``None`` is all of its past, as
        trained. A number makes the state of a stream constant.
      remat: recompute layers in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = VectorQuantizer(8192, 8, learning="ema", epsilon=1e-7)
    latent_channels: int = 8
    unit_codes: bool = True
    patch: tuple[int, int, int] = (4, 8, 8)
    pool: tuple[int, int] = (1, 1)
    width: int = 512
    encoder_blocks: str = "ttww"
    decoder_blocks: str = "tttt"
    temporal_depth: int = 4
    heads: int = 8
    head_dim: int = 64
    window: int = 8
    spatial_positions: str = "rotary"
    temporal_positions: str = "none"
    causal_attention: bool = True
    causal_positions: bool = True
    layout: str = "grid"
    attention_window: int | None = None
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        time, space = self.pool
        if any(size % factor for size, factor in zip(self.patch, (time, space, space), strict=True)):
            raise ValueError(f"pool={self.pool} (time, space) must divide patch={self.patch}.")
        patch = (self.patch[0] // time, self.patch[1] // space, self.patch[2] // space)
        self.to_tokens = PatchEmbed(self.width, patch, dtype=self.dtype)
        self.encoder_space, self.decoder_space = map(self._over_space, (self.encoder_blocks, self.decoder_blocks))
        self.encoder_time, self.decoder_time = self._over_time(), self._over_time()
        self.pooled, self.unpooled = Pool(self.pool), Unpool(self.pool)
        z_channels = self.bottleneck.input_channels(self.latent_channels)
        self.to_codes = nn.Dense(z_channels, dtype=self.dtype)
        self.from_codes = nn.Dense(self.width, dtype=self.dtype)
        self.to_pixels = ToPixels(patch, dtype=self.dtype)

    def _over_space(self, blocks: str) -> Transformer:
        make = pick("spatial_positions", self.spatial_positions, SPATIAL_POSITIONS)
        everywhere = functools.partial(
            Layer,
            attention=make(self.heads, self.head_dim, self.dtype),
            position=functools.partial(PositionConv, self.causal_positions, dtype=self.dtype),
            dtype=self.dtype,
        )
        windows = functools.partial(WindowedAttention, self.heads, self.window, dtype=self.dtype)
        kinds = {"t": everywhere, "w": functools.partial(Layer, attention=windows, dtype=self.dtype)}
        return Transformer(tuple(pick("block", letter, kinds) for letter in blocks), self.remat, self.dtype)

    def _over_time(self) -> Transformer:
        attention = functools.partial(
            TemporalCosineAttention,
            self.heads,
            head_dim=self.head_dim,
            causal=self.causal_attention,
            window=self.attention_window,
            bias=pick("temporal_positions", self.temporal_positions, TEMPORAL_POSITIONS)(self.heads),
            dtype=self.dtype,
        )
        position = functools.partial(PositionConv, self.causal_positions, self.layout, dtype=self.dtype)
        layer = functools.partial(Layer, attention=attention, position=position, dtype=self.dtype)
        return Transformer((layer,) * self.temporal_depth, self.remat, self.dtype)

    @property
    def spec(self) -> Spec:
        return Spec(
            compression=self.patch,
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            causal=self.causal_attention and self.causal_positions and self.layout == "grid",
            video=True,
            last_layer="to_pixels/rest/kernel",
            first_frame_alone=True,
        )

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b 1+t*p h w 3) in [-1, 1] -> (b 1+t h' w' d)
        return self.bottleneck(self.prequantized(pixels), train)

    def prequantized(self, pixels: Array) -> Array:  # (b 1+t*p h w 3) -> (b 1+t h' w' d), or (... 2d)
        """What the bottleneck reads, float32."""
        z = self.to_codes(self.encoded(pixels)).astype(jnp.float32)
        return unit_norm(z, 1e-12) if self.unit_codes else z

    def encoded(self, pixels: Array) -> Array:  # (b 1+t*p h w 3) -> (b 1+t h' w' c)
        """Tokens of the encoder."""
        pixels = constrain(pixels, "batch", "time", "height", "width", "channel")
        x = self.to_tokens(pixels.astype(self.dtype) / 2)
        return self.pooled(self.encoder_time(self.encoder_space(x)))

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b 1+t h' w' d) -> (b 1+t*p h w 3)
        x = self.unpooled(self.from_codes(latents.astype(self.dtype)))
        x = self.decoder_time(constrain(x, "batch", "time", "height", "width", "channel"))
        return self.to_pixels(self.decoder_space(x)).astype(jnp.float32) * 2

    def indices_to_latents(self, indices: Array) -> Array:  # (b 1+t h' w') -> (b 1+t h' w' d)
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


# ------------------------------------------------------------------------------------------------- from stage to stage


def next_stage(before: Mapping[str, Any], after: Mapping[str, Any], strategy: str = "average") -> dict[str, Any]:
    """Parameters to start a stage with.

    Args:
      before: parameters of the stage before.
      after: parameters of the next stage's model, whose own stay where its network is another one (codes of a VAE).
      strategy: how patches of several frames follow from those of one, where their sizes differ: see `inflated`.
    """
    found = _merged(before, after)
    for part, layers in (("to_tokens", ("norm_in", "dense", "norm_out")), ("to_pixels", ("",))):
        names = [(f"first_{layer}".rstrip("_"), f"rest_{layer}".rstrip("_")) for layer in layers]
        if any(_shapes(before[part][rest]) != _shapes(after[part][rest]) for _, rest in names):
            found[part] = dict(found[part]) | inflated(before[part], after[part], names, strategy)
    return found


def inflated(
    before: Mapping[str, Any], after: Mapping[str, Any], names: list[tuple[str, str]], strategy: str = "average"
) -> dict[str, Any]:
    """Layers of patches of several frames, made of those of one (the authors' ``inflate_gen``).

    What a patch of p frames has more of is repeated p times: ``average`` divides by p, ``first`` keeps the numbers in
    the first place and has zeros in the others.

    Args:
      before: layers of one frame, of the stage before.
      after: of the next stage: their shapes.
      names: of the layers of one and of several frames.
      strategy: one of `STRATEGIES`.
    """
    share = pick("strategy of inflation", strategy, STRATEGIES)

    def repeated(one: Array, shape: tuple[int, ...]) -> Array:
        longer = [axis for axis, (a, b) in enumerate(zip(one.shape, shape, strict=True)) if a != b]
        if not longer:
            return one
        parts = share(shape[longer[0]] // one.shape[longer[0]])
        return jnp.concatenate([one * part for part in parts], axis=longer[0])

    return {
        rest: {leaf: repeated(before[first][leaf], value.shape) for leaf, value in after[rest].items()}
        for first, rest in names
    }


# Factors of the repetitions.
STRATEGIES = {"average": lambda count: [1 / count] * count, "first": lambda count: [1.0] + [0.0] * (count - 1)}


def _merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """``after`` with the arrays of ``before`` where both have one of that name and shape."""
    return {
        name: _merged(before.get(name, {}), value)
        if isinstance(value, Mapping)
        else (before[name] if name in before and before[name].shape == value.shape else value)
        for name, value in after.items()
    }


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in tree.items()}


# ------------------------------------------------------------------------------------------------------------ variants

_VQ = {"bottleneck": {"name": "vq", "codebook_size": 8192, "code_dim": 8, "learning": "ema", "epsilon": 1e-7}}
_VAE = {"bottleneck": {"name": "gaussian"}, "unit_codes": False}
_IMAGES = _VQ | {"patch": (2, 8, 8), "spatial_positions": "none"}
_NOTE = "not causal in time: its positions over time are mixed up"


def _released(name: str, fields: Mapping[str, Any], scores: str) -> Variant:
    return Variant(
        config={**fields, "layout": "scrambled"},
        paper="https://arxiv.org/abs/2406.09399",
        source=f"https://huggingface.co/Daniel0724/OmniTokenizer/blob/main/{name}.ckpt",
        license="MIT",
        note=f"{scores} at 256 x 256; {_NOTE}",
    )


# Trained on images only, with biases that the code of the other releases computes and drops.
_BIASED = {"spatial_positions": "bias", "temporal_positions": "alibi"}

_RELEASES = {
    "imagenet_only": (_IMAGES | _BIASED, "rFID 1.28"),
    "celebahq": (_IMAGES, "rFID 1.85"),
    "ffhq": (_IMAGES, "rFID 2.58"),
    "imagenet_ucf": (_VQ, "rFID 1.11, rFVD 42.35 (17 frames)"),
    "imagenet_k600": (_VQ, "rFID 1.23, rFVD 25.97 (17 frames)"),
    "imagenet_mit": (_VQ, "rFID 1.26, rFVD 19.87 (17 frames)"),
    "imagenet_sthv2": (_VQ, "rFID 1.21, rFVD 20.30 (17 frames)"),
    "celebahq_ucf": (_VQ, "rFID 1.93, rFVD 45.59 (17 frames)"),
    "celebahq_k600": (_VQ, "rFID 1.82, rFVD 89.13 (17 frames)"),
    "ffhq_ucf": (_VQ, "rFID 1.91, rFVD 57.93 (17 frames)"),
    "ffhq_k600": (_VQ, "rFID 2.69, rFVD 87.58 (17 frames)"),
    "imagenet_ucf_vae": (_VAE, "rFID 0.69, rFVD 23.44 (17 frames)"),
    "imagenet_k600_vae": (_VAE, "rFID 0.78, rFVD 13.02 (17 frames)"),
}
VARIANTS = {
    f"omnitokenizer-{name.replace('_', '-')}": _released(name, fields, scores)
    for name, (fields, scores) in _RELEASES.items()
}
