"""CLIP's text transformer (https://arxiv.org/abs/2103.00020), as OpenCLIP writes it: token ids to one vector."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import pick
from ..parallel.constrain import constrain
from .attention import Attention
from .blocks import MLP, TransformerBlock, gelu
from .norm import LayerNorm
from .scan import scan_layers

Array = jax.Array


def quick_gelu(x: Array) -> Array:
    """The GELU of CLIP's first models, https://arxiv.org/abs/1606.08415."""
    return x * nn.sigmoid(1.702 * x)


# Which position stands for the text, from ids (b l) and outputs (b l c). The end of text has the largest id.
POOLS = {
    "argmax": lambda ids, x: x[jnp.arange(x.shape[0]), jnp.argmax(ids, axis=-1)],
    "first": lambda ids, x: x[:, 0],
    "last": lambda ids, x: x[:, -1],
    "all": lambda ids, x: x,  # every position for itself
}

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


class TextTower(nn.Module):
    """Embedding, learned positions, pre-norm blocks, final norm, the vector of one position, projection.

    Attributes:
      vocabulary: number of token ids.
      context: most tokens of a text.
      width, layers, heads: of the transformer.
      features: channels of the result; ``None`` leaves the projection out.
      mlp_ratio: of the hidden channels to the width.
      activation: see `ACTIVATIONS`.
      layer_scale: initial value of layer scales, or ``None``.
      causal: whether a token sees only those up to itself.
      pool: see `POOLS`.
      projection_bias: of the projection.
      class_token: a learned token behind the text, which sees all of it but padding (CoCa), is what is pooled.
      pad_id: of padding, where there is a class token.
      remat: see `scan.REMAT`.
      dtype: compute dtype; norms' statistics, softmax and the result are float32.
    """

    vocabulary: int = 49408
    context: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    features: int | None = 768
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    layer_scale: float | None = None
    causal: bool = True
    pool: str = "argmax"
    projection_bias: bool = False
    class_token: bool = False
    pad_id: int = 0
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> tuple[Array, Array]:  # (b l) -> (b e), (b l c); (b l e) with pool="all"
        """The text's vector, not normalized, and the outputs of its tokens before the final norm, float32."""
        length = ids.shape[1] + self.class_token
        rows = self.context + self.class_token
        if ids.ndim != 2 or length > rows:
            raise ValueError(f"texts are token ids (B, L), L at most {self.context}; got shape {ids.shape}.")
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=nn.initializers.normal(0.02), name="tokens")
        positions = self.param("positions", nn.initializers.normal(0.01), (rows, self.width), jnp.float32)
        x = embed(ids)
        mask = jnp.tri(length, dtype=bool)[None, None] if self.causal else None
        if self.class_token:
            token = self.param("class_token", nn.initializers.normal(0.01), (self.width,), jnp.float32)
            x = jnp.concatenate([x, jnp.broadcast_to(token, (ids.shape[0], 1, self.width))], axis=1)
            mask = mask & self._seen(ids)
        x = (x + positions[:length]).astype(self.dtype)
        x = constrain(x, "batch", None, None)
        norm = functools.partial(LayerNorm, epsilon=1e-5, dtype=self.dtype)
        layer = TransformerBlock(
            attention=functools.partial(Attention, self.heads, fused_qkv=True, dtype=self.dtype),
            mlp=functools.partial(
                MLP,
                int(self.width * self.mlp_ratio),
                activation=pick("activation of the text tower", self.activation, ACTIVATIONS),
                dtype=self.dtype,
            ),
            norm=norm,
            layer_scale=self.layer_scale,
            name="layers",
        )
        x = scan_layers(layer, self.layers, x, remat=self.remat, mask=mask)
        final = norm(name="norm")
        pooled = x[:, -1] if self.class_token else pick("pool of the text tower", self.pool, POOLS)(ids, x)
        tokens = x[:, :-1] if self.class_token else x
        pooled = final(pooled)
        if self.features is not None:
            start = nn.initializers.normal(self.width**-0.5)
            pooled = nn.Dense(
                self.features, use_bias=self.projection_bias, kernel_init=start, dtype=self.dtype, name="projection"
            )(pooled)
        return pooled.astype(jnp.float32), tokens.astype(jnp.float32)

    def _seen(self, ids: Array) -> Array:  # (b l) -> (b 1 l+1 l+1)
        """What padding allows the class token to see; the row of OpenCLIP's mask begins one place late."""
        row = jnp.pad(ids != self.pad_id, ((0, 0), (1, 0)), constant_values=True)
        others = jnp.ones((ids.shape[0], ids.shape[1], row.shape[1]), bool)
        return jnp.concatenate([others, row[:, None]], axis=1)[:, None]
