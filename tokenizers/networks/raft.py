"""RAFT, optical flow by recurrent updates (https://arxiv.org/abs/2003.12039): the large one, as in torchvision.

All pairs of positions of the two pictures are compared once; a recurrent unit then looks around where the flow so far
points to, and corrects it.
"""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..convert.engine import to_tree
from ..convert.files import read_state_dict
from ..convert.raft import IGNORE, TABLE
from ..nn.conv import Conv2d
from ..nn.norm import group_normalize
from ..nn.resample import average_pool
from . import weights

Array = jax.Array

STRIDE = 8
LEVELS, RADIUS = 4, 4
UPDATES = 12
_HIDDEN = 128


class _Convolution(nn.Module):
    """Convolution ``conv``, norm ``norm`` (batch, or of each picture and channel alone), ReLU unless told."""

    features: int
    kernel_size: int
    stride: int
    batch_norm: bool
    relu: bool = True

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:  # (b h w c) -> (b h/s w/s d)
        padding = self.kernel_size // 2
        x = Conv2d(self.features, self.kernel_size, self.stride, padding, name="conv")(x)
        if self.batch_norm:
            norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, name="norm")
            x = norm(x)
        else:
            x = group_normalize(x, self.features, epsilon=1e-5)
        return nn.relu(x) if self.relu else x


class _Block(nn.Module):
    features: int
    stride: int
    batch_norm: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:  # (b h w c) -> (b h/s w/s d)
        y = _Convolution(self.features, 3, self.stride, self.batch_norm, name="conv1")(x, train)
        y = _Convolution(self.features, 3, 1, self.batch_norm, name="conv2")(y, train)
        if self.stride > 1:
            x = _Convolution(self.features, 1, self.stride, self.batch_norm, relu=False, name="shortcut")(x, train)
        return nn.relu(x + y)


class _Encoder(nn.Module):
    """Pictures to features at an eighth of the size."""

    batch_norm: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:  # (b h w 3) -> (b h/8 w/8 256)
        x = _Convolution(64, 7, 2, self.batch_norm, name="stem")(x, train)
        for layer, (features, stride) in enumerate(((64, 1), (96, 2), (128, 2)), start=1):
            x = _Block(features, stride, self.batch_norm, name=f"layer{layer}_0")(x, train)
            x = _Block(features, 1, self.batch_norm, name=f"layer{layer}_1")(x, train)
        return Conv2d(256, 1, name="out")(x)


class _Motion(nn.Module):
    """What the flow so far, and the comparison there, say about the motion."""

    @nn.compact
    def __call__(self, flow: Array, correlation: Array) -> Array:  # (b h w 2), (b h w k) -> (b h w 128)
        a = nn.relu(Conv2d(256, 1, name="corr1")(correlation))
        a = nn.relu(Conv2d(192, 3, name="corr2")(a))
        b = nn.relu(Conv2d(128, 7, name="flow1")(flow))
        b = nn.relu(Conv2d(64, 3, name="flow2")(b))
        both = nn.relu(Conv2d(_HIDDEN - 2, 3, name="out")(jnp.concatenate([a, b], -1)))
        return jnp.concatenate([both, flow], -1)


class _GRU(nn.Module):
    """Gated recurrent unit whose gates are convolutions along one axis."""

    kernel_size: tuple[int, int]

    @nn.compact
    def __call__(self, hidden: Array, x: Array) -> Array:  # (b h w 128), (b h w c) -> (b h w 128)
        seen = jnp.concatenate([hidden, x], -1)
        update = nn.sigmoid(Conv2d(_HIDDEN, self.kernel_size, name="z")(seen))
        reset = nn.sigmoid(Conv2d(_HIDDEN, self.kernel_size, name="r")(seen))
        new = nn.tanh(Conv2d(_HIDDEN, self.kernel_size, name="q")(jnp.concatenate([reset * hidden, x], -1)))
        return (1 - update) * hidden + update * new


class _Update(nn.Module):
    """One correction of the flow."""

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], context: Array, pyramid: tuple[Array, ...]):
        hidden, flow = carry
        flow = jax.lax.stop_gradient(flow)
        motion = _Motion(name="motion")(flow, look_up(pyramid, flow))
        x = jnp.concatenate([context, motion], -1)
        hidden = _GRU((1, 5), name="gru1")(hidden, x)
        hidden = _GRU((5, 1), name="gru2")(hidden, x)
        change = Conv2d(2, 3, name="flow2")(nn.relu(Conv2d(256, 3, name="flow1")(hidden)))
        return (hidden, flow + change), None


