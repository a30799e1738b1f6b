"""Frozen vision transformers that latents are aligned with, or discriminators look through: DINOv2 and MAE.

https://arxiv.org/abs/2304.07193 and https://arxiv.org/abs/2111.06377, as VA-VAE reads them (LightningDiT
`vavae/ldm/models/foundation_models.py` on timm's models): one vector per 16x16 pixels, from pixels in [-1, 1] without
ImageNet's normalization. DINOv2, whose patches have 14 pixels, sees the image at 14/16 of its size.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..convert import foundation as names
from ..convert.engine import to_tree
from ..convert.files import read_state_dict
from ..errors import pick
from ..nn.attention import Attention
from ..nn.blocks import MLP, TransformerBlock
from ..nn.conv import Conv2d
from ..nn.norm import LayerNorm
from . import weights

Array = jax.Array

STRIDE = 16  # pixels per feature

_DINOV2 = {"patch": 14, "table": 37, "layer_scale": True}
_SMALL, _BASE = {"width": 384, "depth": 12, "heads": 6}, {"width": 768, "depth": 12, "heads": 12}
_REGISTERS = {"registers": 4}

FOUNDATION = {
    "dinov2_small": (_DINOV2 | _SMALL, "dinov2_vits14"),
    "dinov2_base": (_DINOV2 | _BASE, "dinov2_vitb14"),
    "dinov2_large": (_DINOV2, "dinov2_vitl14"),
    "dinov2_small_registers": (_DINOV2 | _SMALL | _REGISTERS, "dinov2_vits14_reg4"),
    "dinov2_base_registers": (_DINOV2 | _BASE | _REGISTERS, "dinov2_vitb14_reg4"),
    "dinov2_large_registers": (_DINOV2 | _REGISTERS, "dinov2_vitl14_reg4"),
    "mae_large": ({"patch": 16, "table": 14, "layer_scale": False}, "mae_vitl16"),
}


class VisionTransformer(nn.Module):
    """Class token, learned positions, pre-norm blocks, final norm; returns the tokens of the patches.

    Attributes:
      width, depth, heads: of the transformer.
      patch: side of a patch, in pixels of the image at ``patch / 16`` of its size.
      table: side of the grid that positions are stored for; others are resampled (bicubic, antialiased).
      layer_scale: whether each branch is scaled per channel.
      registers: tokens without a place between that of the class and the patches (https://arxiv.org/abs/2309.16588).
      dtype: compute dtype; norms' statistics and softmax are float32.
    """

    width: int = 1024
    depth: int = 24
    heads: int = 16
    patch: int = 16
    table: int = 14
    layer_scale: bool = False
    registers: int = 0
    dtype: Any = jnp.float32

    def __call__(self, pixels: Array) -> Array:  # (b h w 3) in [-1, 1] -> (b h/16 w/16 width), float32
        *_, height, width, _ = pixels.shape
        x = self.tokens(pixels)[0][:, 1 + self.registers :]
        return x.reshape(x.shape[0], height // STRIDE, width // STRIDE, self.width).astype(jnp.float32)

    @nn.compact
    def tokens(self, pixels: Array, depths: tuple[int, ...] | None = None) -> tuple[Array, tuple[Array, ...]]:
        """All tokens ``(B, 1 + registers + n, width)``, that of the class first, and what they were on the way.

        Args:
          pixels: ``(B, H, W, 3)``.
          depths: blocks, counted from 0, after which tokens are wanted; those before the first block come first.
        """
        *_, height, width, _ = pixels.shape
        if pixels.ndim != 4 or height % STRIDE or width % STRIDE:
            raise ValueError(
                f"features need images (B, H, W, 3), H and W multiples of {STRIDE}; got shape {pixels.shape}."
            )
        grid = height // STRIDE, width // STRIDE
        size = (pixels.shape[0], grid[0] * self.patch, grid[1] * self.patch, pixels.shape[-1])
        x = jax.image.resize(pixels.astype(jnp.float32), size, "bilinear", antialias=False).astype(self.dtype)
        x = Conv2d(self.width, self.patch, strides=self.patch, padding=0, dtype=self.dtype, name="patch_embed")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        first = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, self.width)).astype(x.dtype), x], axis=1)
        x = x + self._positions(grid).astype(x.dtype)
        if self.registers:
            shape = (1, self.registers, self.width)
            more = self.param("register_tokens", nn.initializers.normal(0.02), shape, jnp.float32)
            more = jnp.broadcast_to(more, (x.shape[0], *shape[1:])).astype(x.dtype)
            x = jnp.concatenate([x[:, :1], more, x[:, 1:]], axis=1)
        found = [] if depths is None else [x]
        for i in range(self.depth):
            x = self._block(f"block{i}")(x)
            if i in (depths or ()):
                found.append(x)
        return LayerNorm(epsilon=1e-6, name="norm")(x), tuple(found)

    def _positions(self, grid: tuple[int, int]) -> Array:  # (1 1+n c)
        shape = (1, 1 + self.table**2, self.width)
        table = self.param("pos_embed", nn.initializers.normal(0.02), shape, jnp.float32)
        if grid == (self.table, self.table):
            return table
        patches = table[0, 1:].reshape(self.table, self.table, self.width)
        patches = jax.image.resize(patches, (*grid, self.width), "cubic", antialias=True)
        return jnp.concatenate([table[:, :1], patches.reshape(1, -1, self.width)], axis=1)

    def _block(self, name: str) -> TransformerBlock:
        return TransformerBlock(
            functools.partial(Attention, num_heads=self.heads, fused_qkv=True, dtype=self.dtype),
            functools.partial(MLP, 4 * self.width, dtype=self.dtype),
            functools.partial(LayerNorm, epsilon=1e-6),
            layer_scale=1e-5 if self.layer_scale else None,
            name=name,
        )


def load(
    name: str, path: str | pathlib.Path | None = None, dtype: Any = jnp.float32
) -> tuple[VisionTransformer, dict[str, Any]]:
    """A foundation model with published weights, as ``(module, variables)``.

    Args:
      name: one of `FOUNDATION`.
      path: its weight file, or a VA-VAE checkpoint, which holds the model it was trained with; ``None`` looks in
        ``$TOKENIZERS_WEIGHTS``.
      dtype: compute dtype of the module.

    Raises:
      MissingWeights: there is no such file.
      ValueError: for an unknown name, and where a file holds other tensors than this network's.
    """
    fields, file = pick("foundation model", name, FOUNDATION)
    module = VisionTransformer(**fields, dtype=dtype)
    if path == weights.SHAPES:
        return module, _shapes(module)
    return module, variables(module, read_state_dict(weights.find(file, path)))


def variables(module: VisionTransformer, state_dict: Any) -> dict[str, Any]:
    """Variables of a module from an official state dict."""
    return to_tree(names.TABLE, _shapes(module), names.plain_names(state_dict), ignore=names.IGNORE)


def _shapes(module: VisionTransformer) -> dict[str, Any]:
    image = jax.ShapeDtypeStruct((1, 2 * STRIDE, 2 * STRIDE, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), image)
