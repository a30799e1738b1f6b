"""LightningDiT (https://arxiv.org/abs/2501.01423): a diffusion transformer over a tokenizer's continuous latents.

A DiT (https://arxiv.org/abs/2212.09748) with the practice of language models: RMS norms, SwiGLU, rotary positions. It
learns by flow matching (`flow`) and is the fixed probe by which VA-VAE and VTP compare latents.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import pick
from ..nn.attention import Attention
from ..nn.blocks import MLP, SwiGLU
from ..nn.conv import Conv2d
from ..nn.norm import LayerNorm, RMSNorm
from ..nn.posemb import apply_rotary, axial_rotary_angles, sincos
from ..nn.resample import depth_to_space
from ..nn.scan import scan_layers
from ..parallel.constrain import constrain
from ..types import Array, Variant

SYSTEM = "lightningdit"

# depth, width, heads
SIZES = {
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}
TIME_CHANNELS = 256

_XAVIER = nn.initializers.xavier_uniform()
_SMALL = nn.initializers.normal(0.02)
_ZEROS = nn.initializers.zeros


def time_features(t: Array) -> Array:  # (b) -> (b 256)
    """Cosines, then sines of t, which is in [0, 1] and not scaled."""
    rates = np.exp(-np.log(1e4) * np.arange(TIME_CHANNELS // 2) / (TIME_CHANNELS // 2)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Condition(nn.Module):
    """Time and label as one vector."""

    width: int
    classes: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, t: Array, labels: Array, train: bool) -> Array:  # (b), (b) -> (b d)
        time = nn.Dense(self.width, kernel_init=_SMALL, dtype=self.dtype, name="time_in")(time_features(t))
        time = nn.Dense(self.width, kernel_init=_SMALL, dtype=self.dtype, name="time_out")(nn.silu(time))
        if train and self.dropout:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), self.dropout, labels.shape)
            labels = jnp.where(dropped, self.classes, labels)
        # The row after the classes stands for no label.
        return time + nn.Embed(self.classes + 1, self.width, embedding_init=_SMALL, dtype=self.dtype, name="label")(
            labels
        )


def modulation(condition: Array, parts: int, dtype: Any, name: str) -> list[Array]:
    """``parts`` vectors ``(b 1 d)`` made of the condition, initially zero (to be called in a compact method)."""
    width = parts * condition.shape[-1]
    made = nn.Dense(width, kernel_init=_ZEROS, dtype=dtype, name=name)(nn.silu(condition))
    return jnp.split(made[:, None], parts, axis=-1)


class Layer(nn.Module):
    """Attention and an MLP, each between a scale (and shift) and a gate that the condition sets; fields of `Model`."""

    heads: int
    hidden: int
    norm: str
    qk_norm: bool
    swiglu: bool
    shift: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, condition: Array, rotate: Any) -> Array:  # (b n d), (b d) -> (b n d)
        none = jnp.zeros((), x.dtype)
        parts = modulation(condition, 6 if self.shift else 4, self.dtype, "modulation")
        shift1, scale1, gate1, shift2, scale2, gate2 = parts if self.shift else (none, *parts[:2], none, *parts[2:])
        attention = Attention(
            self.heads,
            fused_qkv=True,
            qk_norm=self.norm if self.qk_norm else None,
            qk_norm_epsilon={"rms": 1e-6, "layer": 1e-5}[self.norm],
            dtype=self.dtype,
            name="attention",
        )
        mlp = SwiGLU if self.swiglu else functools.partial(MLP, activation=nn.gelu)  # the tanh form
        mlp = mlp(self.hidden, dtype=self.dtype, name="mlp")
        y = norm_of(self.norm, self.dtype, "norm1")(x) * (1 + scale1) + shift1
        x = x + gate1 * attention(y, rotate=rotate)
        y = norm_of(self.norm, self.dtype, "norm2")(x) * (1 + scale2) + shift2
        return constrain(x + gate2 * mlp(y), "batch", None, None)


def norm_of(kind: str, dtype: Any, name: str) -> nn.Module:
    if pick("norm", kind, {"rms": True, "layer": False}):
        return RMSNorm(epsilon=1e-6, dtype=dtype, name=name)
    return LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False, dtype=dtype, name=name)


class Model(nn.Module):
    """The velocity of latents at a time, given a label.

    Attributes:
      channels: of the latents.
      grid: their height and width.
      patch: latents per token and axis.
      size: depth, width, heads, see `SIZES`.
      classes: labels; the number after the last one means none.
      hidden: channels inside the MLP; ``None`` is 2/3 of four times the width with SwiGLU, four times without.
      norm: ``rms``, or ``layer`` (without scale and bias).
      qk_norm: normalize queries and keys.
      swiglu: or a GELU MLP.
      rotary: rotary positions, beside the fixed ones that are added.
      shift: the condition shifts what it scales.
      sigma: the last layer has twice the channels, the second half of which nobody reads.
      label_dropout: how often a label is hidden in training (rng stream ``dropout``).
      remat: what the backward pass computes again, see `nn.scan.REMAT`.
      dtype: compute dtype; parameters, norms' statistics and the output are float32.
    """

    channels: int = 32
    grid: tuple[int, int] = (16, 16)
    patch: int = 1
    size: tuple[int, int, int] = SIZES["XL"]
    classes: int = 1000
    hidden: int | None = None
    norm: str = "rms"
    qk_norm: bool = False
    swiglu: bool = True
    rotary: bool = True
    shift: bool = True
    sigma: bool = False
    label_dropout: float = 0.1
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, labels: Array, train: bool = False) -> Array:
        """``(B, h, w, channels)``, times ``(B,)`` in [0, 1], labels ``(B,)`` -> velocity ``(B, h, w, channels)``."""
        depth, width, heads = self.size
        batch = x.shape[0]
        wanted = (*self.grid, self.channels)
        if x.shape[1:] != wanted:
            raise ValueError(f"latents must have shape (B, {', '.join(map(str, wanted))}); got {x.shape}.")
        rows = (self.grid[0] // self.patch, self.grid[1] // self.patch)
        x = constrain(x, "batch", None, None, "channel")
        embed = Conv2d(width, self.patch, strides=self.patch, padding="VALID", dtype=self.dtype, name="patches")
        x = embed(x.astype(self.dtype)) + sincos(rows, width, axis_order=(1, 0)).astype(self.dtype)
        x = x.reshape(batch, -1, width)
        condition = Condition(width, self.classes, self.label_dropout, self.dtype, name="condition")(t, labels, train)
        rotate = None
        if self.rotary:
            half = width // heads // 2
            angles = axial_rotary_angles(rows, (half, half))
            rotate = functools.partial(apply_rotary, angles=angles, interleaved=True)
        hidden = self.hidden or (int(2 / 3 * int(4 * width)) if self.swiglu else 4 * width)
        layer = Layer(heads, hidden, self.norm, self.qk_norm, self.swiglu, self.shift, self.dtype, name="layers")
        x = scan_layers(layer, depth, x, remat=self.remat, condition=condition, rotate=rotate)
        shift, scale = modulation(condition, 2, self.dtype, "modulation_out")
        x = norm_of(self.norm, self.dtype, "norm_out")(x) * (1 + scale) + shift
        channels = self.channels * (2 if self.sigma else 1)
        x = nn.Dense(self.patch**2 * channels, kernel_init=_ZEROS, dtype=self.dtype, name="out")(x)
        x = depth_to_space(x.reshape(batch, *rows, -1), (self.patch, self.patch))
        return x[..., : self.channels].astype(jnp.float32)

    def example(self) -> tuple[Array, Array, Array]:
        """Inputs to initialize it with."""
        return jnp.zeros((1, *self.grid, self.channels), jnp.float32), jnp.zeros(1), jnp.zeros(1, jnp.int32)


def _probe(name: str, size: str, channels: int, source: str, note: str) -> dict[str, Variant]:
    return {
        name: Variant(
            config={"channels": channels, "size": SIZES[size]},
            paper="https://arxiv.org/abs/2501.01423",
            source=source,
            license="MIT",
            note=note,
        )
    }


VARIANTS = (
    _probe(
        "lightningdit-xl-vavae-f16d32",
        "XL",
        32,
        "https://huggingface.co/hustvl/lightningdit-xl-imagenet256-800ep",
        "ImageNet at 256 x 256 on VA-VAE's latents: FID 2.17, with guidance 1.35",
    )
    | _probe(
        "lightningdit-xl-vtp-f16d64",
        "XL",
        64,
        "https://github.com/MiniMax-AI/VTP",
        "ImageNet at 256 x 256 on VTP's latents, 80 epochs: FID 2.81 (L), 3.88 (B), 5.46 (S), no guidance",
    )
    | _probe(
        "lightningdit-b-vtp-f16d64",
        "B",
        64,
        "https://github.com/MiniMax-AI/VTP",
        "the probe of VTP's scaling study, FID of 10,000 samples",
    )
)
