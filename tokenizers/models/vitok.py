"""ViTok (https://arxiv.org/abs/2501.09755): two plain ViTs with a narrow linear code between them, and its successor.

A clip is cut into patches, tubelets of ``(time, height, width)`` pixels. The encoder turns each into a token, a linear
layer makes a code of it, the decoder turns codes into patches again. What decides about the reconstruction is the
number of floats in the code, ``E = tokens x channels``, hardly the size of the encoder, a little that of the decoder.

A one-dimensional variant puts fixed code tokens in front of the patches and keeps only what becomes of them, like
TiTok; its decoder sees them in front of one position token per patch. It may be trained with codes cut to random
lengths, the rest of which is a mask token.

The successor (``style="naflex"``, no paper; philippe-eecs/vitok, `big_vision`) takes images of any size and aspect
ratio: its learned positions are resampled to their grid, its attention is local along the rows of tokens and grouped,
its MLPs are SwiGLU, and its pixels pass a tanh.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import pick
from ..nn.attention import Attention
from ..nn.blocks import SwiGLU, TransformerBlock, gelu
from ..nn.norm import LayerNorm
from ..nn.posemb import apply_rotary, rotary_angles, sincos
from ..nn.scan import scan_layers
from ..parallel.constrain import constrain
from ..quantize.gaussian import DiagonalGaussian
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "vitok"

# Width, layers, heads. In ViTok encoder and decoder share the decoder's width: S-L is six layers of width 1024 + 128.
SIZES = {"S": (768, 6, 12), "B": (768, 12, 12), "L": (1152, 24, 16), "H": (1312, 32, 16)}
NAFLEX_SIZES = {"S": (768, 6, 12), "B": (768, 12, 12), "L": (1024, 24, 16), "So400m": (1152, 27, 16)}

THETA = 1e4

# -------------------------------------------------------------------------------------------------- the two code bases


@dataclasses.dataclass(frozen=True)
class Style:
    """What all blocks of a code base have in common.

    Attributes:
      epsilon: of the layer norms.
      fused_qkv, qkv_bias: of the attention.
      mlp_ratio, mlp_activation, mlp_bias: of the gated MLP; the ratio is of its hidden channels to the width.
      bias_per_pixel: the last bias has one number per value of a patch, otherwise one per colour.
      output: what the pixels pass.
    """

    epsilon: float
    fused_qkv: bool
    qkv_bias: bool
    mlp_ratio: float
    mlp_activation: Callable[[Array], Array]
    mlp_bias: bool
    bias_per_pixel: bool
    output: Callable[[Array], Array]


STYLES = {
    "vitok": Style(1e-5, True, False, 2.67, gelu, True, False, lambda x: x),
    "naflex": Style(1e-6, False, True, 2.3, nn.swish, False, True, jnp.tanh),
}


# ----------------------------------------------------------------------------------------------------------- positions

Grid = tuple[int, int, int]  # tokens along (time, height, width)


def sincos_positions(grid: Grid, width: int, axes: int) -> np.ndarray:
    """Fixed table ``(tokens, width)``: the sines, then the cosines, of each of the axes.

    ``axes`` is 3 (time, width, height), 2 (width, height; one frame) or 1 (the number of the token). Frequencies end
    at 1 / 10000 exactly, where the common formula stays short of it.
    """
    frequencies = width // (2 * axes)
    if width % (2 * axes) or frequencies < 2 or (axes == 2 and grid[0] != 1):
        raise ValueError(
            f"sincos{axes}d positions need a width of 2 x {2 * axes} channels or more multiples of {2 * axes}, and "
            f"sincos2d single frames; got width {width} and a grid of {grid} tokens."
        )
    shape, order = {1: ((math.prod(grid),), (0,)), 2: (grid[1:], (1, 0)), 3: (grid, (0, 2, 1))}[axes]
    theta = THETA ** (frequencies / (frequencies - 1))
    return sincos(shape, width, theta=theta, axis_order=order).reshape(-1, width)


class LearnedTable(nn.Module):
    """A learned table ``(tokens, width)`` of one grid, and for that grid alone."""

    grid: Grid
    width: int

    @nn.compact
    def __call__(self, grid: Grid) -> Array:
        if grid != self.grid:
            raise ValueError(f"learned positions are for a grid of {self.grid} tokens (t, h, w), got {grid}.")
        return self.param("table", nn.initializers.normal(0.025), (math.prod(grid), self.width), jnp.float32)


class ResampledTable(nn.Module):
    """A learned table ``(height, width, channels)``, brought to the grid of an image by Lanczos filters."""

    grid: Grid
    width: int

    @nn.compact
    def __call__(self, grid: Grid) -> Array:  # -> (tokens width)
        shape = (*self.grid[1:], self.width)
        table = self.param("table", nn.initializers.normal(self.width**-0.5), shape, jnp.float32)
        if grid[0] != 1:
            raise ValueError(f"resampled positions are for single frames, got a grid of {grid} tokens (t, h, w).")
        resampled = jax.image.resize(table, (*grid[1:], self.width), "lanczos3", antialias=True)
        return resampled.reshape(-1, self.width)


# From (grid that tables are stored in, width, name) to functions of the grid at hand.
POSITIONS = {
    "none": lambda stored, width, name: lambda grid: jnp.zeros((), jnp.float32),
    "learned": lambda stored, width, name: LearnedTable(stored, width, name=name),
    "resampled": lambda stored, width, name: ResampledTable(stored, width, name=name),
    "sincos1d": lambda stored, width, name: functools.partial(sincos_positions, width=width, axes=1),
    "sincos2d": lambda stored, width, name: functools.partial(sincos_positions, width=width, axes=2),
    "sincos3d": lambda stored, width, name: functools.partial(sincos_positions, width=width, axes=3),
}

# -------------------------------------------------------------------------------------------------------- transformers


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What the two transformers of a model share; fields as in `Model`."""

    style: str
    rotary: str
    theta: float
    kv_groups: int
    window: tuple[int, int] | None
    remat: str
    dtype: Any


