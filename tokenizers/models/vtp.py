"""VTP (https://arxiv.org/abs/2512.13687): a ViT whose features reconstruct, and are CLIP's and DINO's as well.

One ViT is trained by three objectives: to reconstruct images from a narrow linear layer on its patch tokens, to match
captions (CLIP), and by self-distillation with masked patches (DINO, iBOT). Another ViT turns the narrow latents, 64
channels for 16x16 pixels, into pixels again. Generators learn better in latents that also understand.

Queries and keys turn by the place of their patch, in coordinates between -1 and 1. The released weights were trained
with this done in bfloat16, every step of it, and with float32 instead the outputs change in the third digit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import pick
from ..nn.attention import Attention
from ..nn.blocks import MLP, SwiGLU, TransformerBlock, survivors
from ..nn.norm import LayerNorm, RMSNorm
from ..nn.resample import depth_to_space, space_to_depth
from ..nn.scan import scan_layers
from ..nn.text import TextTower
from ..parallel.constrain import constrain
from ..pixels import IMAGENET_MEAN, IMAGENET_STD
from ..quantize.identity import Identity
from ..types import Array, Encoding, Spec, Variant

SYSTEM = "vtp"

# Width, layers, heads, of the encoder and of the decoder.
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}

# The networks work on ImageNet's normalized colours.
MEAN, STD = IMAGENET_MEAN, IMAGENET_STD

DECODER_PATCH = 16

NORMS = {
    "rmsnorm": functools.partial(RMSNorm, epsilon=1e-5),
    "layernorm": functools.partial(LayerNorm, epsilon=1e-6),
    "layernormbf16": functools.partial(LayerNorm, epsilon=1e-5),
}


def _swiglu(width: int, ratio: float, dtype: Any, multiple: int) -> Any:
    hidden = int(int(width * ratio) * 2 / 3)
    return functools.partial(SwiGLU, -(-hidden // multiple) * multiple, dtype=dtype)


# From (width, ratio, dtype) to a module: two thirds of the width, rounded up, or a plain MLP.
MLPS = {
    "swiglu": functools.partial(_swiglu, multiple=8),
    "swiglu32": functools.partial(_swiglu, multiple=32),
    "swiglu64": functools.partial(_swiglu, multiple=64),
    "swiglu128": functools.partial(_swiglu, multiple=128),
    "mlp": lambda width, ratio, dtype: functools.partial(MLP, int(width * ratio), dtype=dtype),
}

# ------------------------------------------------------------------------------------------------------------- rotation


def rotary_table(
    grid: tuple[int, int],
    channels: int,
    *,
    dtype: str = "bfloat16",
    base: float = 100.0,
    periods: tuple[float, float] | None = None,
    coordinates: str = "separate",
) -> tuple[np.ndarray, np.ndarray]:
    """Sines and cosines ``(h w, channels / 2)`` of the angles of the rows, then of the columns, float32.

    Args:
      grid: height and width in patches.
      channels: of a head.
      dtype: ``bfloat16`` rounds to it after every operation, ``float32`` never.
      base: the longest period over the shortest.
      periods: (shortest, longest) in place of ``base``.
      coordinates: divided by the size of their own axis (``separate``), or by the smaller (``min``) or larger
        (``max``) of the two.
    """
    r = pick("dtype of the rotation", dtype, {"bfloat16": _rounded, "float32": np.float32})
    sides = {"separate": grid, "min": (min(grid),) * 2, "max": (max(grid),) * 2}
    sides = pick("coordinates", coordinates, sides)
    count = channels // 4
    if periods is None:
        exponents = r(r(2 * np.arange(count)) / np.float32(channels // 2))
        lengths = r(np.power(np.float32(base), exponents))
    else:
        ratio = np.float32(periods[1] / periods[0])
        lengths = r(ratio ** np.linspace(0, 1, count, dtype=np.float32) / ratio * np.float32(periods[1]))
    angles = []
    for size, side in zip(grid, sides, strict=True):
        places = r((np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(side))
        places = r(r(2 * places) - 1)
        angles.append(r(r(np.float32(2 * math.pi) * places)[:, None] / lengths))
    rows, columns = np.broadcast_to(angles[0][:, None], (*grid, count)), np.broadcast_to(angles[1], (*grid, count))
    angle = np.concatenate([rows, columns], axis=-1).reshape(-1, 2 * count)
    return r(np.sin(angle)), r(np.cos(angle))


def _rounded(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float32)


def _turn(x: Array, sines: np.ndarray, cosines: np.ndarray, dtype: str) -> Array:  # (b n heads d) -> same
    """Turns the last tokens, those of patches. In bfloat16 the class token in front of them is rounded as well."""

    def r(value: Array) -> Array:  # a cast forth and back may be optimized away
        return jax.lax.reduce_precision(value, 8, 7) if dtype == "bfloat16" else value

    y = r(x.astype(jnp.float32))
    first, second = jnp.split(y[:, -len(sines) :], 2, axis=-1)
    sines, cosines = jnp.asarray(sines)[:, None], jnp.asarray(cosines)[:, None]
    turned = [r(r(first * cosines) + r(-second * sines)), r(r(second * cosines) + r(first * sines))]
    front = y[:, : -len(sines)]
    return jnp.concatenate([front, jnp.concatenate(turned, axis=-1)], axis=1).astype(x.dtype)


# --------------------------------------------------------------------------------------------------------- transformers


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of one of the two ViTs; fields as in `Model`, each for this one."""

    size: tuple[int, int, int]
    norm: str
    mlp: str
    mlp_ratio: float
    layer_scale: float | None
    qk_norm: bool
    rotation: str
    remat: str
    dtype: Any

    def run(self, x: Array, grid: tuple[int, int], keep: Array | None = None) -> tuple[Array, Array]:
        """``(b n c)``, the patches of a grid last, -> the same, and what every layer gave. In a compact method.

        ``keep`` ``(layers, 2, b)`` are `survivors` of stochastic depth.
        """
        width, depth, heads = self.size
        sines, cosines = rotary_table(grid, width // heads, dtype=self.rotation)
        layer = TransformerBlock(
            attention=functools.partial(
                Attention,
                heads,
                fused_qkv=True,
                qk_norm="rms" if self.qk_norm else None,
                qk_norm_epsilon=1e-5,
                dtype=self.dtype,
            ),
            mlp=pick("mlp", self.mlp, MLPS)(width, self.mlp_ratio, self.dtype),
            norm=functools.partial(pick("norm", self.norm, NORMS), dtype=self.dtype),
            layer_scale=self.layer_scale,
            name="layers",
        )
        rotate = functools.partial(_turn, sines=sines, cosines=cosines, dtype=self.rotation)
        x = constrain(x.astype(self.dtype), "batch", None, None)
        each = {} if keep is None else {"keep": keep}
        return scan_layers(layer, depth, x, each=each, remat=self.remat, collect=True, rotate=rotate)


class Trunk(nn.Module):
    """The encoder: patches, class token, blocks; without the final norm, which is the model's."""

    blocks: Blocks
    patch: int

    @nn.compact
    def __call__(self, images: Array, masks: Array | None = None, drop: float = 0.0) -> tuple[Array, Array]:
        """Normalized images ``(b h w 3)`` -> tokens ``(b 1+n c)``, class token first, and those of every layer.

        For training: ``masks`` ``(b n)``, true where a patch is replaced by the mask token (iBOT), and the rate
        ``drop`` of stochastic depth (rng stream ``dropout``).
        """
        width, dtype = self.blocks.size[0], self.blocks.dtype
        x = space_to_depth(images.astype(dtype), (self.patch, self.patch))
        batch, *grid, _ = x.shape
        bound = functools.partial(_uniform, bound=(3 * self.patch**2) ** -0.5)
        x = nn.Dense(width, kernel_init=bound, bias_init=bound, dtype=dtype, name="patches")(x)
        x = x.reshape(batch, -1, width)
        first = self.param("class_token", nn.initializers.normal(0.02), (1, 1, width), jnp.float32)
        mask_token = self.param("mask_token", nn.initializers.zeros_init(), (1, width), jnp.float32)
        if masks is not None:
            x = jnp.where(masks[..., None], mask_token.astype(x.dtype), x)
        x = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, width)).astype(x.dtype), x], axis=1)
        keep = survivors(self.make_rng("dropout"), self.blocks.size[1], batch, drop) if drop else None
        return self.blocks.run(x, tuple(grid), keep)


