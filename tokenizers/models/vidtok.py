"""VidTok (https://arxiv.org/abs/2412.13061): spatial and temporal sampling apart, KL or FSQ, causal or not.

Every level has pairs of a 2D residual block (each frame) and a 1D one (each pixel over time); 3D convolutions are left
to the ends and the middle. Time is halved and doubled by blending an average (or interpolation) with a convolution,
with one learned weight (the "AlphaBlender"). Three families share all of it and differ in what stands at the ends of
the time axis, which is one value of `TIME`:

* ``causal`` (v1.0): zeros in front of every layer. f - 1 copies of the first frame go in front of a clip whose length
  is no multiple of f (4; 2, 8), and f - 1 frames are always dropped after decoding: 1 + k f frames fit.
* ``noncausal``: zeros on both sides; multiples of f frames.
* ``causal-v1.1``: copies of each layer's first frame in front, so that clips of any length fit: the first frame fills
  the clip up to a multiple of f, and decoding gives those frames too. Time is doubled linearly, which looks one latent
  frame ahead; frames of the first latent are interpolated apart from the rest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .. import errors
from ..nn.attention import SpatialAttention
from ..nn.blocks import AttentionBlock, ResBlock
from ..nn.conv import STREAM, CausalConv3d, Conv2d, Conv3d, starts_clip, streams
from ..nn.local import InSteps, Step, halo
from ..nn.norm import GroupNorm, LayerNorm, group_normalize
from ..nn.resample import Downsample, Upsample, repeat_first_frame, upsample_nearest
from ..parallel.constrain import constrain
from ..quantize.fsq import FSQ
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "vidtok"

_AXES = ("batch", "time", "height", "width", "channel")
# PyTorch's default, with which the authors start.
_KERNEL = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


# ------------------------------------------------------------------------------------- what the families do with time


class FrameBefore(nn.Module):
    """One more frame in front: the last one of the chunk before; at the start of a clip zeros or the first frame."""

    mode: str

    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b 1+t h w c)
        edge = jnp.zeros_like(x[:, :1]) if self.mode == "zeros" else x[:, :1]
        before = self.get_variable(STREAM, "history", edge).astype(x.dtype)
        if streams(self):
            self.put_variable(STREAM, "history", x[:, -1:])
        return jnp.concatenate([before, x], axis=1)


def _between(x: Array) -> Array:
    """(b t h w c) -> (b 2t-2 h w c): the values a quarter and three quarters of the way to each next frame."""
    a, b = x[:, :-1], x[:, 1:]
    pairs = jnp.stack([0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b], axis=2)
    return pairs.reshape(x.shape[0], -1, *x.shape[2:])


def double_linearly(x: Array) -> Array:
    """Twice the frames, linearly and with the ends held, like PyTorch's ``trilinear``: (b t h w c) -> (b 2t h w c)."""
    return _between(jnp.concatenate([x[:, :1], x, x[:, -1:]], axis=1))[:, 1:-1]


class LinearTime(nn.Module):
    """`double_linearly` of the first latent's frames, and of all the others: nothing blends over that border.

    Streams exactly: a frame that waits for its right neighbour comes with the next chunk. The call that leaves no
    history is the last of its clip and gives the rest. So the first call after the first latent gives one frame less
    than twice what it gets, the ones after it twice, the last one more.

    Attributes:
      first: frames of the first latent at this level.
    """

    first: int

    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b about 2t h w c)
        parts = []
        if starts_clip(self):
            parts, x = [double_linearly(x[:, : self.first])], x[:, self.first :]
        if x.shape[1]:
            begins, ends = not self.has_variable(STREAM, "last"), not streams(self)
            before = self.get_variable(STREAM, "seam", x[:, :1]) if begins else self.get_variable(STREAM, "last")
            x = jnp.concatenate([before.astype(x.dtype), x, *[x[:, -1:]] * ends], axis=1)
            if not ends:
                self.put_variable(STREAM, "last", x[:, -1:])
            y = _between(x)
            parts.append(y[:, int(begins) : y.shape[1] - int(ends)])
        return jnp.concatenate(parts, axis=1)


