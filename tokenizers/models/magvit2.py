"""MAGVIT-v2: a causal 3D CNN whose codes are the signs of its channels (lookup-free quantization, 2^18 codes).

Yu et al., "Language model beats diffusion: tokenizer is key to visual generation", https://arxiv.org/abs/2310.05737.
The authors released nothing; Open-MAGVIT2 (https://arxiv.org/abs/2409.04410, TencentARC/SEED-Voken) trained the design
on images and, inflated from there, on video. Encoder: a convolution, levels of residual blocks with strided
convolutions between them, residual blocks, norm, swish, 1x1 convolution. Decoder: the mirror image, each level begun by
a group norm whose scale and shift are made of the codes' statistics, and with depth-to-space between levels.

What becomes of time is one value of `FAMILIES`:

* ``image``: 2D convolutions.
* ``video``: the released video network. Its convolutions are causal, its group norms are not: they see the whole
  clip, and so does every code and pixel. It does not stream, and an image is not the first frame of a video.
* ``video-causal``: the network of the paper. Every frame is normalized by itself and modulated by its own latent
  frame. Same parameters; train it from scratch or from an inflated image model (`inflate`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .. import errors
from ..nn.blocks import ResBlock
from ..nn.conv import CausalConv3d, Conv2d, starts_clip
from ..nn.norm import GroupNorm, group_normalize
from ..nn.resample import causal_upsample_time, depth_to_space
from ..parallel.constrain import constrain
from ..quantize.lfq import LFQ
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "magvit2"

_AXES = ("batch", "time", "height", "width", "channel")
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Family:
    """What a network does with time.

    Attributes:
      conv: ``conv(features, kernel_size, strides, padding=...)`` makes a convolution; the padding is that of space.
      video: its arrays have a time axis.
      per_frame: norms see one frame at a time.
    """

    conv: Callable[..., nn.Module]
    video: bool
    per_frame: bool = False

    def factors(self, time: int) -> tuple[int, ...]:
        """Of one change of size: (time, 2, 2), or (2, 2) without a time axis."""
        return (time, 2, 2) if self.video else (2, 2)


_CAUSAL_CONV = functools.partial(CausalConv3d, time_mode="zeros")
FAMILIES: Mapping[str, Family] = {
    "image": Family(Conv2d, video=False),
    "video": Family(_CAUSAL_CONV, video=True),
    "video-causal": Family(_CAUSAL_CONV, video=True, per_frame=True),
}


# -------------------------------------------------------------------------------------------------------------- layers


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift are linear in deviation and mean of the codes (section 3.2).

    Attributes:
      per_frame: both are those of the latent frame that a frame was made of; otherwise of all of image or clip.
      time: frames per latent frame where this norm stands, the first frame apart.
    """

    per_frame: bool = False
    time: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, codes: Array) -> Array:  # (b [t] h w c), (b [t'] h' w' d) -> (b [t] h w c)
        axes = tuple(range(2 if self.per_frame else 1, codes.ndim - 1))
        count = int(np.prod([codes.shape[axis] for axis in axes]))
        if count < 2:
            raise ValueError(
                f"adaptive group norm needs the variance of at least 2 latent positions; got latents of shape "
                f"{codes.shape}."
            )
        codes = codes.astype(jnp.float32)
        mean = codes.mean(axes, keepdims=True)
        variance = jnp.square(codes - mean).sum(axes, keepdims=True) / (count - 1)
        scale = nn.Dense(x.shape[-1], name="gamma")(jnp.sqrt(variance + _EPSILON))
        shift = nn.Dense(x.shape[-1], name="beta")(mean)
        if self.per_frame:
            first = starts_clip(self)
            scale, shift = (causal_upsample_time(a, self.time, first_frame_alone=first) for a in (scale, shift))
        normal = group_normalize(x, 32, epsilon=_EPSILON, per_frame=self.per_frame)
        return (scale * normal + shift).astype(self.dtype)


class DepthToSpaceUpsample(nn.Module):
    """Convolution ``conv``, then channels to time and space. Of the first frame's two halves the second is dropped.

    Streams: later chunks have no first frame.
    """

    features: int
    factors: tuple[int, ...]
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b [1+k] h w c) -> (b [1+f*k] 2h 2w d)
        x = self.conv(self.features * int(np.prod(self.factors)), 3, name="conv")(x)
        x = depth_to_space(x, self.factors)
        if len(self.factors) == 3 and self.factors[0] == 2 and starts_clip(self):
            x = jnp.concatenate([x[:, :1], x[:, 2:]], axis=1)
        return x


