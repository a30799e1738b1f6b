"""Cosmos Tokenizer: images and causal video, continuous and discrete (https://arxiv.org/abs/2501.03575, section 3).

Pixels enter as Haar wavelets. Encoder and decoder then follow one plan (residual levels that resample, a middle with
attention), made of one of three sets of `Layers`:

* ``image``: the 2D network of CI and DI;
* ``factorized``: that of CV and DV. Space and time are convolved and attended to one after the other, and nothing looks
  ahead, so the first frame has a latent of its own and an image is a clip of one frame;
* ``base``: full 3D convolutions. Part of the published code, never released with weights.

The bottleneck is the identity (C), a diagonal Gaussian, FSQ (D) or residual FSQ.

Streaming: convolutions keep two frames of history. The temporal attention of the middle sees the whole past, so its
keys and values grow with the clip (and every chunk is a program of its own) unless ``attention_window`` bounds them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..errors import pick, unknown
from ..nn.attention import SpatialAttention, TemporalAttention
from ..nn.blocks import AttentionBlock, ResBlock
from ..nn.conv import CausalConv3d, Conv2d, Conv3d, FactorizedConv3d, starts_clip
from ..nn.norm import GroupNorm
from ..nn.resample import (
    CausalDepthToSpace,
    CausalSpaceToDepth,
    Downsample,
    Upsample,
    average_pool,
    causal_average_pool_time,
    causal_upsample_time,
    depth_to_space,
    space_to_depth,
    upsample_nearest,
)
from ..nn.wavelet import CausalHaar3d, InverseCausalHaar3d, haar_2d, inverse_haar_2d
from ..parallel.constrain import constrain
from ..quantize.fsq import FSQ
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "cosmos"

Factors = tuple[int, int]  # (time, space)
PATCHERS = ("haar", "rearrange")
SCHEDULES = ("late", "legacy")


# ----------------------------------------------------------------------------------------- layers of the video networks


class FactorizedAttention(nn.Module):
    """Attention over the positions of each frame, then over the past of each position; no position encoding."""

    window: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> same
        norm = functools.partial(GroupNorm, num_groups=1, per_frame=True, dtype=self.dtype)
        space = functools.partial(SpatialAttention, dtype=self.dtype)
        time = functools.partial(TemporalAttention, window=self.window, dtype=self.dtype)
        x = AttentionBlock(space, norm, name="spatial")(x)
        return AttentionBlock(time, norm, name="temporal")(x)


class TimePool(nn.Module):
    """Mean of every two frames, the first passing alone; a last frame without a partner is dropped. Streams."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+2k h w c) -> (b 1+k h w c)
        first = starts_clip(self)
        pairs = (x.shape[1] - first) // 2
        return causal_average_pool_time(x[:, : first + 2 * pairs], 2, first_frame_alone=first)


class TimeRepeat(nn.Module):
    """Every frame but the first twice. Streams."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+k h w c) -> (b 1+2k h w c)
        return causal_upsample_time(x, 2, first_frame_alone=starts_clip(self))


class HybridDownsample(nn.Module):
    """Strided convolution plus average pooling, in space, then in time; then a 1x1x1 convolution. Streams."""

    features: int
    factors: Factors
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+k*f h w c) -> (b 1+k h/s w/s c)
        time, space = self.factors
        if space == 2:
            pads = ((0, 0), (0, 1), (0, 1))
            conv = Conv3d(self.features, (1, 3, 3), (1, 2, 2), padding=pads, dtype=self.dtype, name="conv1")
            x = conv(x) + average_pool(x, (2, 2))
        if time == 2:
            conv = CausalConv3d(self.features, (3, 1, 1), (2, 1, 1), dtype=self.dtype, name="conv2")
            x = conv(x) + TimePool(name="pool")(x)
        return CausalConv3d(self.features, 1, dtype=self.dtype, name="conv3")(x)


class HybridUpsample(nn.Module):
    """Repetition plus a convolution of it, in time, then in space; then a 1x1x1 convolution. Streams."""

    features: int
    factors: Factors
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+k h w c) -> (b 1+k*f s*h s*w c)
        time, space = self.factors
        if time == 2:
            x = TimeRepeat(name="repeat")(x)
            x = x + CausalConv3d(self.features, (3, 1, 1), dtype=self.dtype, name="conv1")(x)
        if space == 2:
            conv = Conv3d(self.features, (1, 3, 3), repeats=(1, 2, 2), dtype=self.dtype, name="conv2")
            x = upsample_nearest(x, (2, 2)) + conv(x)
        return CausalConv3d(self.features, 1, dtype=self.dtype, name="conv3")(x)


class BaseDownsample(nn.Module):
    """3x3x3 convolution ``conv`` with stride 2, padded below, on the right and in the past. Streams."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+2k h w c) -> (b 1+k h/2 w/2 c)
        return CausalConv3d(self.features, 3, 2, ((0, 1), (0, 1)), dtype=self.dtype, name="conv")(x)