class OverlappingTiles(LinearTime):
    """What the authors' code does with overlapping tiles: the left neighbour of the second latent's first frame.

    It is the last frame of the second latent, as their first tile, two latents, has it. The call that sees these two
    leaves it in ``stream`` as ``seam``; a stream that starts with nothing but the seams then gives their numbers.
    """

    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b about 2t h w c)
        if self.has_variable(STREAM, "seam") or not streams(self):
            return super().__call__(x)
        self.put_variable(STREAM, "seam", x[:, -1:])
        return jnp.concatenate([double_linearly(part) for part in (x[:, : self.first], x[:, self.first :])], axis=1)


class SeparateTiles(nn.Module):
    """What the authors' code does with tiles that do not overlap: neighbours one latent too old, right ends held."""

    first: int

    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b 2t h w c)
        n = self.first
        if starts_clip(self):
            parts = [double_linearly(part) for part in (x[:, :n], x[:, n:]) if part.shape[1]]
            cache, y = x[:, -n:], jnp.concatenate(parts, axis=1)
        else:
            x = jnp.concatenate([self.get_variable(STREAM, "cache").astype(x.dtype), x], axis=1)
            cache, y = x[:, -2 * n : -n], double_linearly(x)[:, 2 * n :]
        if streams(self):
            self.put_variable(STREAM, "cache", cache)
        return y


def _nearest(first: int, name: str) -> Callable[[Array], Array]:
    del first, name
    return functools.partial(upsample_nearest, factors=(2, 1, 1))


def _fill_by_all_but_one(x: Array, factor: int, first: bool) -> Array:
    if x.shape[1] % factor == 0:
        return x
    if not first:
        raise ValueError(f"a later chunk holds {x.shape[1]} frames; accepted: multiples of {factor}.")
    return repeat_first_frame(x, factor - 1)


def _fill_to_a_multiple(x: Array, factor: int, first: bool) -> Array:
    del first
    return repeat_first_frame(x, -x.shape[1] % factor)


def _at_least_one_latent(x: Array, factor: int, first: bool) -> Array:
    del first
    if x.shape[1] < factor:
        raise ValueError(f"the non-causal models need at least {factor} frames; got {x.shape[1]}.")
    return x


@dataclasses.dataclass(frozen=True)
class Time:
    """A family's treatment of the time axis.

    Attributes:
      conv: a convolution of stride one that keeps the number of frames.
      extend: the frame that halving needs besides: ``extend(x)`` is what average and convolution both read.
      double: ``double(frames of the first latent, name)`` gives a function that doubles the number of frames.
      fill: ``fill(pixels, factor, whether the clip starts here)`` gives what the encoder reads.
      drops: decoding a clip drops all but the last frame of its first latent.
      causal, fills_front, lookahead: see `Spec`.
    """

    conv: Callable[..., nn.Module]
    extend: Callable[[Array], Array]
    double: Callable[[int, str], Callable[[Array], Array]]
    fill: Callable[[Array, int, bool], Array]
    drops: bool = False
    causal: bool = True
    fills_front: bool = False
    lookahead: int = 0


_V1_0 = Time(
    conv=functools.partial(CausalConv3d, time_mode="zeros"),
    extend=lambda x: FrameBefore("zeros", name="before")(x),
    double=_nearest,
    fill=_fill_by_all_but_one,
    drops=True,
)
_V1_1 = Time(
    conv=functools.partial(CausalConv3d, time_mode="replicate"),
    extend=lambda x: FrameBefore("replicate", name="before")(x),
    double=lambda first, name: LinearTime(first, name=name),
    fill=_fill_to_a_multiple,
    fills_front=True,
    lookahead=1,
)
TIME: Mapping[str, Time] = {
    "causal": _V1_0,
    "noncausal": Time(
        conv=Conv3d,
        extend=lambda x: jnp.pad(x, ((0, 0), (0, 1), *((0, 0),) * 3)),
        double=_nearest,
        fill=_at_least_one_latent,
        causal=False,
    ),
    "causal-v1.1": _V1_1,
    "causal-v1.1-nearest": dataclasses.replace(_V1_1, double=_nearest, lookahead=0),
    # The authors' own tiles, which depart from the whole clip: see `evaluate/temporal_tiles.py`.
    "causal-v1.1-overlap": dataclasses.replace(_V1_1, double=lambda first, name: OverlappingTiles(first, name=name)),
    "causal-v1.1-separate": dataclasses.replace(
        _V1_1, double=lambda first, name: SeparateTiles(first, name=name), lookahead=0
    ),
}


