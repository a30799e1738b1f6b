"""A public reconstruction of MAGVIT-v2's video tokenizer, made of layers that a list names; strictly causal.

Code lucidrains/magvit2-pytorch (`VideoTokenizer`), after https://arxiv.org/abs/2310.05737; no weights are released. A
decoder layer stands against every encoder layer, in reverse order. Unlike the paper's, this network has attention, and
squeeze-and-excitation in place of norms; it streams.

A clip is preceded by f - 1 frames of zeros, f being the compression of time, which are cut off again after decoding:
1 + k f frames become 1 + k latents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import errors
from ..nn.attention import attend, with_history
from ..nn.blocks import gelu
from ..nn.conv import STREAM, CausalConv3d, Conv2d, starts_clip, streams
from ..nn.resample import depth_to_space
from ..parallel.constrain import constrain
from ..quantize.lfq import LFQ, soft_clamp
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "magvit2_pytorch"

_AXES = ("batch", "time", "height", "width", "channel")
_MEMORIES = 4
_conv3d = functools.partial(CausalConv3d, time_mode="zeros")


# -------------------------------------------------------------------------------------------------------------- layers


class SqueezeExcite(nn.Module):
    """A gate per frame and channel, from a mean of the frame's positions that is weighted by one learned map."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> same
        *lead, h, w, c = x.shape
        scores = nn.Dense(1, dtype=self.dtype, name="scores")(x).reshape(*lead, h * w)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(x.dtype)
        mean = jnp.einsum("btn,btnc->btc", weights, x.reshape(*lead, h * w, c), precision=jax.lax.Precision.HIGHEST)
        hidden = nn.leaky_relu(nn.Dense(max(16, c // 2), dtype=self.dtype, name="fc1")(mean), 0.1)
        # The gate starts almost closed, so that a residual unit starts as the identity.
        gate = nn.Dense(
            c,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros_init(),
            bias_init=nn.initializers.constant(-10.0),
            name="fc2",
        )(hidden)
        return x * nn.sigmoid(gate)[:, :, None, None]


class ResidualUnit(nn.Module):
    """``x`` plus: convolution, ELU, dense layer, ELU, gate."""

    kernel_size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> same
        y = nn.elu(_conv3d(x.shape[-1], self.kernel_size, dtype=self.dtype, name="conv")(x))
        y = nn.elu(nn.Dense(x.shape[-1], dtype=self.dtype, name="dense")(y))
        return x + SqueezeExcite(self.dtype, name="gate")(y)


class UnitRMSNorm(nn.Module):
    """Vectors of length sqrt(C), times ``scale`` ``(C,)``."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... c) -> same
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], jnp.float32)
        wide = x.astype(jnp.float32)
        square = jnp.maximum(jnp.square(wide).sum(-1, keepdims=True), 1e-24)
        return (wide * jax.lax.rsqrt(square) * x.shape[-1] ** 0.5 * scale).astype(x.dtype)


class MemoryAttention(nn.Module):
    """Norm, then attention over axis -2 of ``(..., N, C)``, with four learned keys and values in front.

    Attributes:
      causal: a token sees those before it; then it streams: keys and values of earlier chunks are kept.
    """

    num_heads: int
    head_dim: int
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... n c) -> same
        width, count = self.num_heads * self.head_dim, x.shape[-2]
        qkv = nn.Dense(3 * width, use_bias=False, dtype=self.dtype, name="qkv")(UnitRMSNorm(name="norm")(x))
        query, key, value = (
            a.reshape(*a.shape[:-1], self.num_heads, self.head_dim) for a in jnp.split(qkv, 3, axis=-1)
        )
        shape = (2, self.num_heads, _MEMORIES, self.head_dim)
        memory = self.param("memory", nn.initializers.normal(1.0), shape, jnp.float32).swapaxes(1, 2)
        past = 0
        if self.causal:
            past, key, value = with_history(self, key, value)
        key, value = (
            jnp.concatenate([jnp.broadcast_to(m, (*a.shape[:-3], *m.shape)).astype(a.dtype), a], axis=-3)
            for m, a in zip(memory, (key, value), strict=True)
        )
        mask = None
        if self.causal:
            mask = jnp.arange(key.shape[-3]) <= _MEMORIES + past + jnp.arange(count)[:, None]
        y = attend(query, key, value, mask=mask)
        y = y.reshape(*y.shape[:-2], width)
        return nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="out")(y)


class FeedForward(nn.Module):
    """Norm, then ``value * gelu(gate)`` between two dense layers."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (... c) -> same
        hidden = int(x.shape[-1] * 4 * 2 / 3)
        y = nn.Dense(2 * hidden, dtype=self.dtype, name="fc1")(UnitRMSNorm(name="norm")(x))
        value, gate = jnp.split(y, 2, axis=-1)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(value * gelu(gate))


class TokenShift(nn.Module):
    """The second half of the channels comes one frame late. Streams."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> same
        now, late = x[..., : (x.shape[-1] + 1) // 2], x[..., (x.shape[-1] + 1) // 2 :]
        before = self.get_variable(STREAM, "late", jnp.zeros_like(late[:, :1])).astype(x.dtype)
        if streams(self):
            self.put_variable(STREAM, "late", late[:, -1:])
        return jnp.concatenate([now, jnp.concatenate([before, late[:, :-1]], axis=1)], axis=-1)


class Attend(nn.Module):
    """Attention and feed-forward over the positions of each frame, or over the past of each position."""

    over_time: bool
    num_heads: int
    head_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> same
        attention = MemoryAttention(self.num_heads, self.head_dim, self.over_time, self.dtype, name="attention")
        feed = FeedForward(self.dtype, name="mlp")
        b, t, h, w, c = x.shape
        if not self.over_time:
            x = x + attention(x.reshape(b, t, h * w, c)).reshape(x.shape)
            return x + feed(x)
        shifted = jnp.moveaxis(TokenShift(name="shift1")(x), 1, 3).reshape(b, h * w, t, c)
        x = x + jnp.moveaxis(attention(shifted).reshape(b, h, w, t, c), 3, 1)
        return x + feed(TokenShift(name="shift2")(x))


class DepthTo(nn.Module):
    """A dense layer, SiLU, and its channels to time or space."""

    features: int
    factors: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b f*t f*h f*w d)
        count = 1
        for factor in self.factors:
            count *= factor
        x = nn.silu(nn.Dense(self.features * count, dtype=self.dtype, name="dense")(x))
        return depth_to_space(x, self.factors, order="channel_outer")


# --------------------------------------------------------------------------------------------------------------- model

# Layers that change nothing but channels; the first number after a name is its parameter.
_SAME_SIZE = ("residual", "consecutive_residual", "attend_space", "attend_time")
LAYERS = (*_SAME_SIZE, "compress_space", "compress_time")
Layer = tuple[str, int | None]


def layer_plan(layers: tuple[Any, ...], width: int, widest: int) -> list[tuple[str, int | None, int, int]]:
    """(name, its number, channels before, channels after) of every layer of the encoder."""
    plan = []
    for layer in layers:
        name, *numbers = (layer,) if isinstance(layer, str) else layer
        if name not in LAYERS:
            raise errors.unknown("layer of magvit2_pytorch", name, LAYERS)
        after, number = width, numbers[0] if numbers else None
        if name not in _SAME_SIZE:
            after = min(number or 2 * width, widest)
        elif len(numbers) != (name == "consecutive_residual"):
            raise ValueError(f"layer {layer!r}: consecutive_residual alone takes a number, and needs it.")
        plan.append((name, number, width, after))
        width = after
    return plan


class Model(nn.Module):
    """A convolution, the layers, a dense layer, signs; and back.

    The authors' recipe: squared error, ``commitment`` 1, ``entropy_sample`` 0.1, ``entropy_codebook`` -0.25.

    Attributes:
      bottleneck: `LFQ` in its big bit order; the sum of its entropies is clamped.
      latent_channels: width of the deepest layer; dense layers lead to and from the codes where it is not their number.
      layers: names of `LAYERS`, from pixels to latents, alone or with a number: of units of a consecutive_residual, of
        channels behind a compress_space or compress_time (twice those before, unless told).
      channels, widest: width of the first layer and largest width.
      num_heads, head_dim: of attention.
      conv_in, conv_out: kernels (time, height, width) of the first and the last convolution.
      residual_kernel: of the residual units.
      first_frame: the first frame has convolutions of its own at both ends, and the zeros go in front of features.
      clamp: the quantizer sees ``clamp * tanh(z / clamp)``.
      remat: recompute layers in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, norms' statistics, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = LFQ(18, bit_order="big", entropy="clamped")
    latent_channels: int = 512
    layers: tuple[Any, ...] = (
        "residual", "compress_space", ("consecutive_residual", 2), "compress_space", ("consecutive_residual", 2),
        "compress_space", "attend_space", "compress_time", ("consecutive_residual", 2), "compress_time",
        ("consecutive_residual", 2), "attend_time",
    )  # fmt: skip
    channels: int = 64
    widest: int = 512
    num_heads: int = 8
    head_dim: int = 32
    conv_in: tuple[int, int, int] = (7, 7, 7)
    conv_out: tuple[int, int, int] = (3, 3, 3)
    residual_kernel: int = 3
    pixel_channels: int = 3
    first_frame: bool = False
    clamp: float | None = 10.0
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        plan = layer_plan(self.layers, self.channels, self.widest)
        if plan[-1][-1] != self.latent_channels:
            raise ValueError(f"latent_channels={self.latent_channels} must be the last width, {plan[-1][-1]}.")
        self.encoder_in = _conv3d(self.channels, self.conv_in, dtype=self.dtype)
        self.decoder_out = _conv3d(self.pixel_channels, self.conv_out, dtype=self.dtype)
        if self.first_frame:
            self.encoder_in_first = Conv2d(self.channels, self.conv_in[1:], dtype=self.dtype)
            self.decoder_out_first = Conv2d(self.pixel_channels, self.conv_out[1:], dtype=self.dtype)
        self.encoder = [self._down(i, *entry) for i, entry in enumerate(plan)]
        self.decoder = [self._up(i, *entry) for i, entry in enumerate(reversed(plan))]
        if self.projected:
            self.project_in = nn.Dense(self.bottleneck.bits)
            self.project_out = nn.Dense(self.latent_channels)

    def _down(self, index: int, name: str, number: int | None, before: int, after: int) -> list[nn.Module]:
        where = f"encoder{index}"
        if name == "compress_space":
            conv = self._made(Conv2d)
            return [conv(after, 3, 2, padding=1, dtype=self.dtype, name=where)]
        if name == "compress_time":
            conv = self._made(_conv3d)
            return [conv(after, (3, 1, 1), (2, 1, 1), dtype=self.dtype, name=where)]
        return self._same(where, name, number)

    def _up(self, index: int, name: str, number: int | None, before: int, after: int) -> list[nn.Module]:
        where = f"decoder{index}"
        factors = {"compress_space": (2, 2), "compress_time": (2, 1, 1)}
        if name in factors:
            return [self._made(DepthTo)(before, factors[name], self.dtype, name=where)]
        return self._same(where, name, number)

    def _same(self, where: str, name: str, number: int | None) -> list[nn.Module]:
        if name.startswith("attend"):
            over_time = name == "attend_time"
            return [self._made(Attend)(over_time, self.num_heads, self.head_dim, self.dtype, name=where)]
        unit = functools.partial(self._made(ResidualUnit), self.residual_kernel, self.dtype)
        return [unit(name=f"{where}_unit{i}") for i in range(number or 1)]

    def _made(self, layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        return nn.remat(layer) if self.remat and isinstance(layer, type) else layer

    @property
    def projected(self) -> bool:
        """Whether dense layers lead to and from the codes."""
        return self.bottleneck.bits != self.latent_channels

    def _factor(self, name: str) -> int:
        return 2 ** sum(entry[0] == name for entry in layer_plan(self.layers, self.channels, self.widest))

    @property
    def spec(self) -> Spec:
        side = self._factor("compress_space")
        return Spec(
            compression=(self._factor("compress_time"), side, side),
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            causal=True,
            video=True,
            last_layer="decoder_out/kernel",
            first_frame_alone=True,
            channels=self.pixel_channels,
        )

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b 1+k*f h w c) in [-1, 1] -> (b 1+k h' w' d)
        z = self.prequantized(pixels)
        encoding = self.bottleneck(z if self.clamp is None else soft_clamp(z, self.clamp), train)
        return encoding.replace(latents=self._from_codes(encoding.latents))

    def prequantized(self, pixels: Array) -> Array:  # (b 1+k*f h w c) -> (b 1+k h' w' bits)
        """What is clamped and quantized, float32."""
        x = constrain(pixels, *_AXES).astype(self.dtype)
        zeros, first = self._factor("compress_time") - 1, starts_clip(self)
        pads = ((0, 0), (zeros * first, 0), (0, 0), (0, 0), (0, 0))
        if self.first_frame and first:
            rest = [self.encoder_in(x[:, 1:])] if x.shape[1] > 1 else []
            x = jnp.pad(jnp.concatenate([self.encoder_in_first(x[:, :1]), *rest], axis=1), pads)
        else:
            x = self.encoder_in(jnp.pad(x, pads))
        x = self._through(self.encoder, x).astype(jnp.float32)
        return self.project_in(x) if self.projected else x

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b 1+k h' w' d) -> (b 1+k*f h w c)
        x = constrain(latents, *_AXES).astype(self.dtype)
        zeros, first = self._factor("compress_time") - 1, starts_clip(self)
        x = self._through(self.decoder, x)
        if self.first_frame and first:
            rest = [self.decoder_out(x[:, zeros + 1 :])] if x.shape[1] > zeros + 1 else []
            x = jnp.concatenate([self.decoder_out_first(x[:, zeros : zeros + 1]), *rest], axis=1)
        else:
            x = self.decoder_out(x)[:, zeros * first :]
        return x.astype(jnp.float32)

    def _through(self, layers: list[list[nn.Module]], x: Array) -> Array:
        for group in layers:
            for layer in group:
                x = constrain(layer(x), *_AXES)
        return x

    def indices_to_latents(self, indices: Array) -> Array:  # (b t' h' w') -> (b t' h' w' d)
        return self._from_codes(self.bottleneck.indices_to_codes(indices))

    def _from_codes(self, codes: Array) -> Array:
        return self.project_out(codes) if self.projected else codes

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


VARIANTS: dict[str, Variant] = {}