class RAFT(nn.Module):
    """Flow from the first to the second of two pictures, RGB in [-1, 1]; sizes are multiples of 8, at least 128.

    ``train`` takes the statistics of the batch in the context encoder's norms (mutable collection ``batch_stats``).
    """

    updates: int = UPDATES

    @nn.compact
    def __call__(self, first: Array, second: Array, train: bool = False) -> Array:
        # (b h w 3) twice -> (b h w 2), in pixels, (x, y)
        if any(size % STRIDE or size < STRIDE * 2**LEVELS for size in first.shape[1:3]):
            raise ValueError(f"RAFT needs sizes that are multiples of 8 and at least 128; got {first.shape}.")
        features = _Encoder(batch_norm=False, name="feature_encoder")(jnp.concatenate([first, second]), train)
        context = _Encoder(batch_norm=True, name="context_encoder")(first, train)
        hidden, context = nn.tanh(context[..., :_HIDDEN]), nn.relu(context[..., _HIDDEN:])
        pyramid = compare(*jnp.split(features, 2))
        scan = nn.scan(
            _Update,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=nn.broadcast,
            length=self.updates,
        )
        start = (hidden, jnp.zeros((*hidden.shape[:3], 2), hidden.dtype))
        (hidden, flow), _ = scan(name="update")(start, context, pyramid)
        mask = nn.relu(Conv2d(256, 3, name="mask_hidden")(hidden))
        mask = 0.25 * Conv2d(9 * STRIDE**2, 1, name="mask_out")(mask)
        return upsample(flow, mask)


def compare(first: Array, second: Array) -> tuple[Array, ...]:
    """Inner products of all features of two pictures ``(b h w c)``, at four resolutions of the second one.

    Returns:
      ``(b, h, w, h / 2^i, w / 2^i)`` for each level i.
    """
    pairs = jnp.einsum("bhwc,bijc->bhwij", first, second) / jnp.sqrt(jnp.float32(first.shape[-1]))
    levels = [pairs]
    for _ in range(LEVELS - 1):
        last = levels[-1]
        even = last[..., : last.shape[-2] // 2 * 2, : last.shape[-1] // 2 * 2]
        levels.append(average_pool(even[..., None], (2, 2))[..., 0])
    return tuple(levels)


def look_up(pyramid: tuple[Array, ...], flow: Array) -> Array:
    """The comparisons around where each position moves to, bilinear, zero outside: ``(b h w 2)`` -> ``(b h w k)``."""
    b, h, w, _ = flow.shape
    x, y = jnp.arange(w)[None, None] + flow[..., 0], jnp.arange(h)[None, :, None] + flow[..., 1]
    found = []
    for level, pairs in enumerate(pyramid):
        around = jax.vmap(_around)(
            pairs.reshape(b * h * w, *pairs.shape[-2:]), (x / 2**level).ravel(), (y / 2**level).ravel()
        )
        found.append(around.reshape(b, h, w, -1))
    return jnp.concatenate(found, -1)


def _around(values: Array, x: Array, y: Array) -> Array:
    """``(h, w)`` at the 9 x 9 points around one point; the horizontal offset is the slow one."""
    left, top = jnp.floor(x), jnp.floor(y)
    offsets = jnp.arange(-RADIUS, RADIUS + 2)
    columns, rows = left.astype(jnp.int32) + offsets, top.astype(jnp.int32) + offsets
    h, w = values.shape
    inside = ((rows >= 0) & (rows < h))[:, None] & ((columns >= 0) & (columns < w))
    grid = values[jnp.clip(rows, 0, h - 1)[:, None], jnp.clip(columns, 0, w - 1)]
    grid = jnp.where(inside, grid, 0)
    right, low = x - left, y - top
    grid = (1 - low) * grid[:-1] + low * grid[1:]
    grid = (1 - right) * grid[:, :-1] + right * grid[:, 1:]
    return grid.T.ravel()


def upsample(flow: Array, mask: Array) -> Array:
    """Every pixel's flow is a convex combination of the 3 x 3 coarse ones around it.

    Args:
      flow: ``(b, h, w, 2)``.
      mask: logits ``(b, h, w, 9 * 64)``, (neighbour, row, column) from slow to fast.

    Returns:
      ``(b, 8 h, 8 w, 2)``, in pixels of the large grid.
    """
    b, h, w, _ = flow.shape
    share = nn.softmax(mask.reshape(b, h, w, 9, STRIDE, STRIDE), axis=3)
    padded = jnp.pad(STRIDE * flow, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = jnp.stack([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=3)
    fine = jnp.einsum("bhwnrc,bhwnk->bhrwck", share, neighbours)
    return fine.reshape(b, h * STRIDE, w * STRIDE, 2)


def load(path: str | pathlib.Path | None = None) -> tuple[RAFT, dict]:
    """RAFT with torchvision's weights, as ``(module, variables)``.

    Args:
      path: torchvision's raft_large file; ``None`` looks in ``$TOKENIZERS_WEIGHTS``.
    """
    if path == weights.SHAPES:
        return RAFT(), _shapes()
    state = read_state_dict(weights.find("raft_large", path))
    return RAFT(), from_official(state)


def from_official(state: dict[str, Any]) -> dict[str, Any]:
    """Variables of `RAFT` from torchvision's state dict."""
    return to_tree(TABLE, _shapes(), state, ignore=IGNORE)


def _shapes() -> dict[str, Any]:
    picture = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    return dict(jax.eval_shape(RAFT().init, jax.random.key(0), picture, picture))
