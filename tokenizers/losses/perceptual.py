"""Perceptual losses on frozen networks: LPIPS (https://arxiv.org/abs/1801.03924), VGG content and Gram, ConvNeXt.

Every function here takes a frozen network as ``(module, variables)`` and returns pure functions of
``(prediction, target)``, images (B, H, W, 3) or videos (B, T, H, W, 3), float in [-1, 1].
A training step that takes ``variables`` as an argument (sharded, donated or exported) builds the loss inside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..networks import convnext
from ..networks.convnext import ConvNeXt
from ..networks.lpips import LPIPS
from ..networks.vgg import VGG16, VGG16Hidden, standardize

Array = jax.Array
Loss = Callable[[Array, Array], Array]

# Per VGG tap relu1_2 ... relu5_3, as in the Cosmos tokenizer's training code (cosmos-predict1, PerceptualLoss).
COSMOS_LAYER_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)


def lpips_per_sample(module: LPIPS, variables: Any) -> Loss:
    """``(prediction, target) -> (B,)``: LPIPS of every image; for a video the mean over its frames."""
    frozen = _on_device(variables)

    def loss(prediction: Array, target: Array) -> Array:
        distance = module.apply(frozen, _frames(prediction), _frames(target))
        return distance.reshape(prediction.shape[0], -1).mean(-1)

    return loss


def lpips_loss(module: LPIPS, variables: Any) -> Loss:
    """``(prediction, target) -> scalar``: the mean of `lpips_per_sample`."""
    return _mean(lpips_per_sample(module, variables))


def vgg_per_sample(
    module: VGG16, variables: Any, layer_weights: Sequence[float] = COSMOS_LAYER_WEIGHTS
) -> Callable[[Array, Array], dict[str, Array]]:
    """``(prediction, target) -> {"content": (B,), "gram": (B,)}``; what is not used is not computed under jit.

    ``content`` is the mean absolute difference of the features as they are (no unit length, no learned weights).
    ``gram`` is the mean squared difference of the Gram matrices ``F F^T / N`` of the features F (channels, N), whose N
    positions are those of the whole sample (for a video all its frames together), so it compares texture and not place
    or time. Both are sums over the taps, weighted by ``layer_weights``. Cosmos's code calls the first one "lpips".
    """
    frozen = _on_device(variables)

    def losses(prediction: Array, target: Array) -> dict[str, Array]:
        taps = [module.apply(frozen, standardize(_frames(pixels))) for pixels in (prediction, target)]
        content, gram = 0.0, 0.0
        for weight, a, b in zip(layer_weights, *taps, strict=True):
            # (B, positions, C): the frames of a video are folded back into their sample.
            a, b = (f.astype(jnp.float32).reshape(prediction.shape[0], -1, f.shape[-1]) for f in (a, b))
            content += weight * jnp.abs(a - b).mean((1, 2))
            gram += weight * jnp.square(_gram(a) - _gram(b)).mean((1, 2))
        return {"content": content, "gram": gram}

    return losses


def content_loss(module: VGG16, variables: Any, layer_weights: Sequence[float] = COSMOS_LAYER_WEIGHTS) -> Loss:
    """``(prediction, target) -> scalar``: the content term of `vgg_per_sample`, mean over samples."""
    losses = vgg_per_sample(module, variables, layer_weights)
    return _mean(lambda prediction, target: losses(prediction, target)["content"])


def gram_loss(module: VGG16, variables: Any, layer_weights: Sequence[float] = COSMOS_LAYER_WEIGHTS) -> Loss:
    """``(prediction, target) -> scalar``: the Gram term of `vgg_per_sample`, mean over samples."""
    losses = vgg_per_sample(module, variables, layer_weights)
    return _mean(lambda prediction, target: losses(prediction, target)["gram"])


def convnext_loss(module: ConvNeXt, variables: Any) -> Loss:
    """``(prediction, target) -> scalar``: mean squared difference of the logits (MaskBit, TiTok).

    Images of any size become squares of 224 pixels first.
    """
    frozen = _on_device(variables)

    def loss(prediction: Array, target: Array) -> Array:
        one, other = (module.apply(frozen, convnext.standardize(_frames(pixels))) for pixels in (prediction, target))
        return jnp.square(one - other).mean()

    return loss


def hidden_loss(module: VGG16Hidden, variables: Any) -> Loss:
    """``(prediction, target) -> scalar``: mean squared difference of VGG-16's last hidden layer (phenaki-pytorch).

    As that code does, the network reads pixels in [0, 1], without the mean and deviation it was trained with.
    """
    frozen = _on_device(variables)

    def loss(prediction: Array, target: Array) -> Array:
        one, other = (module.apply(frozen, (_frames(pixels) + 1) / 2) for pixels in (prediction, target))
        return jnp.square(one.astype(jnp.float32) - other.astype(jnp.float32)).mean()

    return loss


def _gram(features: Array) -> Array:
    """(B, N, C) -> (B, C, C), divided by N."""
    return jnp.einsum("bnc,bnd->bcd", features, features) / features.shape[1]


def _frames(pixels: Array) -> Array:
    """Images as they are, videos (B, T, H, W, C) as (B * T, H, W, C)."""
    if pixels.ndim not in (4, 5):
        raise ValueError(f"perceptual losses take (B, H, W, 3) or (B, T, H, W, 3), got shape {pixels.shape}.")
    return pixels.reshape(-1, *pixels.shape[-3:])


def _mean(per_sample: Loss) -> Loss:
    return lambda prediction, target: per_sample(prediction, target).mean()


def _on_device(variables: Any) -> Any:
    # jit passes device arrays that a function closes over like arguments; NumPy ones become constants of the program,
    # and XLA spends seconds folding what it can compute from them.
    return jax.tree.map(jnp.asarray, variables)