# --------------------------------------------------------------------------------------------------------------- norms


class _GroupNormOverTime(GroupNorm):
    """Group norm of the 1D blocks: over the time of each pixel, or in causal models of each position alone."""

    causal: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> same
        rows = x[:, :, :, :, None] if self.causal else x.transpose(0, 2, 3, 1, 4)
        y = group_normalize(rows.reshape(-1, *rows.shape[-2:]), self.num_groups, epsilon=self.epsilon)
        y = y.reshape(rows.shape)
        return self.finish(y[:, :, :, :, 0] if self.causal else y.transpose(0, 3, 1, 2, 4), x)


@dataclasses.dataclass(frozen=True)
class Norms:
    """``norms.space(name=...)`` and so on: the normalizations of 2D blocks, of 1D blocks, and of all that is 3D.

    ``local``: each position is normalized alone.
    """

    space: Callable[..., nn.Module]
    time: Callable[..., nn.Module]
    both: Callable[..., nn.Module]
    local: bool = False


def _layer_norms(causal: bool, dtype: Any) -> Norms:
    norm = functools.partial(LayerNorm, dtype=dtype)
    return Norms(norm, norm, norm, local=True)


def _group_norms(causal: bool, dtype: Any) -> Norms:
    return Norms(
        space=functools.partial(GroupNorm, per_frame=True, dtype=dtype),
        time=functools.partial(_GroupNormOverTime, causal=causal, dtype=dtype),
        both=functools.partial(GroupNorm, per_frame=causal, dtype=dtype),
    )


NORMS = {"layernorm": _layer_norms, "groupnorm": _group_norms}


# ------------------------------------------------------------------------------------------------------------- network


class HalveTime(nn.Module):
    """``a * average + (1 - a) * convolution``, both over three frames at every second one; a = sigmoid(mix)."""

    features: int
    time: Time
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b t/2 h w c)
        x = self.time.extend(x)
        count = (x.shape[1] - 1) // 2
        average = sum(x[:, i : i + 2 * count - 1 : 2] for i in range(3)) / 3
        conv = Conv3d(
            self.features,
            strides=(2, 1, 1),
            padding=(0, 1, 1),
            dtype=self.dtype,
            kernel_init=_KERNEL,
            name="conv",
        )(x)
        return _blend(self, average, conv)


class DoubleTime(nn.Module):
    """``a * u + (1 - a) * convolution of u``, u being twice the frames of x; a = sigmoid(mix)."""

    features: int
    first: int
    time: Time
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b 2t h w c)
        x = self.time.double(self.first, "double")(x)
        conv = self.time.conv(self.features, dtype=self.dtype, kernel_init=_KERNEL, name="conv")(x)
        return _blend(self, x, conv)


def _blend(module: nn.Module, fixed: Array, learned: Array) -> Array:
    mix = module.param("mix", nn.initializers.constant(2.0), (1,), jnp.float32)
    alpha = nn.sigmoid(mix).astype(fixed.dtype)
    return alpha * fixed + (1 - alpha) * learned