class BaseUpsample(nn.Module):
    """Repetition in space and time, then a 3x3x3 convolution ``conv``. Streams.

    The published code convolves before it drops the first frame's copy; with that frame repeated in front, too, the
    numbers are the same.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b 1+k h w c) -> (b 1+2k 2h 2w c)
        x = TimeRepeat(name="repeat")(x)
        return CausalConv3d(self.features, repeats=(1, 2, 2), dtype=self.dtype, name="conv")(x)


# -------------------------------------------------------------------------------------------------- the three networks


@dataclasses.dataclass(frozen=True)
class Layers:
    """What makes the one plan of `Encoder` and `Decoder` a 2D, a factorized or a full 3D network.

    Attributes:
      conv, point: convolutions of three and of one element per axis, ``conv(features, name=...)``.
      norm, attention: ``norm(name=...)``; the attention includes its norm and its skip connection.
      down, up: by (time, space) factors, ``down[2, 2](features, name=...)``.
      patch, unpatch: pixels to wavelet bands (or blocks of pixels) and back.
    """

    conv: Callable[..., nn.Module]
    point: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]
    down: Mapping[Factors, Callable[..., nn.Module]]
    up: Mapping[Factors, Callable[..., nn.Module]]
    patch: Callable[[Array], Array]
    unpatch: Callable[[Array], Array]


def image_layers(net: _Network) -> Layers:
    """2D convolutions, group norm, attention over the positions."""
    norm = functools.partial(GroupNorm, num_groups=net.num_groups, dtype=net.dtype)
    attention = functools.partial(SpatialAttention, dtype=net.dtype)
    conv = functools.partial(Conv2d, dtype=net.dtype)
    patch, unpatch = _patchers_2d(net.patcher, net.patch)
    return Layers(
        conv=conv,
        point=functools.partial(conv, kernel_size=1),
        norm=norm,
        attention=functools.partial(AttentionBlock, attention, norm),
        down={(1, 2): functools.partial(Downsample, dtype=net.dtype)},
        up={(1, 2): functools.partial(Upsample, dtype=net.dtype)},
        patch=patch,
        unpatch=unpatch,
    )


def factorized_layers(net: _Network) -> Layers:
    """Space, then time; a norm with the statistics of each frame; every layer causal."""
    steps = ((1, 2), (2, 1), (2, 2))
    patch, unpatch = _patchers_3d(net.patcher, net.patch)
    return Layers(
        conv=functools.partial(FactorizedConv3d, dtype=net.dtype),
        point=functools.partial(CausalConv3d, kernel_size=1, dtype=net.dtype),
        norm=functools.partial(GroupNorm, num_groups=1, per_frame=True, dtype=net.dtype),
        attention=functools.partial(FactorizedAttention, net.attention_window, net.dtype),
        down={step: functools.partial(HybridDownsample, factors=step, dtype=net.dtype) for step in steps},
        up={step: functools.partial(HybridUpsample, factors=step, dtype=net.dtype) for step in steps},
        patch=patch,
        unpatch=unpatch,
    )


def base_layers(net: _Network) -> Layers:
    """3x3x3 convolutions; with several norm groups the statistics are the clip's, and the network is not causal."""
    norm = functools.partial(GroupNorm, num_groups=net.num_groups, per_frame=net.num_groups == 1, dtype=net.dtype)
    attention = functools.partial(SpatialAttention, dtype=net.dtype)
    conv = functools.partial(CausalConv3d, dtype=net.dtype)
    patch, unpatch = _patchers_2d(net.patcher, net.patch)
    return Layers(
        conv=conv,
        point=functools.partial(conv, kernel_size=1),
        norm=norm,
        attention=functools.partial(AttentionBlock, attention, norm),
        down={
            (2, 2): functools.partial(BaseDownsample, dtype=net.dtype),
            (2, 1): lambda features, name: TimePool(name=name),
        },
        up={
            (2, 2): functools.partial(BaseUpsample, dtype=net.dtype),
            (2, 1): lambda features, name: TimeRepeat(name=name),
        },
        patch=patch,
        unpatch=unpatch,
    )