def _uniform(key: Array, shape: tuple[int, ...], dtype: Any, bound: float) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class PixelDecoder(nn.Module):
    """Latents to normalized images."""

    blocks: Blocks

    @nn.compact
    def __call__(self, latents: Array) -> Array:  # (b h w d) -> (b 16 h 16 w 3), float32
        width, dtype = self.blocks.size[0], self.blocks.dtype
        batch, *grid, _ = latents.shape
        start = nn.initializers.truncated_normal(0.02)
        x = nn.Dense(width, kernel_init=start, dtype=dtype, name="proj_in")(latents.astype(dtype))
        x, _ = self.blocks.run(x.reshape(batch, -1, width), tuple(grid))
        x = NORMS[self.blocks.norm](dtype=dtype, name="norm")(x)
        x = nn.Dense(3 * DECODER_PATCH**2, kernel_init=start, dtype=dtype, name="proj_out")(x).astype(jnp.float32)
        return depth_to_space(x.reshape(batch, *grid, -1), (DECODER_PATCH,) * 2, order="channel_outer")


# --------------------------------------------------------------------------------------------------------------- model


class Model(nn.Module):
    """The tokenizer, and CLIP's two encoders. Pixels come and go in [-1, 1].

    Fields in pairs are of the encoder and of the decoder.

    Attributes:
      bottleneck: nothing happens to latents.
      latent_channels: of the layer that latents leave through; there is none if this is the encoder's width.
      patch: of the encoder. The decoder's is 16.
      encoder, decoder: width, layers and heads, see `SIZES`; the decoder may be ``None``, for understanding alone.
      norm, mlp, layer_scale, qk_norm: of the blocks, see `NORMS` and `MLPS`.
      mlp_ratio: of the encoder's MLPs; the decoder's is 4.
      rotation: dtype of the rotary embedding: ``bfloat16`` as released, or ``float32``, for training.
      clip: whether there is a text tower, and a projection to the space that it shares with images.
      clip_feature: what is projected there: ``cls``, or the mean of the patches (``pooled``).
      bottleneck_ae_only: whether that is read before the layer that latents leave through.
      text_tower: fields of `nn.text.TextTower` as pairs (name, value), where they differ.
      clip_scale: initial log of the factor of CLIP's logits.
      clip_bias: initial value of what is added to them, or ``None``.
      scalar_scale: whether these have no axis; otherwise one of size 1.
      remat: what the backward pass computes again: none, full, dots.
      dtype: compute dtype; parameters, norms' statistics, softmax and all results are float32.
    """

    bottleneck: nn.Module = Identity()
    latent_channels: int = 64
    patch: int = 16
    encoder: tuple[int, int, int] = SIZES["L"]
    decoder: tuple[int, int, int] | None = SIZES["L"]
    norm: tuple[str, str] = ("rmsnorm", "layernorm")
    mlp: tuple[str, str] = ("swiglu", "swiglu")
    mlp_ratio: float = 4.0
    layer_scale: tuple[float | None, float | None] = (None, None)
    qk_norm: tuple[bool, bool] = (False, False)
    rotation: str = "bfloat16"
    clip: bool = True
    clip_feature: str = "cls"
    bottleneck_ae_only: bool = True
    text_tower: tuple[tuple[str, Any], ...] = ()
    clip_scale: float = math.log(1 / 0.07)
    clip_bias: float | None = None
    scalar_scale: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        sizes, ratios = (self.encoder, self.decoder), (self.mlp_ratio, 4.0)
        parts = zip(sizes, self.norm, self.mlp, ratios, self.layer_scale, self.qk_norm, strict=True)
        before, after = (Blocks(*part, self.rotation, self.remat, self.dtype) for part in parts)
        self.trunk = Trunk(before, self.patch)
        self.trunk_norm = pick("norm", self.norm[0], NORMS)(dtype=self.dtype)
        start = nn.initializers.truncated_normal(0.02)
        if self.latent_channels != self.encoder[0]:
            self.feature_bottleneck = nn.Dense(
                self.latent_channels, use_bias=False, kernel_init=start, dtype=self.dtype
            )
        if self.decoder is not None:
            self.pixel_decoder = PixelDecoder(after)
        if self.clip:
            tower = TextTower(**dict(self.text_tower), remat=self.remat, dtype=self.dtype)
            self.text_transformer = tower
            self.visual_proj = nn.Dense(tower.width, use_bias=False, kernel_init=start, dtype=self.dtype)
            shape = () if self.scalar_scale else (1,)
            self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.clip_scale), shape)
            if self.clip_bias is not None:
                self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.clip_bias), shape)

    @property
    def spec(self) -> Spec:
        return Spec(
            compression=(1, self.patch, self.patch),
            latent_channels=self.latent_channels,
            codebook_size=None,
            causal=True,
            video=False,
            last_layer="pixel_decoder/proj_out/kernel",
        )

    @property
    def text_length(self) -> int:
        """Most tokens of a text."""
        return TextTower(**dict(self.text_tower)).context

    # The tokenizer.

    def encode(self, pixels: Array, train: bool = False) -> Encoding:  # (b h w 3) in [-1, 1] -> (b h/16 w/16 d)
        return self.bottleneck(self.features(pixels, bottleneck=True)[0][1], train)

    def decode(self, latents: Array, train: bool = False) -> Array:  # (b h w d) -> (b 16 h 16 w 3)
        if self.decoder is None:
            raise ValueError("this model has no decoder: it was made for features alone.")
        return (self.pixel_decoder(latents) * STD + MEAN) * 2 - 1

    def indices_to_latents(self, indices: Array) -> Array:
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels: Array, train: bool = False) -> tuple[Array, Encoding]:
        if self.is_initializing() and self.clip:
            self.text_features(jnp.zeros((1, 2), jnp.int32))
            self.image_features(pixels)
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train) if self.decoder is not None else pixels, encoding

    # What it understands.

    def features(
        self,
        pixels: Array,
        layers: Sequence[int] = (-1,),
        bottleneck: bool = False,
        norm: bool = True,
        masks: Array | None = None,
        drop: float = 0.0,
    ) -> list[tuple[Array, Array]]:
        """Class token ``(b c)`` and patch tokens ``(b h w c)`` behind layers, float32.

        Args:
          pixels: ``(b h w 3)`` in [-1, 1].
          layers: numbers of layers, from 0, or from -1 at the end.
          bottleneck: tokens as they are where latents leave, ``latent_channels`` of them.
          norm: whether each passes the final norm.
          masks, drop: of training, see `Trunk`; masks are ``(b h/16 w/16)`` or flat.
        """
        pixels = constrain(pixels, "batch", "height", "width", "channel")
        if pixels.shape[1] % self.patch or pixels.shape[2] % self.patch:
            raise ValueError(f"height and width must be multiples of {self.patch}; got pixels of shape {pixels.shape}.")
        images = ((pixels.astype(jnp.float32) + 1) / 2 - MEAN) / STD
        last, every = self.trunk(images, None if masks is None else masks.reshape(len(masks), -1), drop)
        grid = pixels.shape[1] // self.patch, pixels.shape[2] // self.patch
        found = []
        for layer in layers:
            if not -every.shape[0] <= layer < every.shape[0]:
                raise ValueError(f"layers={tuple(layers)}: this encoder has {every.shape[0]} layers.")
            tokens = last if layer in (-1, every.shape[0] - 1) else every[layer]  # not kept unless they are read
            tokens = self.trunk_norm(tokens) if norm else tokens
            tokens = (self._narrow(tokens) if bottleneck else tokens).astype(jnp.float32)
            found.append((tokens[:, 0], tokens[:, 1:].reshape(tokens.shape[0], *grid, -1)))
        return found

    def _narrow(self, tokens: Array) -> Array:
        return tokens if self.latent_channels == self.encoder[0] else self.feature_bottleneck(tokens)

    def image_features(self, pixels: Array, drop: float = 0.0) -> Array:  # (b h w 3) -> (b e)
        """Of images, in the space of CLIP, not normalized."""
        self._check_clip()
        first, patches = self.features(pixels, bottleneck=not self.bottleneck_ae_only, drop=drop)[0]
        kinds = {"cls": first, "pooled": patches.mean((1, 2))}
        return self.visual_proj(pick("clip_feature", self.clip_feature, kinds)).astype(jnp.float32)

    def text_features(self, ids: Array) -> Array:  # (b l) -> (b e)
        """Of texts, in the same space, not normalized."""
        self._check_clip()
        return self.text_transformer(ids)[0]

    def clip_logits(self, pixels: Array, ids: Array) -> Array:  # (b h w 3), (t l) -> (b t)
        """How well images and texts match."""
        image, text = unit_length(self.image_features(pixels)), unit_length(self.text_features(ids))
        cosines = jnp.matmul(image, text.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.exp(self.logit_scale) * cosines + (0.0 if self.clip_bias is None else self.logit_bias)

    def _check_clip(self) -> None:
        if not self.clip:
            raise ValueError("this model has no text tower: it was trained without captions (clip=False).")


def unit_length(x: Array) -> Array:
    """Vectors of length 1 along the last axis, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# ------------------------------------------------------------------------------------------------------------ variants


def _released(name: str, size: str, rfid: float, accuracy: float) -> Variant:
    return Variant(
        config={"encoder": SIZES[size], "decoder": SIZES[size]},
        paper="https://arxiv.org/abs/2512.13687",
        source=f"https://huggingface.co/MiniMaxAI/{name}",
        license="see the model card",
        note=f"rFID {rfid} on ImageNet at 256 x 256, zero-shot accuracy {accuracy}%",
    )


VARIANTS = {
    "vtp-small-f16d64": _released("VTP-Small-f16d64", "S", 0.98, 66.7),
    "vtp-base-f16d64": _released("VTP-Base-f16d64", "B", 0.74, 73.2),
    "vtp-large-f16d64": _released("VTP-Large-f16d64", "L", 0.36, 78.2),
}