class _Network(nn.Module):
    """Fields and layers of encoder and decoder; fields as in `Model`."""

    out_channels: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    time_levels: tuple[int, ...]
    family: Family
    dtype: Any
    remat: bool

    def conv(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.family.conv(*args, dtype=self.dtype, **kwargs)

    def norm(self, name: str) -> GroupNorm:
        return GroupNorm(epsilon=_EPSILON, per_frame=self.family.per_frame, name=name)

    def residual(self, x: Array, features: int, name: str) -> Array:
        """``blocks`` residual blocks without biases."""
        block = nn.remat(ResBlock) if self.remat else ResBlock
        conv = functools.partial(self.family.conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(GroupNorm, epsilon=_EPSILON, per_frame=self.family.per_frame)
        for i in range(self.blocks):
            x = block(features, conv, norm, name=f"{name}_block{i}")(x)
        return x

    def time(self, level: int) -> int:
        """Factor in time between this level and the next smaller one."""
        return 2 if self.family.video and level in self.time_levels else 1


class Encoder(_Network):
    """Pixels to what the quantizer reads."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b [1+f*k] h w c) -> (b [1+k] h/s w/s d)
        x = self.conv(self.channels, 3, use_bias=False, name="conv_in")(x.astype(self.dtype))
        last = len(self.multipliers) - 1
        for level, multiplier in enumerate(self.multipliers):
            features = self.channels * multiplier
            x = self.residual(x, features, f"down{level}")
            if level < last:
                strides = self.family.factors(self.time(level))
                x = self.conv(features, 3, strides, padding=1, name=f"down{level}_downsample")(x)
        x = self.residual(x, features, "mid")
        return self.conv(self.out_channels, 1, name="conv_out")(nn.swish(self.norm("norm_out")(x)))


class Decoder(_Network):
    """Codes to pixels, float32, without an output activation."""

    @nn.compact
    def __call__(self, codes: Array) -> Array:  # (b [1+k] h w d) -> (b [1+f*k] s*h s*w c)
        x = self.conv(self.channels * self.multipliers[-1], 3, name="conv_in")(codes.astype(self.dtype))
        x = self.residual(x, x.shape[-1], "mid")
        frames = 1
        for level in reversed(range(len(self.multipliers))):
            features = self.channels * self.multipliers[level]
            adaptive = AdaptiveGroupNorm(self.family.per_frame, frames, self.dtype, name=f"up{level}_adaptive")
            x = self.residual(adaptive(x, codes), features, f"up{level}")
            if level:
                time = self.time(level - 1)
                frames *= time
                conv = functools.partial(self.family.conv, dtype=self.dtype)
                factors = self.family.factors(time)
                x = DepthToSpaceUpsample(features, factors, conv, name=f"up{level}_upsample")(x)
        return self.conv(self.out_channels, 3, name="conv_out")(nn.swish(self.norm("norm_out")(x))).astype(jnp.float32)


# --------------------------------------------------------------------------------------------------------------- model


class Model(nn.Module):
    """Encoder, signs, decoder.

    Clips of 1 + k f frames come back with as many frames, f being the compression of time; the network itself takes
    any number of frames.

    Attributes:
      bottleneck: `LFQ`; the released weights of its terms are ``commitment`` 0.25, ``entropy_sample`` 0.1,
        ``entropy_codebook`` -0.1.
      latent_channels: bits of a code.
      family: a name of `FAMILIES`.
      pixel_channels: of image or video.
      channels, multipliers: width of level i is ``channels * multipliers[i]``, level 0 at full resolution.
      blocks: residual blocks per level, and in the middle.
      time_levels: levels after which time is halved as well as space.
      remat: recompute residual blocks in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = LFQ(18)
    latent_channels: int = 18
    family: str = "image"
    pixel_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 4
    time_levels: tuple[int, ...] = ()
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        family = errors.pick("family", self.family, dict(FAMILIES))
        shared = (self.channels, self.multipliers, self.blocks, self.time_levels, family, self.dtype, self.remat)
        self.encoder = Encoder(self.bottleneck.input_channels(self.latent_channels), *shared)
        self.decoder = Decoder(self.pixel_channels, *shared)

    @property
    def spec(self) -> Spec:
        family, side = errors.pick("family", self.family, dict(FAMILIES)), 2 ** (len(self.multipliers) - 1)
        sizes = getattr(self.bottleneck, "codebook_sizes", ())
        return Spec(
            compression=(2 ** len(self.time_levels) if family.video else 1, side, side),
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            causal=family.per_frame or not family.video,
            video=family.video,
            last_layer="decoder/conv_out/kernel",
            first_frame_alone=family.video,
            codebooks=getattr(self.bottleneck, "codebooks", 1),
            codebook_sizes=sizes if len(sizes) > 1 else (),
            channels=self.pixel_channels,
        )

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b [t] h w c) in [-1, 1] -> (b [t'] h' w' d)
        return self.bottleneck(self.prequantized(pixels), train)

    def prequantized(self, pixels: Array) -> Array:  # (b [t] h w c) -> (b [t'] h' w' d)
        """What the bottleneck reads, float32."""
        return self.encoder(self._constrained(pixels)).astype(jnp.float32)

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b [t'] h' w' d) -> (b [t] h w c)
        return self.decoder(self._constrained(latents))

    def indices_to_latents(self, indices: Array) -> Array:  # (b [t'] h' w') -> (b [t'] h' w' d)
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding

    def _constrained(self, x: Array) -> Array:
        return constrain(x, *(_AXES if x.ndim == 5 else _AXES[:1] + _AXES[2:]))


def inflate(image: Mapping[str, Any], video: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a video model that starts as an image model, as Open-MAGVIT2's did.

    Kernels see the newest frame alone; where a level doubles time, both of its frames are the image's. Every frame of a
    causal model is then what the image model makes of it.

    Args:
      image: parameters of an image model.
      video: parameters (or their shapes) of a video model of the same widths.

    Raises:
      ValueError: for another number of layers or channels.
    """
    if set(image) != set(video):
        raise ValueError(f"the image model has {sorted(image)}, the video model {sorted(video)}.")
    return {name: _inflated(image[name], video[name], name) for name in image}


def _inflated(image: Any, video: Any, path: str) -> Any:
    if isinstance(image, Mapping) and isinstance(video, Mapping):
        if set(image) != set(video):
            raise ValueError(f"{path} of the image model has {sorted(image)}, of the video model {sorted(video)}.")
        return {name: _inflated(image[name], video[name], f"{path}/{name}") for name in image}
    value, shape = np.asarray(image), tuple(video.shape)
    if len(shape) == value.ndim + 1:
        value = np.concatenate([np.zeros((shape[0] - 1, *value.shape), value.dtype), value[None]])
    if shape[-1] == 2 * value.shape[-1]:  # made for (time, height, width, channel), the slowest first
        value = np.concatenate([value, value], axis=-1)
    if value.shape != shape:
        raise ValueError(f"{path} of shape {image.shape} cannot be inflated to {shape}.")
    return value


# ------------------------------------------------------------------------------------------------------------ variants


def _open(bits: int, multipliers: tuple[int, ...], family: str, file: str, note: str) -> Variant:
    return Variant(
        config={
            "bottleneck": {"name": "lfq", "bits": bits},
            "latent_channels": bits,
            "family": family,
            "multipliers": multipliers,
            "time_levels": () if family == "image" else (1, 2),
        },
        paper="https://arxiv.org/abs/2409.04410",
        source=f"https://github.com/TencentARC/SEED-Voken (weights: huggingface.co/TencentARC, {file})",
        license="Apache-2.0",
        note=note,
    )


_F8, _F16 = (1, 2, 2, 4), (1, 1, 2, 2, 4)
VARIANTS = {
    "open-magvit2-imagenet-256-262144": _open(18, _F16, "image", "imagenet_256_L.ckpt", "rFID 1.17, PSNR 21.90"),
    "open-magvit2-imagenet-128-262144": _open(
        18, _F8, "image", "imagenet_128_L.ckpt", "rFID 1.18, PSNR 25.08 at 128; 0.34, 26.19 at 256"
    ),
    "open-magvit2-pretrain-256-262144": _open(
        18, _F16, "image", "pretrain256_262144.ckpt", "100 M web images; rFID 1.67, PSNR 22.70 on ImageNet"
    ),
    "open-magvit2-pretrain-256-16384": _open(
        14, _F16, "image", "pretrain256_16384.ckpt", "100 M web images; rFID 2.55, PSNR 22.21 on ImageNet"
    ),
    "open-magvit2-video-128-262144": _open(
        18, _F8, "video", "video_128_262144.ckpt", "UCF-101, rFVD 16; not causal: its norms see the whole clip"
    ),
    "magvit2-video-causal-128-262144": Variant(
        config={
            "family": "video-causal",
            "multipliers": _F8,
            "time_levels": (1, 2),
        },
        paper="https://arxiv.org/abs/2310.05737",
        license="no weights released",
        note="the paper's causal network in the size of Open-MAGVIT2's video model: norms see one frame at a time",
    ),
}