class Transformer(nn.Module):
    """Pre-norm blocks and a final norm. ``size`` is (width, layers, heads)."""

    size: tuple[int, int, int]
    blocks: Blocks

    @nn.compact
    def __call__(self, x: Array, grid: Grid) -> Array:  # (b n c) -> same
        style, dtype = pick("style", self.blocks.style, STYLES), self.blocks.dtype
        width, depth, heads = self.size
        norm = functools.partial(LayerNorm, epsilon=style.epsilon, dtype=dtype)
        layer = TransformerBlock(
            attention=functools.partial(
                Attention,
                heads,
                kv_heads=heads // self.blocks.kv_groups,
                fused_qkv=style.fused_qkv,
                qkv_bias=style.qkv_bias,
                dtype=dtype,
            ),
            mlp=functools.partial(
                SwiGLU,
                int(style.mlp_ratio * width),
                activation=style.mlp_activation,
                use_bias=style.mlp_bias,
                dtype=dtype,
            ),
            norm=norm,
            name="layers",
        )
        kinds = {"none": self._unturned, "sequence": self._sequence, "axial": self._axial, "mixed": self._mixed}
        shared, each = pick("rotary embedding", self.blocks.rotary, kinds)(x.shape[1], grid)
        x = scan_layers(layer, depth, x, each=each, remat=self.blocks.remat, window=self.blocks.window, **shared)
        return norm(name="norm")(constrain(x, "batch", None, None))

    # Keywords of all layers and of each: how queries and keys turn.

    def _unturned(self, count: int, grid: Grid) -> tuple[dict, dict]:
        return {}, {}

    def _sequence(self, count: int, grid: Grid) -> tuple[dict, dict]:
        """By the number of the token in the whole sequence, code tokens first."""
        angles = rotary_angles(np.arange(count), self._head_channels, theta=self.blocks.theta)
        return {"rotate": functools.partial(_turn, angles=angles)}, {}

    def _axial(self, count: int, grid: Grid) -> tuple[dict, dict]:
        """Half of the channels by the column, half by the row."""
        angles = [rotary_angles(of, self._head_channels // 2, theta=self.blocks.theta) for of in _places(count, grid)]
        return {"rotate": functools.partial(_turn, angles=np.concatenate(angles, axis=-1))}, {}

    def _mixed(self, count: int, grid: Grid) -> tuple[dict, dict]:
        """By learned mixtures of column and row, other ones in every layer and head; https://arxiv.org/abs/2403.13298."""
        _, depth, heads = self.size
        shape = (2, depth, heads * self._head_channels // 2)
        start = functools.partial(_mixed_frequencies, heads=heads, theta=self.blocks.theta)
        frequencies = self.param("frequencies", start, shape).reshape(2, depth, 1, heads, -1)
        column, row = (jnp.asarray(of, jnp.float32)[:, None, None] for of in _places(count, grid))
        angles = column * frequencies[0] + row * frequencies[1]  # (layers n heads pairs)
        return {}, {"rotate": jax.tree_util.Partial(_turn, angles=angles)}

    @property
    def _head_channels(self) -> int:
        return self.size[0] // self.size[2]


_turn = functools.partial(apply_rotary, interleaved=True)


def _places(count: int, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Column and row of every token."""
    if grid[0] != 1 or count != math.prod(grid):
        raise ValueError(f"2-D rotary embeddings are for the patches of single frames alone; got {count} in {grid}.")
    return np.arange(count) % grid[2], np.arange(count) // grid[2]


def _mixed_frequencies(key: Array, shape: tuple[int, ...], heads: int, theta: float) -> Array:
    """The axial ones, turned by another random angle in each layer and head: ``(2, layers, heads x pairs)``."""
    _, depth, pairs = shape
    length = theta ** (-jnp.arange(0, pairs // heads, 2) * 2 / (pairs // heads) / 2)
    angle = jax.random.uniform(key, (depth, heads, 1), maxval=2 * jnp.pi)
    both = jnp.concatenate([angle + jnp.zeros_like(length), angle + jnp.pi / 2 + jnp.zeros_like(length)], axis=-1)
    length = jnp.concatenate([length, length])
    return jnp.stack([length * jnp.cos(both), length * jnp.sin(both)]).reshape(shape)


class Encoder(nn.Module):
    """Patches to what the bottleneck reads. Fields as in `Model`."""

    out_channels: int
    patch: tuple[int, int, int]
    tokens: int | None
    size: tuple[int, int, int]
    positions: str
    grid: Grid | None
    blocks: Blocks

    @nn.compact
    def __call__(self, pixels: Array) -> Array:  # (b t h w 3) -> (b t/q h/p w/p d), or (b n d)
        width, dtype = self.size[0], self.blocks.dtype
        x = nn.DenseGeneral(width, axis=(-4, -3, -2, -1), dtype=dtype, name="embed")(_cut(pixels, self.patch))
        batch, *grid = x.shape[:-1]
        grid = tuple(grid)
        positions = pick("positions", self.positions, POSITIONS)(self.grid, width, "positions")
        x = x.reshape(batch, -1, width) + jnp.asarray(positions(grid), x.dtype)
        if self.tokens is not None:
            code = sincos_positions((self.tokens, 1, 1), width, axes=1).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(code, (batch, *code.shape)), x], axis=1)
        x = Transformer(self.size, self.blocks, name="transformer")(x, grid)[:, : self.tokens]
        x = nn.Dense(self.out_channels, dtype=dtype, name="to_code")(x)
        return x.reshape(batch, *grid, -1) if self.tokens is None else x


class Decoder(nn.Module):
    """Codes to pixels. Fields as in `Model`."""

    patch: tuple[int, int, int]
    tokens: int | None
    size: tuple[int, int, int]
    positions: str
    grid: Grid | None
    blocks: Blocks

    @nn.compact
    def __call__(self, latents: Array) -> Array:  # (b t h w d), or (b n d) -> (b t*q h*p w*p 3), float32
        width, dtype, style = self.size[0], self.blocks.dtype, STYLES[self.blocks.style]
        batch, *grid = latents.shape[:-1]
        grid = tuple(grid) if self.tokens is None else self.grid
        x = nn.Dense(width, dtype=dtype, name="from_code")(latents.astype(dtype)).reshape(batch, -1, width)
        positions = pick("positions", self.positions, POSITIONS)(self.grid, width, "positions")(grid)
        positions = jnp.asarray(positions, x.dtype)
        if self.tokens is None:
            x = x + positions
        else:
            x = jnp.concatenate([x, jnp.broadcast_to(positions, (batch, math.prod(grid), width))], axis=1)
        x = Transformer(self.size, self.blocks, name="transformer")(x, grid)[:, -math.prod(grid) :]
        x = nn.DenseGeneral((*self.patch, 3), use_bias=style.bias_per_pixel, dtype=dtype, name="to_pixels")(x)
        x = x.astype(jnp.float32)
        if not style.bias_per_pixel:
            x = x + self.param("colour", nn.initializers.zeros_init(), (3,), jnp.float32)
        return style.output(_joined(x.reshape(batch, *grid, *self.patch, 3)))


def _cut(pixels: Array, patch: tuple[int, int, int]) -> Array:
    """``(b t h w c)`` -> ``(b t/q h/p w/p q p p c)``."""
    b, *sizes, c = pixels.shape
    if any(size % side for size, side in zip(sizes, patch, strict=True)):
        raise ValueError(f"frames, height and width must be multiples of the patch {patch}; got shape {pixels.shape}.")
    blocks = [part for size, side in zip(sizes, patch, strict=True) for part in (size // side, side)]
    return pixels.reshape(b, *blocks, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)


def _joined(patches: Array) -> Array:
    """The inverse of `_cut`."""
    b, t, h, w, q, p, r, c = patches.shape
    return patches.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t * q, h * p, w * r, c)


# --------------------------------------------------------------------------------------------------------------- model


class Model(nn.Module):
    """Patches, encoder, bottleneck, decoder, patches.

    Clips are one sequence of tokens, without causality. A model of images takes ``(B, H, W, 3)``, and also takes clips
    as one sequence, as the authors' code does; `Tokenizer.encode` gives it frame by frame.

    Attributes:
      bottleneck: a Gaussian, or the identity.
      latent_channels: channels of a code: the second factor of E.
      patch: (frames, height, width) of a patch, which decides the first.
      encoder, decoder: width, layers and heads, see `SIZES`.
      tokens: number of codes of a one-dimensional tokenizer, ``None`` for one per patch.
      lengths: numbers of codes that training keeps at random, the others being a mask token; empty keeps all.
      positions: of encoder and decoder, see `POSITIONS`; a one-dimensional decoder needs some.
      rotary: how queries and keys turn: ``none``, by the number of the token (``sequence``), by column and row
        (``axial``), by learned mixtures of these (``mixed``).
      theta: base of the rotary frequencies.
      grid: patches along (time, height, width) of what learned tables and one-dimensional codes are for, or that
        resampled tables are stored in.
      video: whether the tokenizer is one of clips.
      style: what else blocks and pixels are like, see `STYLES`.
      kv_groups: so many queries share keys and values.
      window: of tokens before and after its own that a token sees, row by row; ``None`` is all.
      remat: what the backward pass computes again: none, full, dots, see `nn.scan.REMAT`.
      dtype: compute dtype; parameters, norms' statistics, softmax, the bottleneck and the output are float32.
    """

    bottleneck: nn.Module = DiagonalGaussian()
    latent_channels: int = 16
    patch: tuple[int, int, int] = (1, 16, 16)
    encoder: tuple[int, int, int] = SIZES["S"]
    decoder: tuple[int, int, int] = SIZES["B"]
    tokens: int | None = None
    lengths: tuple[int, ...] = ()
    positions: tuple[str, str] = ("none", "none")
    rotary: str = "sequence"
    theta: float = THETA
    grid: Grid | None = None
    video: bool = False
    style: str = "vitok"
    kv_groups: int = 1
    window: tuple[int, int] | None = None
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        if self.grid is None and "resampled" in self.positions:
            raise ValueError(f"positions={self.positions} need a grid that they are stored in, got None.")
        if self.tokens is not None and self.positions[1] == "none":
            raise ValueError("the decoder of one-dimensional codes needs positions, got none.")
        blocks = Blocks(self.style, self.rotary, self.theta, self.kv_groups, self.window, self.remat, self.dtype)
        channels = self.bottleneck.input_channels(self.latent_channels)
        before, after = self.positions
        self.encode_patches = Encoder(channels, self.patch, self.tokens, self.encoder, before, self.grid, blocks)
        self.decode_codes = Decoder(self.patch, self.tokens, self.decoder, after, self.grid, blocks)
        if self.lengths:
            self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (self.latent_channels,))

    @property
    def spec(self) -> Spec:
        return Spec(
            compression=self.patch,
            latent_channels=self.latent_channels,
            codebook_size=self.bottleneck.codebook_size,
            causal=not self.video,
            video=self.video,
            last_layer="decode_codes/to_pixels/kernel",
            tokens_per_item=self.tokens,
        )

    @property
    def input_size(self) -> tuple[int, int] | None:
        """The height and width that it takes; ``None`` is any multiple of the patch."""
        return self._only_clip and self._only_clip[1:]

    @property
    def input_frames(self) -> int | None:
        """The frames of a clip that it takes; ``None`` is any multiple of the patch."""
        return self._only_clip and self._only_clip[0]

    @property
    def _only_clip(self) -> tuple[int, int, int] | None:
        if self.tokens is None and "learned" not in self.positions:
            return None
        if self.grid is None:
            raise ValueError(
                f"positions={self.positions} and tokens={self.tokens} need a grid that they are for, got None."
            )
        return tuple(count * side for count, side in zip(self.grid, self.patch, strict=True))

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b [t] h w 3) in [-1, 1] -> (b [t] h w d)
        """One-dimensional codes are ``(b n d)``."""
        clips = pixels if pixels.ndim == 5 else pixels[:, None]
        clips = constrain(clips, "batch", "time", "height", "width", "channel")
        z = self.encode_patches(clips.astype(self.dtype))
        if pixels.ndim == 4 and self.tokens is None:
            z = z[:, 0]
        encoding = self.bottleneck(z.astype(jnp.float32), train)
        return encoding.replace(latents=self._cut_at_random(encoding.latents)) if train and self.lengths else encoding

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b [t] h w d), (b n d) -> (b [t] h w 3)
        """A model that has learned ``lengths`` takes the first so many of its one-dimensional codes as well."""
        if self.tokens is not None:
            return self._as_images(self.decode_codes(self._filled(latents)))
        if latents.ndim == 5:
            return self.decode_codes(latents)
        return self.decode_codes(latents[:, None])[:, 0]

    def _as_images(self, clips: Array) -> Array:
        return clips if self.video else clips[:, 0]

    def _filled(self, latents: Array) -> Array:  # (b m d) -> (b n d)
        missing = self.tokens - latents.shape[1]
        if missing < 0 or (missing and not self.lengths):
            raise ValueError(f"this decoder takes {self.tokens} codes, got latents of shape {latents.shape}.")
        if not missing:
            return latents
        rest = jnp.broadcast_to(self.mask_token, (latents.shape[0], missing, self.latent_channels))
        return jnp.concatenate([latents, rest.astype(latents.dtype)], axis=1)

    def _cut_at_random(self, latents: Array) -> Array:  # (b ... d) -> same
        flat = latents.reshape(latents.shape[0], -1, self.latent_channels)
        length = jax.random.choice(self.make_rng("bottleneck"), jnp.asarray(self.lengths), (flat.shape[0], 1, 1))
        kept = jnp.arange(flat.shape[1])[:, None] < length
        return jnp.where(kept, flat, self.mask_token).reshape(latents.shape)

    def indices_to_latents(self, indices: Array) -> Array:  # (b [t] h w) -> (b [t] h w d)
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


# ------------------------------------------------------------------------------------------------------------ variants

_CODE = "https://github.com/philippe-eecs/vitok"
_LICENSE = "no weights are public"


def _paper(sizes: str, patch: tuple[int, int, int], note: str = "", **fields: Any) -> Variant:
    """``S-L``: the encoder has the layers of S, both have the width and heads of L."""
    first, second = sizes.split("-")
    width, depth, heads = SIZES[second]
    config = {"encoder": (width, SIZES[first][1], heads), "decoder": (width, depth, heads), "patch": patch}
    return Variant(
        config={**config, **fields}, paper="https://arxiv.org/abs/2501.09755", source=_CODE, license=_LICENSE, note=note
    )


def _clips(sizes: str, patch: tuple[int, int, int], note: str) -> Variant:
    return _paper(sizes, patch, note, video=True, positions=("sincos3d", "sincos3d"))


def _naflex(patch: int, channels: int) -> Variant:
    side = 2048 // patch + 1
    config: Mapping[str, Any] = {
        "style": "naflex",
        "encoder": NAFLEX_SIZES["S"],
        "decoder": NAFLEX_SIZES["B"],
        "patch": (1, patch, patch),
        "latent_channels": channels,
        "bottleneck": UNCLAMPED,
        "positions": ("resampled", "resampled"),
        "rotary": "none",
        "grid": (1, side, side),
        "kv_groups": 2,
        "window": (128, 128),
    }
    return Variant(
        config=config,
        paper="https://arxiv.org/abs/2501.09755 (its predecessor)",
        source=_CODE,
        license=_LICENSE,
        note="any aspect ratio",
    )


# The successor's log-variance is not clamped.
UNCLAMPED = {"name": "gaussian", "min_logvar": -1e30, "max_logvar": 1e30}

_R256, _R128 = "on ImageNet at 256 x 256", "on UCF-101, 16 frames at 128 x 128"
VARIANTS = {
    "vitok-s-b-16": _paper("S-B", (1, 16, 16), f"rFID 0.50, PSNR 24.36 {_R256}"),
    "vitok-s-l-16": _paper("S-L", (1, 16, 16), f"rFID 0.46, PSNR 24.74 {_R256}"),
    "vitok-b-b-16": _paper("B-B", (1, 16, 16)),
    "vitok-b-l-16": _paper("B-L", (1, 16, 16)),
    "vitok-l-l-16": _paper("L-L", (1, 16, 16)),
    "vitok-s-b-4x8": _clips("S-B", (4, 8, 8), f"rFVD 8.04, PSNR 30.11 {_R128}"),
    "vitok-s-b-8x8": _clips("S-B", (8, 8, 8), f"rFVD 20.05, PSNR 28.55 {_R128}"),
    "vitok-s-b-4x16": _clips("S-B", (4, 16, 16), f"rFVD 53.98, PSNR 26.26 {_R128}"),
    "vitok-s-l-4x8": _clips("S-L", (4, 8, 8), ""),
    "vitok-b-l-4x8": _clips("B-L", (4, 8, 8), ""),
    "vitok-naflex-s-b-16x32": _naflex(16, 32),
    "vitok-naflex-s-b-16x64": _naflex(16, 64),
    "vitok-naflex-s-b-24x64": _naflex(24, 64),
}