class _Network(InSteps):
    """Fields and blocks of encoder and decoder; fields as in `Model`."""

    out_channels: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    space_levels: tuple[int, ...]
    time_levels: tuple[int, ...]
    time: Time
    norms: Norms
    dtype: Any
    remat: bool

    def block(self, *args: Any, **kwargs: Any) -> nn.Module:
        return (nn.remat(ResBlock) if self.remat else ResBlock)(*args, **kwargs)

    def conv3d(self, features: int, name: str) -> nn.Module:
        return self.time.conv(features, dtype=self.dtype, kernel_init=_KERNEL, name=name)

    def level(self, level: int, count: int) -> Step:
        """``count`` times a block of each frame, two convolutions, and one of each pixel over time."""
        return Step(functools.partial(self.pairs, level, count), self.reach(2 * count))

    def reach(self, convolutions: int) -> int | None:
        """That of so many of 3x3 and their norms."""
        return convolutions if self.norms.local else None

    def pairs(self, level: int, count: int, x: Array) -> Array:
        features = self.channels * self.multipliers[level]
        space = functools.partial(Conv2d, dtype=self.dtype, kernel_init=_KERNEL)
        over_time = functools.partial(self.time.conv, kernel_size=(3, 1, 1), dtype=self.dtype)
        first, last = (
            functools.partial(over_time, kernel_init=_KERNEL),
            functools.partial(over_time, kernel_init=nn.initializers.zeros_init()),
        )
        for i in range(count):
            x = self.block(features, space, self.norms.space, name=f"level{level}_space{i}")(x)
            x = self.block(features, first, self.norms.time, last=last, name=f"level{level}_time{i}")(x)
        return x

    def middle(self, x: Array) -> Array:
        features = x.shape[-1]
        conv = functools.partial(self.time.conv, dtype=self.dtype, kernel_init=_KERNEL)
        attention = functools.partial(SpatialAttention, dtype=self.dtype)
        x = self.block(features, conv, self.norms.both, name="middle_block1")(x)
        x = AttentionBlock(attention, self.norms.both, name="middle_attention")(x)
        return self.block(features, conv, self.norms.both, name="middle_block2")(x)

    def end(self, x: Array) -> Array:
        return self.conv3d(self.out_channels, "conv_out")(nn.swish(self.norms.both(name="norm_out")(x)))

    def resampled(self, kind: Callable[..., nn.Module], name: str, x: Array) -> Array:
        """``kind`` keeps the channels."""
        return kind(x.shape[-1], dtype=self.dtype, name=name)(x)


class Encoder(_Network):
    """Pixels to the bottleneck's input: (b t h w 3) -> (b t' h' w' d)."""

    def steps(self) -> list[Step]:
        steps = [Step(self.begin, 1)]
        for level in range(len(self.multipliers)):
            steps.append(self.level(level, self.blocks))
            if level in self.space_levels:
                halve = functools.partial(Downsample, kernel_init=_KERNEL)
                steps.append(Step(functools.partial(self.resampled, halve, f"level{level}_halve_space"), 1, down=2))
            if level in self.time_levels:
                halve = functools.partial(HalveTime, time=self.time)
                steps.append(Step(functools.partial(self.resampled, halve, f"level{level}_halve_time"), 1))
        return [*steps, Step(self.middle, None), Step(self.end, self.reach(1))]

    def begin(self, pixels: Array) -> Array:
        x = self.time.fill(pixels.astype(self.dtype), 2 ** len(self.time_levels), starts_clip(self))
        return self.conv3d(self.channels, "conv_in")(x)


class Decoder(_Network):
    """Latents to pixels: (b t' h' w' d) -> (b t h w 3)."""

    def steps(self) -> list[Step]:
        steps, first = [Step(self.begin, 1), Step(self.middle, None)], 1
        for level in reversed(range(len(self.multipliers))):
            steps.append(self.level(level, self.blocks + 1))
            if level in self.space_levels:
                double = functools.partial(Upsample, kernel_init=_KERNEL)
                steps.append(Step(functools.partial(self.resampled, double, f"level{level}_double_space"), 1, up=2))
            if level in self.time_levels:
                double = functools.partial(DoubleTime, first=first, time=self.time)
                steps.append(Step(functools.partial(self.resampled, double, f"level{level}_double_time"), 1))
                first *= 2
        return [*steps, Step(self.pixels, self.reach(1))]

    def begin(self, latents: Array) -> Array:
        return self.conv3d(self.channels * self.multipliers[-1], "conv_in")(latents.astype(self.dtype))

    def pixels(self, x: Array) -> Array:
        x = self.end(x).astype(jnp.float32)
        return x[:, 2 ** len(self.time_levels) - 1 :] if self.time.drops and starts_clip(self) else x