NETWORKS = {"image": image_layers, "factorized": factorized_layers, "base": base_layers}


def _patchers_2d(patcher: str, patch: int) -> tuple[Callable, Callable]:
    """Of every image or frame."""
    if patcher == "haar":
        options = {"levels": _log2(patch), "scale": "average"}
        return functools.partial(haar_2d, **options, odd="reflect"), functools.partial(inverse_haar_2d, **options)
    options = {"factors": (patch, patch), "order": "channel_outer"}
    return functools.partial(space_to_depth, **options), functools.partial(depth_to_space, **options)


def _patchers_3d(patcher: str, patch: int) -> tuple[Callable, Callable]:
    """Of a clip; the first frame, repeated, fills a block of its own."""
    if patcher == "haar":
        options = {"levels": _log2(patch), "scale": "average"}
        return (
            lambda x: CausalHaar3d(**options, odd="reflect", name="patcher")(x),
            lambda x: InverseCausalHaar3d(**options, name="unpatcher")(x),
        )
    options = {"factors": (patch, patch, patch), "order": "channel_outer"}
    return (
        lambda x: CausalSpaceToDepth(**options, name="patcher")(x),
        lambda x: CausalDepthToSpace(**options, name="unpatcher")(x),
    )


def _log2(number: int) -> int:
    if number < 1 or number & (number - 1):
        raise ValueError(f"patch and compression must be powers of two; got {number}.")
    return number.bit_length() - 1


# -------------------------------------------------------------------------------------------------- where they resample


def down_factors(network: str, compression: Factors, patch: int, levels: int) -> tuple[Factors, ...]:
    """(time, space) factor at the end of each encoder level, from fine to coarse.

    Args:
      network: one of `NETWORKS`.
      compression: of the tokenizer, (time, space), its patches included; ``base`` has only one and ignores it.
      patch: side of the patches.
      levels: number of levels.
    """
    if network == "base":
        return ((2, 2),) * (levels - 1) + ((2, 1),)
    time, space = (_log2(factor) - _log2(patch) for factor in compression)
    if network == "image":
        return tuple((1, 1 + (level < space)) for level in range(levels))
    return tuple((1 + (level < time), 1 + (level < space)) for level in range(levels - 1)) + ((1, 1),)


def up_factors(network: str, compression: Factors, patch: int, levels: int, schedule: str) -> tuple[Factors, ...]:
    """The same for the decoder's levels, from fine to coarse; it runs them from coarse to fine.

    The factorized decoder is no mirror of its encoder: time is upsampled ``late``, from the second of its levels on,
    or with ``legacy`` from the first.
    """
    if network == "base":
        return ((2, 1),) + ((2, 2),) * (levels - 1)
    time, space = (_log2(factor) - _log2(patch) for factor in compression)
    if network == "image":
        return tuple((1, 1 + (level >= levels - space)) for level in range(levels))
    first = pick("schedule of the decoder", schedule, dict(zip(SCHEDULES, (1, 0), strict=True)))
    factors = []
    for rank in range(levels - 1):  # from coarse to fine
        in_time = first <= rank < first + time
        in_space = in_time or (rank < space and space > time)
        factors.append((1 + in_time, 1 + in_space))
    return ((1, 1), *reversed(factors))


# ----------------------------------------------------------------------------------------------------- encoder, decoder


