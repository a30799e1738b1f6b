"""Motion of a reconstruction against that of its video (FlowLoss of nvidia-cosmos/cosmos-predict1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..networks.raft import RAFT

Array = jax.Array


def flow_of_clip(module: RAFT, variables: Any, clip: Array, scale: int = 2, train: bool = False) -> Array:
    """Optical flow between neighbouring frames, forwards and then backwards in time.

    Args:
      module, variables: RAFT.
      clip: ``(B, T, H, W, 3)`` in [-1, 1]; H and W divided by ``scale`` are multiples of 8 and at least 128.
      scale: the flow is found in a clip that much smaller.
      train: take the statistics of the frames at hand in RAFT's batch norms, as Cosmos's training code does (it puts
        all its networks in training mode).

    Returns:
      ``(B, 2 (T - 1), H, W, 2)``, in pixels of the clip, (x, y).
    """
    batch, time, height, width, _ = clip.shape
    small = _resized(clip.reshape(-1, *clip.shape[2:]), height // scale, width // scale)
    small = small.reshape(batch, time, *small.shape[1:])
    backwards = small[:, ::-1]

    def flow(frames: Array) -> Array:
        first, second = (x.reshape(-1, *x.shape[2:]) for x in (frames[:, :-1], frames[:, 1:]))
        if train:
            found, _ = module.apply(variables, first, second, train=True, mutable=["batch_stats"])
        else:
            found = module.apply(variables, first, second)
        return (scale * _resized(found, height, width)).reshape(batch, time - 1, height, width, 2)

    return jnp.concatenate([flow(small), flow(backwards)[:, ::-1]], axis=1)


def flow_loss(module: RAFT, variables: Any, scale: int = 2, train: bool = False) -> Callable[[Array, Array], Array]:
    """``(prediction, target) -> scalar``: mean absolute difference of `flow_of_clip`; zero for single frames."""

    def loss(prediction: Array, target: Array) -> Array:
        if target.shape[1] == 1:
            return jnp.zeros((), jnp.float32)
        ours, theirs = (flow_of_clip(module, variables, clip, scale, train) for clip in (prediction, target))
        return jnp.abs(ours - theirs).mean()

    return loss


def _resized(x: Array, height: int, width: int) -> Array:
    """Bilinear between pixel centres, without a low-pass filter."""
    return jax.image.resize(x, (x.shape[0], height, width, x.shape[-1]), "linear", antialias=False)
