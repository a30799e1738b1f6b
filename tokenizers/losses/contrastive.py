"""Image-text contrast: the softmax loss of CLIP and the sigmoid loss of SigLIP.

Both compare every image of the global batch with every text of it. The similarities are never there as a whole: blocks
of rows take turns, and over a mesh every device does its own rows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

# Similarities held at a time, per pass over a block of rows.
MAX_SIMILARITIES = 2**24


def normalize(features: Array, epsilon: float = 1e-12) -> Array:
    """``(..., D)`` to unit length, float32."""
    features = features.astype(jnp.float32)
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), epsilon)


def clip_loss(image: Array, text: Array, scale: Array, max_similarities: int = MAX_SIMILARITIES) -> Array:
    """Mean of the two cross-entropies, each image against all texts and each text against all images.

    https://arxiv.org/abs/2103.00020, as in open_clip (`ClipLoss`).

    Args:
      image, text: ``(B, D)`` of unit length; row i of both belong together.
      scale: factor of the similarities, the exponential of the learned ``logit_scale``.
      max_similarities: of B * B, how many are held at a time.

    Returns:
      float32 scalar.
    """

    def cross_entropy(rows, columns):
        def block(row, own):
            return jax.nn.logsumexp(scale * row @ columns.T, axis=-1) - scale * (row * own).sum(axis=-1)

        return _over_rows(block, (rows, columns), max_similarities).mean()

    return 0.5 * (cross_entropy(image, text) + cross_entropy(text, image))


def siglip_loss(
    image: Array, text: Array, scale: Array, bias: Array, max_similarities: int = MAX_SIMILARITIES
) -> Array:
    """Every pair is a question of its own: does this text belong to this image? Sum over pairs, divided by B.

    https://arxiv.org/abs/2303.15343, as in open_clip (`SigLipLoss`).

    Args:
      image, text: ``(B, D)`` of unit length; row i of both belong together.
      scale: factor of the similarities, the exponential of the learned one.
      bias: added to them.
      max_similarities: of B * B, how many are held at a time.

    Returns:
      float32 scalar.
    """

    def block(row, own):
        no = jax.nn.softplus(scale * row @ text.T + bias).sum(axis=-1)
        mine = scale * (row * own).sum(axis=-1) + bias
        return no - jax.nn.softplus(mine) + jax.nn.softplus(-mine)

    return _over_rows(block, (image, text), max_similarities).mean()


def _over_rows(block: Callable, rows: tuple[Array, Array], most: int) -> Array:
    """``block`` over rows ``(B, D)``, which makes B similarities of each; memory of the backward pass likewise."""
    count = rows[0].shape[0]
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    blocks = next(
        n for n in range(1, count + 1) if count % n == 0 and count * count <= n * most * devices or n == count
    )
    if blocks == 1:
        return block(*rows)
    # Block j holds the rows j, j + blocks, ...: rows that are spread over devices stay so in every block.
    parts = tuple(jnp.moveaxis(x.reshape(-1, blocks, x.shape[-1]), 1, 0) for x in rows)
    return jax.lax.map(jax.checkpoint(lambda part: block(*part)), parts).T.reshape(-1)