class _Network(nn.Module):
    """Fields of both halves, those of `Model`; ``resample`` has the factors of each level."""

    network: str
    out_channels: int
    channels: int
    multipliers: tuple[int, ...]
    resample: tuple[Factors, ...]
    attention: tuple[int, ...]
    blocks: int
    z_channels: int
    patch: int
    patcher: str
    num_groups: int
    attention_window: int | None
    remat: bool
    dtype: Any

    def level(self, layers: Layers, x: Array, name: str, level: int, blocks: int) -> Array:
        """Residual blocks, with attention after each where the level has it."""
        for j in range(blocks):
            x = self.block(layers, self.channels * self.multipliers[level], f"{name}_block_{j}")(x)
            if level in self.attention:
                x = layers.attention(name=f"{name}_attn_{j}")(x)
        return x

    def middle(self, layers: Layers, x: Array) -> Array:
        width = self.channels * self.multipliers[-1]
        x = self.block(layers, width, "mid_block_1")(x)
        x = layers.attention(name="mid_attn_1")(x)
        return self.block(layers, width, "mid_block_2")(x)

    def block(self, layers: Layers, features: int, name: str) -> nn.Module:
        block = nn.remat(ResBlock) if self.remat else ResBlock
        return block(features, layers.conv, layers.norm, shortcut=layers.point, name=name)

    def head(self, layers: Layers, x: Array, channels: int) -> Array:
        return layers.conv(channels, name="conv_out")(nn.swish(layers.norm(name="norm_out")(x)))


class Encoder(_Network):
    """Pixels to the bottleneck's input."""

    @nn.compact
    def __call__(self, pixels: Array) -> Array:  # (b [1+k*f] h w c) -> (b [1+k] h' w' d)
        layers = NETWORKS[self.network](self)
        x = layers.conv(self.channels, name="conv_in")(layers.patch(pixels.astype(self.dtype)))
        for level, factors in enumerate(self.resample):
            x = self.level(layers, x, f"down_{level}", level, self.blocks)
            if factors != (1, 1):
                x = layers.down[factors](x.shape[-1], name=f"down_{level}_downsample")(x)
        x = self.head(layers, self.middle(layers, x), self.z_channels)
        return layers.point(self.out_channels, name="quant_conv")(x)


class Decoder(_Network):
    """Latents to pixels."""

    @nn.compact
    def __call__(self, latents: Array) -> Array:  # (b [1+k] h' w' d) -> (b [1+k*f] h w c)
        layers = NETWORKS[self.network](self)
        x = layers.point(self.z_channels, name="post_quant_conv")(latents.astype(self.dtype))
        x = layers.conv(self.channels * self.multipliers[-1], name="conv_in")(x)
        x = self.middle(layers, x)
        for level, factors in reversed(list(enumerate(self.resample))):
            x = self.level(layers, x, f"up_{level}", level, self.blocks + 1)
            if factors != (1, 1):
                x = layers.up[factors](x.shape[-1], name=f"up_{level}_upsample")(x)
        bands = self.patch ** (3 if self.network == "factorized" else 2)
        x = self.head(layers, x, self.out_channels * bands)
        return layers.unpatch(x).astype(jnp.float32)