class Model(nn.Module):
    """Encoder, bottleneck, decoder.

    Attributes:
      bottleneck: FSQ or DiagonalGaussian of ``tokenizers/quantize``.
      latent_channels: what the decoder reads. Where FSQ has another number of levels, dense layers lead to and from it.
      time: family, a name of `TIME`.
      channels, multipliers: width of level i is ``channels * multipliers[i]``, level 0 at full resolution.
      blocks: pairs of blocks per level of the encoder; the decoder has one more.
      space_down, time_down: levels of the encoder that end by halving height and width, and time.
      space_up, time_up: levels of the decoder that end by doubling them.
      norm: ``layernorm`` (all released models) or ``groupnorm``.
      remat: recompute residual blocks in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = FSQ((8,) * 5, commitment=True)
    latent_channels: int = 5
    time: str = "causal"
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    space_down: tuple[int, ...] = (0, 1, 2)
    time_down: tuple[int, ...] = (1, 2)
    space_up: tuple[int, ...] = (1, 2, 3)
    time_up: tuple[int, ...] = (1, 2)
    norm: str = "layernorm"
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        self.encoder, self.decoder = self._networks()
        if self.projected:
            self.project_in = nn.Dense(len(self.bottleneck.levels))
            self.project_out = nn.Dense(self.latent_channels)

    def _networks(self, **options: Any) -> tuple[Encoder, Decoder]:
        time = errors.pick("family", self.time, dict(TIME))
        norms = errors.pick("norm", self.norm, NORMS)(time.causal, self.dtype)
        width = (self.channels, self.multipliers, self.blocks)
        shared = (time, norms, self.dtype, self.remat)
        out = self.latent_channels if self.projected else self.bottleneck.input_channels(self.latent_channels)
        encoder = Encoder(out, *width, self.space_down, self.time_down, *shared, **options)
        return encoder, Decoder(3, *width, self.space_up, self.time_up, *shared, **options)

    @property
    def projected(self) -> bool:
        """Whether dense layers lead to and from the codes."""
        return isinstance(self.bottleneck, FSQ) and len(self.bottleneck.levels) != self.latent_channels

    @property
    def spec(self) -> Spec:
        time, side = errors.pick("family", self.time, dict(TIME)), 2 ** len(self.space_down)
        return Spec(
            compression=(2 ** len(self.time_down), side, side),
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            causal=time.causal,
            video=True,
            last_layer="decoder/conv_out/kernel",
            first_frame_alone=time.causal,
            fills_front=time.fills_front,
            lookahead=time.lookahead,
        )

    @property
    def halo(self) -> tuple[int, int] | None:
        """Latent cells at the border of a tile that the ``local`` part of encoder and decoder gets wrong."""
        encoder, decoder = (halo(half.part("local")) for half in self._networks(parent=None))
        return None if encoder is None or decoder is None else (encoder, -(-decoder // 2 ** len(self.space_up)))

    def encode(self, pixels: Array, train: bool = False, part: str = "all") -> Encoding | Array:
        """``(B, T, H, W, 3)`` in [-1, 1] -> ``(B, T', H', W', D)``; which T fit says the head of this file.

        ``part="local"`` gives features ``(B, T', H', W', C)``, of which ``"rest"`` makes the same encoding.
        """
        z = self.encoder(constrain(pixels, *_AXES), part)
        if part == "local":
            return z
        z = z.astype(jnp.float32)
        if not self.projected:
            return self.bottleneck(z, train)
        encoding = self.bottleneck(self.project_in(z), train)
        return encoding.replace(latents=self.project_out(encoding.latents))

    def decode(self, latents: Array, train: bool = False, part: str = "all") -> Array:
        """``(B, T', H', W', D)`` -> ``(B, T, H, W, 3)``, T = f T' (v1.0: less f - 1); v1.1's clip is the end of it.

        ``part="rest"`` gives features ``(B, T', H', W', C)``, of which ``"local"`` makes the same pixels.
        """
        return self.decoder(constrain(latents, *_AXES), part)

    def indices_to_latents(self, indices: Array) -> Array:  # (b t' h' w') -> (b t' h' w' d)
        codes = self.bottleneck.indices_to_codes(indices)
        return self.project_out(codes) if self.projected else codes

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        # v1.1 gives the frames that filled the clip, too; the others never give more than they got.
        return self.decode(encoding.latents, train)[:, -pixels.shape[1] :], encoding


# ------------------------------------------------------------------------------------------------------------ variants

# Compression (time, height, width): the levels that change size.
_SHAPES = {
    "488": {},
    "41616": {
        "multipliers": (1, 2, 4, 4, 4),
        "space_down": (0, 1, 2, 3),
        "time_down": (2, 3),
        "space_up": (1, 2, 3, 4),
    },
    "288": {"time_down": (1,), "time_up": (2,)},
    "444": {"space_down": (1, 2), "space_up": (1, 2)},
    "888": {"time_down": (0, 1, 2), "time_up": (1, 2, 3)},
}


def _released(shape: str, bottleneck: str, family: str = "causal", note: str = "") -> Variant:
    """``bottleneck``: "16chn" is a Gaussian one of that many channels, "32768" FSQ with that many codes (8 levels)."""
    if bottleneck.endswith("chn"):
        codes = {"bottleneck": {"name": "gaussian"}, "latent_channels": int(bottleneck.removesuffix("chn"))}
    else:
        levels = (8,) * {"4096": 4, "32768": 5, "262144": 6}[bottleneck]
        fsq = {"name": "fsq", "levels": levels, "entropy": "clamped", "commitment": True}
        codes = {"bottleneck": fsq, "latent_channels": len(levels)}
    return Variant(
        config={**codes, "time": family, **_SHAPES[shape]},
        paper="https://arxiv.org/abs/2412.13061",
        source="https://github.com/microsoft/VidTok (weights: huggingface.co/microsoft/VidTok)",
        license="MIT",
        note=note,
    )


# Published PSNR / SSIM / LPIPS / FVD on MCL-JCV, 30 frames a second at 256 x 256; v1.1 on whole long videos.
VARIANTS = {
    "vidtok-kl-causal-488-4chn": _released("488", "4chn", note="29.64 / .852 / .114 / 194.2"),
    "vidtok-kl-causal-488-8chn": _released("488", "8chn", note="31.83 / .897 / .083 / 109.3"),
    "vidtok-kl-causal-488-16chn": _released("488", "16chn", note="35.04 / .942 / .047 / 78.9"),
    "vidtok-kl-causal-288-8chn": _released("288", "8chn", note="33.86 / .928 / .057 / 80.7"),
    "vidtok-kl-causal-444-4chn": _released("444", "4chn", note="34.78 / .941 / .051 / 87.2"),
    "vidtok-kl-causal-41616-4chn": _released("41616", "4chn", note="25.05 / .711 / .228 / 549.1"),
    "vidtok-kl-noncausal-488-4chn": _released("488", "4chn", "noncausal", "30.60 / .876 / .098 / 157.9"),
    "vidtok-kl-noncausal-488-16chn": _released("488", "16chn", "noncausal", "36.13 / .950 / .044 / 60.5"),
    "vidtok-kl-noncausal-41616-4chn": _released("41616", "4chn", "noncausal", "26.06 / .751 / .190 / 423.2"),
    "vidtok-kl-noncausal-41616-16chn": _released("41616", "16chn", "noncausal", "30.69 / .878 / .095 / 147.1"),
    "vidtok-fsq-causal-488-262144": _released("488", "262144", note="29.82 / .867 / .106 / 160.1"),
    "vidtok-fsq-causal-488-32768": _released("488", "32768", note="29.16 / .854 / .117 / 196.9"),
    "vidtok-fsq-causal-488-4096": _released("488", "4096", note="28.36 / .832 / .133 / 218.1"),
    "vidtok-fsq-causal-41616-262144": _released("41616", "262144", note="25.38 / .738 / .206 / 430.1"),
    "vidtok-fsq-noncausal-488-262144": _released("488", "262144", "noncausal", "30.78 / .889 / .091 / 132.1"),
    "vidtok-fsq-noncausal-41616-262144": _released("41616", "262144", "noncausal", "26.37 / .772 / .171 / 357.0"),
    "vidtok-kl-causal-488-4chn-v1.1": _released("488", "4chn", "causal-v1.1"),
    "vidtok-kl-causal-488-16chn-v1.1": _released("488", "16chn", "causal-v1.1", "35.13 / .941 / .049 / 87.4"),
    "vidtok-kl-causal-41616-16chn-v1.1": _released("41616", "16chn", "causal-v1.1", "29.61 / .854 / .113 / 162.7"),
    "vidtok-kl-causal-288-8chn-v1.1": _released("288", "8chn", "causal-v1.1", "34.59 / .935 / .051 / 78.2"),
    "vidtok-fsq-causal-488-32768-v1.1": _released("488", "32768", "causal-v1.1", "29.39 / .856 / .114 / 168.5"),
    "vidtok-fsq-causal-888-32768-v1.1": _released("888", "32768", "causal-v1.1", "27.95 / .817 / .142 / 293.2"),
    "vidtok-fsq-causal-41616-262144-v1.1": _released("41616", "262144", "causal-v1.1"),
}