class Model(nn.Module):
    """Encoder, bottleneck, decoder. The defaults are those of the released DV8x16x16.

    The module takes any number of frames, as the published code does: 1 + k * compression fit, others are filled up by
    the reflection of the Haar transform.

    Attributes:
      bottleneck: any module of ``tokenizers/quantize``.
      latent_channels: channels of the latents, or of the codes.
      network: ``image``, ``factorized`` or ``base``, of the encoder.
      decoder_network: of the decoder; ``None`` is ``network``.
      compression: pixels per latent, (time, space). Images have time 1; ``base`` ignores it.
      patch: side of the patches in which pixels enter and leave.
      patcher: ``haar``, or ``rearrange`` (blocks of pixels as they are).
      channels: width that the multipliers multiply.
      encoder_multipliers, decoder_multipliers: one per level, from fine to coarse.
      encoder_attention, decoder_attention: levels that have attention after each block (the middle always has it).
      blocks: residual blocks per level of the encoder; the decoder has one more.
      z_channels: channels between the networks and the 1x1 convolutions around the bottleneck; twice as many on the
        encoder's side where the bottleneck reads mean and log-variance.
      num_groups: of the group norms of ``image`` and ``base``.
      schedule: where the factorized decoder upsamples time: ``late`` or ``legacy``, see `up_factors`.
      attention_window: latent frames that the temporal attention sees, the present one included; ``None`` is the whole
        past, as trained. A number is an approximation that makes streaming state constant; it applies to whole clips
        alike, so that chunks still give what the whole clip gives, and changes nothing in clips of that many latents.
      remat: recompute residual blocks in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = FSQ((8, 8, 8, 5, 5, 5))
    latent_channels: int = 6
    network: str = "factorized"
    decoder_network: str | None = None
    compression: Factors = (8, 16)
    patch: int = 4
    patcher: str = "haar"
    channels: int = 128
    encoder_multipliers: tuple[int, ...] = (2, 4, 4)
    decoder_multipliers: tuple[int, ...] = (2, 4, 4)
    encoder_attention: tuple[int, ...] = ()
    decoder_attention: tuple[int, ...] = ()
    blocks: int = 2
    z_channels: int = 16
    num_groups: int = 32
    schedule: str = "late"
    attention_window: int | None = None
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        kinds = self._kinds()
        width = self.bottleneck.input_channels(self.latent_channels)
        shared = {
            name: getattr(self, name)
            for name in ("channels", "blocks", "patch", "patcher", "num_groups", "attention_window", "remat", "dtype")
        }
        # The names say which network it is: its tensors have other shapes and official names.
        encoder = Encoder(
            network=kinds[0],
            out_channels=width,
            multipliers=self.encoder_multipliers,
            resample=self._down(),
            attention=self.encoder_attention,
            z_channels=self.z_channels * width // self.latent_channels,
            **shared,
        )
        decoder = Decoder(
            network=kinds[1],
            out_channels=3,
            multipliers=self.decoder_multipliers,
            resample=up_factors(kinds[1], self.compression, self.patch, len(self.decoder_multipliers), self.schedule),
            attention=self.decoder_attention,
            z_channels=self.z_channels,
            **shared,
        )
        setattr(self, f"{kinds[0]}_encoder", encoder)
        setattr(self, f"{kinds[1]}_decoder", decoder)

    def _kinds(self) -> tuple[str, str]:
        """Networks of encoder and decoder."""
        kinds = (self.network, self.decoder_network or self.network)
        for kind in kinds:
            pick("network", kind, NETWORKS)
        if (kinds[0] == "image") != (kinds[1] == "image"):
            raise ValueError(f"network {kinds[0]!r} and decoder_network {kinds[1]!r}: images and clips do not mix.")
        if self.patcher not in PATCHERS:
            raise unknown("patcher", self.patcher, PATCHERS)
        return kinds

    def _down(self) -> tuple[Factors, ...]:
        return down_factors(self.network, self.compression, self.patch, len(self.encoder_multipliers))

    @property
    def spec(self) -> Spec:
        encoder, decoder = self._kinds()
        time, space = (math.prod(factors) for factors in zip(*self._down(), strict=True))
        return Spec(
            compression=(
                time * (self.patch if encoder == "factorized" else 1),
                space * self.patch,
                space * self.patch,
            ),
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            codebooks=getattr(self.bottleneck, "codebooks", 1),
            causal="base" not in (encoder, decoder) or self.num_groups == 1,
            video=encoder != "image",
            last_layer=f"{decoder}_decoder/conv_out/{'temporal/' * (decoder == 'factorized')}kernel",
            first_frame_alone=encoder != "image",
        )

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b [t] h w 3) in [-1, 1]
        encoder = getattr(self, f"{self._kinds()[0]}_encoder")
        return self.bottleneck(encoder(_placed(pixels)).astype(jnp.float32), train)

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b [t'] h' w' d) -> (b [t] h w 3)
        decoder = getattr(self, f"{self._kinds()[1]}_decoder")
        return decoder(_placed(latents))

    def indices_to_latents(self, indices: Array) -> Array:  # (b [t'] h' w') -> (b [t'] h' w' d)
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


def _placed(x: Array) -> Array:
    time = ("time",) if x.ndim == 5 else ()
    return constrain(x, "batch", *time, "height", "width", "channel")


# ------------------------------------------------------------------------------------------------------ released sizes

_CONTINUOUS = {"bottleneck": {"name": "identity"}, "latent_channels": 16}
_DISCRETE = {"bottleneck": {"name": "fsq", "levels": (8, 8, 8, 5, 5, 5)}, "latent_channels": 6}
_SOURCES = {
    "0.1": "https://huggingface.co/nvidia/Cosmos-0.1-Tokenizer-",
    "1.0": "https://huggingface.co/nvidia/Cosmos-1.0-Tokenizer-",
    "tokenize1": "https://huggingface.co/nvidia/Cosmos-Tokenize1-",
}


def _variant(release: str, size: str, **fields: Any) -> Variant:
    """A released size, ``DV8x16x16``: kind, then compression of time (videos) and space."""
    discrete, video = size[0] == "D", size[1] == "V"
    steps = tuple(int(number) for number in size[2:].split("-")[0].split("x"))
    config = {
        **(_DISCRETE if discrete else _CONTINUOUS),
        "network": "factorized" if video else "image",
        "compression": (steps[0] if video else 1, steps[-1]),
        "patch": 4,
        # The first discrete image tokenizers are wider before the 1x1 convolution to their six channels.
        "z_channels": 256 if discrete and not video else 16,
    }
    return Variant(
        config=config | fields,
        paper="https://arxiv.org/abs/2501.03575",
        source=_SOURCES[release] + size,
        license="NVIDIA Open Model License",
        note="autoencoder.jit (0.1, 1.0) or model.pt (Tokenize1) holds both halves",
    )


# CV4x8x8 of 0.1 was released with two levels, unlike every other size.
_TWO_LEVELS = {"encoder_multipliers": (2, 4), "decoder_multipliers": (2, 4)}
_SMALL = {"patch": 2}  # Tokenize1 for 360p

VARIANTS = {
    "cosmos-ci8x8": _variant("0.1", "CI8x8"),
    "cosmos-ci16x16": _variant("0.1", "CI16x16"),
    "cosmos-di8x8": _variant("0.1", "DI8x8"),
    "cosmos-di16x16": _variant("0.1", "DI16x16"),
    "cosmos-cv4x8x8": _variant("0.1", "CV4x8x8", **_TWO_LEVELS),
    "cosmos-cv8x8x8": _variant("0.1", "CV8x8x8"),
    "cosmos-cv8x16x16": _variant("0.1", "CV8x16x16"),
    "cosmos-dv4x8x8": _variant("0.1", "DV4x8x8"),
    "cosmos-dv8x8x8": _variant("0.1", "DV8x8x8"),
    "cosmos-dv8x16x16": _variant("0.1", "DV8x16x16"),
    "cosmos-1.0-cv8x8x8": _variant("1.0", "CV8x8x8"),
    "cosmos-1.0-dv8x16x16": _variant("1.0", "DV8x16x16"),
    "cosmos-tokenize1-cv8x8x8-720p": _variant("tokenize1", "CV8x8x8-720p"),
    "cosmos-tokenize1-dv8x16x16-720p": _variant("tokenize1", "DV8x16x16-720p"),
    "cosmos-tokenize1-cv4x8x8-360p": _variant("tokenize1", "CV4x8x8-360p", **_SMALL),
    "cosmos-tokenize1-dv4x8x8-360p": _variant("tokenize1", "DV4x8x8-360p", **_SMALL, z_channels=256),
    "cosmos-tokenize1-ci8x8-360p": _variant("tokenize1", "CI8x8-360p", **_SMALL),
    "cosmos-tokenize1-ci16x16-360p": _variant("tokenize1", "CI16x16-360p", **_SMALL),
    "cosmos-tokenize1-di8x8-360p": _variant("tokenize1", "DI8x8-360p", **_SMALL),
    # Its published config does not say so, but its weights are for norms over all channels.
    "cosmos-tokenize1-di16x16-360p": _variant("tokenize1", "DI16x16-360p", **_SMALL, num_groups=1),
}
