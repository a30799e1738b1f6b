"""Attention: one function that picks the implementation by platform; modules for tokens, space, windows and time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..errors import unknown
from ..parallel.constrain import CONTEXT_AXIS, constrain, splits
from .conv import STREAM, streams
from .norm import LayerNorm, RMSNorm

Array = jax.Array
Rotate = Callable[[Array], Array]

IMPLEMENTATIONS = ("auto", "xla", "cudnn")

# Where XLA's attention would make more logits than this, blocks of queries take turns: 1 GiB of float32. A frame of
# 720 x 1280 pixels at 8 x 8 per latent has 200 million, one of 2160 x 3840 sixteen billion.
MAX_LOGITS = 2**28


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    implementation: str = "auto",
    max_logits: int = MAX_LOGITS,
) -> Array:
    """Softmax attention over `jax.nn.dot_product_attention`; logits and softmax in float32.

    Args:
      query: ``(..., N, heads, D)`` with one or more leading batch axes, which are never merged, so that sharded ones
        stay sharded.
      key, value: ``(..., M, heads, D)``, or with fewer heads, a divisor of them: consecutive queries share one.
      mask: boolean, true where a query sees a key; broadcasts to ``(B, heads, N, M)``, B the innermost batch axis.
      bias: added to the logits, broadcasts likewise.
      is_causal: query i sees keys up to i.
      scale: of the logits, ``None`` is ``D ** -0.5``.
      window: of the keys, a query sees so many before and after its own place; ``None`` is all of them.
      implementation: ``"auto"`` is flash attention by cuDNN on NVIDIA GPUs where it serves the case (16 bit types,
        D up to 128 and a multiple of 8, no mask, bias or window, sequence not sharded), and XLA's elsewhere.
        ``"xla"`` and ``"cudnn"`` pin one.
      max_logits: how many logits XLA's attention may hold at a time on a device, in the backward pass too. The result
        is the same; more blocks take longer.

    Returns:
      ``(..., N, heads, D)`` in the dtype of ``query``.
    """
    if implementation not in IMPLEMENTATIONS:
        raise unknown("attention implementation", implementation, IMPLEMENTATIONS)
    if query.ndim < 4:
        raise ValueError(f"attend needs (batch, tokens, heads, channels); got a query of shape {query.shape}.")
    options = {"mask": mask, "bias": bias, "is_causal": is_causal, "scale": scale, "window": window}
    cudnn = functools.partial(_attend, **options, implementation="cudnn")
    xla = functools.partial(_attend_with_xla, **options, max_logits=max_logits)
    if implementation == "auto" and window is None and _flash_serves(query, key, mask, bias):
        return jax.lax.platform_dependent(query, key, value, cuda=cudnn, default=xla)
    return (cudnn if implementation == "cudnn" else xla)(query, key, value)


def _attend_with_xla(query, key, value, *, mask, bias, is_causal, scale, window, max_logits):
    """`_attend` in blocks of queries, so that at most ``max_logits`` are there at a time."""
    run = functools.partial(_attend, scale=scale, implementation="xla")
    count, keys = query.shape[-3], key.shape[-3]
    devices = math.prod(jax.sharding.get_abstract_mesh().shape.values())  # each has its share
    blocks = min(-(-math.prod(query.shape[:-1]) * keys // (max_logits * devices)), count)
    if blocks <= 1:
        return run(query, key, value, mask=mask, bias=bias, is_causal=is_causal, window=window)

    # Block j holds the queries j, j + blocks, ...: a sequence that is split over devices stays so in every block.
    def split(x, axis):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, -count % blocks)
        x = jnp.pad(x, pad)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, blocks, *x.shape[x.ndim + axis + 1 :]), axis, 0)

    per_query = {name: x for name, x in (("mask", mask), ("bias", bias)) if x is not None and x.shape[-2] > 1}
    shared = {name: x for name, x in (("mask", mask), ("bias", bias)) if name not in per_query}

    @jax.checkpoint
    def block(inputs):
        number, some, own = inputs
        options = shared | own
        if is_causal or window is not None:
            before, after = window or (keys, keys)
            places, of = number + blocks * jnp.arange(some.shape[-3])[:, None], jnp.arange(keys)
            seen = (of >= places - before) & (of <= places + (0 if is_causal else after))
            options["mask"] = seen if options["mask"] is None else seen & options["mask"]
        return run(some, key, value, is_causal=False, window=None, **options)

    parts = {name: split(x, -2) for name, x in per_query.items()}
    y = jnp.moveaxis(jax.lax.map(block, (jnp.arange(blocks), split(query, -3), parts)), 0, -3)
    return y.reshape(*query.shape[:-3], -1, *y.shape[-2:])[..., :count, :, :]


def _attend(query, key, value, *, mask, bias, is_causal, scale, window, implementation):
    mask, bias = (None if a is None else a.reshape((1,) * (4 - a.ndim) + a.shape) for a in (mask, bias))
    run = functools.partial(
        jax.nn.dot_product_attention,
        mask=mask,
        bias=bias,
        is_causal=is_causal,
        scale=scale,
        local_window_size=window,
        implementation=implementation,
    )
    for _ in range(query.ndim - 4):
        run = jax.vmap(run)
    return run(query, key, value)


def _flash_serves(query: Array, key: Array, mask: Array | None, bias: Array | None) -> bool:
    # The cuDNN branch cannot be traced where there is no cuDNN, so the backend decides first; `platform_dependent` then
    # keeps programs compiled for another platform right.
    if jax.default_backend() != "gpu" or mask is not None or bias is not None:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    context = [axis for axis in mesh.axis_names if axis.startswith(CONTEXT_AXIS)]
    if any(mesh.shape[axis] > 1 for axis in context):
        return False  # cuDNN refuses a sharded sequence
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    depth, shortest = query.shape[-1], min(query.shape[-3], key.shape[-3])
    return half and depth <= 128 and depth % 8 == 0 and shortest >= 64


class _Attention(nn.Module):
    """What the attention modules share.

    Parameters: dense layers ``query``, ``key``, ``value`` (C -> heads * head_dim), or with ``fused_qkv`` one ``qkv``
    (C -> 3 * heads * head_dim, the three one after the other), ``out`` (-> features), and with ``qk_norm`` the
    scales of ``query_norm`` and ``key_norm`` over ``head_dim``.

    Attributes:
      num_heads: number of heads.
      kv_heads: heads of keys and values, a divisor of ``num_heads`` (https://arxiv.org/abs/2305.13245); ``None`` is as
        many. Not with ``fused_qkv``.
      head_dim: channels per head; ``None`` is C / num_heads.
      features: output channels; ``None`` is C.
      qkv_bias, out_bias: biases of the dense layers.
      qk_norm: ``None``, ``"rms"`` or ``"layer"``: normalizes queries and keys per head.
      qk_norm_epsilon: its epsilon.
      fused_qkv: one matrix in place of three.
      dtype: compute dtype; softmax is float32 whatever it is.
      implementation: see `attend`.
    """

    num_heads: int = 1
    kv_heads: int | None = None
    head_dim: int | None = None
    features: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: str | None = None
    qk_norm_epsilon: float = 1e-6
    fused_qkv: bool = False
    dtype: Any = None
    implementation: str = "auto"

    def project(self, x: Array, context: Array | None = None) -> tuple[Array, Array, Array]:
        """Queries of ``x``, keys and values of ``context`` (or x), each ``(..., N, heads, head_dim)``."""
        if self.head_dim is None and x.shape[-1] % self.num_heads:
            raise ValueError(f"num_heads must divide the channels {x.shape[-1]}; got {self.num_heads}.")
        head_dim = self.head_dim or x.shape[-1] // self.num_heads
        width, kv_heads = self.num_heads * head_dim, self.kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(f"kv_heads={kv_heads} must divide num_heads={self.num_heads}.")
        if self.fused_qkv:
            if context is not None or kv_heads != self.num_heads:
                raise ValueError(
                    "fused_qkv=True projects x alone, to as many heads each; attention to a context, and kv_heads, "
                    "need fused_qkv=False."
                )
            qkv = jnp.split(nn.Dense(3 * width, use_bias=self.qkv_bias, dtype=self.dtype, name="qkv")(x), 3, axis=-1)
        else:
            inputs = {"query": x, "key": x if context is None else context, "value": x if context is None else context}
            widths = {"query": width, "key": kv_heads * head_dim, "value": kv_heads * head_dim}
            qkv = [
                nn.Dense(widths[name], use_bias=self.qkv_bias, dtype=self.dtype, name=name)(a)
                for name, a in inputs.items()
            ]
        query, key, value = (a.reshape(*a.shape[:-1], -1, head_dim) for a in qkv)
        if self.qk_norm is not None:
            if self.qk_norm not in ("rms", "layer"):
                raise unknown("qk_norm", self.qk_norm, ("rms", "layer", None))
            norm = {"rms": RMSNorm, "layer": LayerNorm}[self.qk_norm]
            query = norm(epsilon=self.qk_norm_epsilon, name="query_norm")(query)
            key = norm(epsilon=self.qk_norm_epsilon, name="key_norm")(key)
        return query, key, value

    def merge(self, x: Array, features: int) -> Array:
        """``(..., N, heads, head_dim)`` -> ``(..., N, features)`` through the dense layer ``out``."""
        x = x.reshape(*x.shape[:-2], -1)
        return nn.Dense(self.features or features, use_bias=self.out_bias, dtype=self.dtype, name="out")(x)

    def over_tokens(self, x: Array, context: Array | None, rotate: Rotate | None, **options: Any) -> Array:
        """Attention over axis -2 of ``(..., N, C)``."""
        query, key, value = self.project(x, context)
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        y = attend(query, key, value, implementation=self.implementation, **options)
        return self.merge(y, x.shape[-1])


class Attention(_Attention):
    """Multi-head attention over tokens, https://arxiv.org/abs/1706.03762."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        context: Array | None = None,
        *,
        rotate: Rotate | None = None,
        mask: Array | None = None,
        bias: Array | None = None,
        is_causal: bool = False,
        window: tuple[int, int] | None = None,
    ) -> Array:  # (b n c) -> (b n d)
        """Self-attention, or attention to ``context`` ``(B, M, C')``.

        ``rotate`` maps queries and keys ``(..., N, heads, head_dim)`` to the same, e.g. a partial of
        `posemb.apply_rotary`; ``mask``, ``bias``, ``is_causal`` and ``window`` are those of `attend`.
        """
        return self.over_tokens(x, context, rotate, mask=mask, bias=bias, is_causal=is_causal, window=window)


class SpatialAttention(_Attention):
    """Attention over the positions of every frame (or image) alone, row by row. Causal in time.

    Where the order of positions does not matter, a width that is split over devices makes it column by column: of rows
    that were put one after the other, no device could hold its columns, and each would attend for all.
    """

    @nn.compact
    def __call__(
        self, x: Array, *, rotate: Rotate | None = None, mask: Array | None = None, bias: Array | None = None
    ) -> Array:  # (b [t] h w c) -> (b [t] h w d)
        columns = splits("width") and rotate is None and mask is None and bias is None
        x = x.swapaxes(-3, -2) if columns else x
        *lead, h, w, c = x.shape
        y = self.over_tokens(x.reshape(*lead, h * w, c), None, rotate, mask=mask, bias=bias)
        y = y.reshape(*lead, h, w, -1)
        return constrain_grid(y.swapaxes(-3, -2) if columns else y)


class WindowAttention(_Attention):
    """Attention inside windows of every frame (or image), https://arxiv.org/abs/2103.14030 without the shift.

    Attributes:
      window: height and width of a window; they must divide those of the input.
    """

    window: tuple[int, int] = (8, 8)

    @nn.compact
    def __call__(
        self, x: Array, *, rotate: Rotate | None = None, mask: Array | None = None, bias: Array | None = None
    ) -> Array:  # (b [t] h w c) -> (b [t] h w d)
        """``mask`` and ``bias`` broadcast to ``(windows, heads, N, N)``, N = positions of one window, row by row."""
        *lead, h, w, c = x.shape
        wh, ww = self.window
        if h % wh or w % ww:
            raise ValueError(f"window {self.window} must divide height and width of an input of shape {x.shape}.")
        n = len(lead)
        x = x.reshape(*lead, h // wh, wh, w // ww, ww, c)
        x = x.swapaxes(n + 1, n + 2).reshape(*lead, (h // wh) * (w // ww), wh * ww, c)
        y = self.over_tokens(x, None, rotate, mask=mask, bias=bias)
        y = y.reshape(*lead, h // wh, w // ww, wh, ww, -1).swapaxes(n + 1, n + 2)
        return constrain_grid(y.reshape(*lead, h, w, -1))


class TemporalAttention(_Attention):
    """Attention over the frames at every position alone.

    When the collection ``stream`` is mutable and ``causal`` holds, keys and values of earlier chunks are kept in it
    (they grow with the clip, or have constant size with a ``window``), so that chunks give what the whole clip gives.
    After `with_room` they lie in buffers whose size only doubles, so that few programs serve a clip of any length.

    Attributes:
      causal: frame t sees frames up to t.
      window: of those, the last so many, itself included; ``None`` is all of them. Needs ``causal``.
      bias: made of how many frames before a query a key lies, int ``(t, keys)`` -> ``(heads, t, keys)``, and added to
        the logits.
    """

    causal: bool = True
    window: int | None = None
    bias: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array, *, rotate: Rotate | None = None) -> Array:  # (b t h w c) -> (b t h w d)
        """``rotate`` must take any number of frames when streaming: it gets the queries and keys from frame 0 on."""
        columns = splits("width")  # positions are merged so that a split one stays split
        y = self._over_time(x.swapaxes(2, 3) if columns else x, rotate)
        return constrain_grid(y.swapaxes(2, 3) if columns else y)

    def _over_time(self, x: Array, rotate: Rotate | None) -> Array:
        b, t, h, w, c = x.shape
        query, key, value = self.project(jnp.moveaxis(x, 1, 3).reshape(b, h * w, t, c))
        if self.window is not None:
            y = self.merge(self._in_window(query, key, value, rotate), c)
            return jnp.moveaxis(y.reshape(b, h, w, t, -1), 3, 1)
        past, key, value = self._with_history(key, value)
        if rotate is not None:
            # The zeros in front and behind give `rotate` the right positions; only this call's queries are read.
            placed = _written(jnp.zeros(key.shape, query.dtype), query, past)
            query = jax.lax.dynamic_slice_in_dim(rotate(placed), past, t, axis=-3)
            key = rotate(key)
        mask = None
        if self.causal and key.shape[-3] > t:
            mask = jnp.arange(key.shape[-3]) <= past + jnp.arange(t)[:, None]
        is_causal = self.causal and mask is None
        bias = self._bias(past + jnp.arange(t)[:, None] - jnp.arange(key.shape[-3]))
        options = {"mask": mask, "bias": bias, "is_causal": is_causal}
        y = attend(query, key, value, **options, implementation=self.implementation)
        return jnp.moveaxis(self.merge(y, c).reshape(b, h, w, t, -1), 3, 1)

    def _with_history(self, key: Array, value: Array) -> tuple[int | Array, Array, Array]:
        """The number of frames before this call's, and the keys and values from frame 0 on (maybe room after them)."""
        if (self.has_variable(STREAM, "key") or streams(self)) and not self.causal:
            raise ValueError("TemporalAttention with causal=False sees the whole clip and cannot stream.")
        return with_history(self, key, value)

    def _in_window(self, query: Array, key: Array, value: Array, rotate: Rotate | None) -> Array:
        if self.window < 1 or not self.causal or rotate is not None:
            raise ValueError(f"window={self.window} must be at least 1, and needs causal=True and no rotation.")
        past, frames = self.window - 1, query.shape[-3]
        seen = 0  # frames in front of the keys, of which only the last `count` are there
        if streams(self) or self.has_variable(STREAM, "key"):
            empty = jnp.zeros((*key.shape[:-3], past, *key.shape[-2:]), key.dtype)
            past_key, past_value, count = (
                self.get_variable(STREAM, name, start)
                for name, start in (("key", empty), ("value", empty), ("count", jnp.zeros((), jnp.int32)))
            )
            key = jnp.concatenate([past_key.astype(key.dtype), key], axis=-3)
            value = jnp.concatenate([past_value.astype(value.dtype), value], axis=-3)
            seen = past
        else:
            count = 0
        if streams(self):
            self.put_variable(STREAM, "key", key[..., frames:, :, :])
            self.put_variable(STREAM, "value", value[..., frames:, :, :])
            self.put_variable(STREAM, "count", jnp.minimum(count + frames, past))
        at, of = seen + jnp.arange(frames)[:, None], jnp.arange(seen + frames)
        mask = (of <= at) & (of > at - self.window) & (of >= seen - count)
        bias = self._bias(at - of)
        return attend(query, key, value, mask=mask, bias=bias, implementation=self.implementation)

    def _bias(self, away: Array) -> Array | None:
        return None if self.bias is None else self.bias(away)


def with_history(module: nn.Module, key: Array, value: Array) -> tuple[int | Array, Array, Array]:
    """What causal attention over time sees of a clip that comes in chunks; for modules that keep nothing else so named.

    Returns:
      (frames before this call's; keys and values ``(..., t, heads, D)`` from frame 0 on, maybe room after them).
    """
    frames, past = key.shape[-3], 0
    if module.has_variable(STREAM, "key"):
        past_key, past_value = module.get_variable(STREAM, "key"), module.get_variable(STREAM, "value")
        past = held = past_key.shape[-3]
        size = held + frames
        if module.has_variable(STREAM, "room"):  # a buffer is free from its middle on
            past = module.get_variable(STREAM, "frames")
            size = max(held, held // 2 + frames)
        key, value = (
            _written(_longer(old.astype(new.dtype), size), new, past)
            for old, new in ((past_key, key), (past_value, value))
        )
    if streams(module):
        module.put_variable(STREAM, "key", key)
        module.put_variable(STREAM, "value", value)
        module.put_variable(STREAM, "frames", jnp.asarray(past + frames, jnp.int32))
    return past, key, value


def with_room(stream: Any) -> Any:
    """Stream state in which the histories of `TemporalAttention` without a window are at most half full buffers.

    Between chunks, outside of jit: without it every chunk has longer keys than the one before and compiles anew; with
    it the shapes change when the clip has doubled. Once used, it must be used before every further chunk.

    Args:
      stream: the collection ``stream``, any pytree of mappings.
    """
    if not isinstance(stream, Mapping):
        return stream
    if "key" not in stream or "count" in stream:  # with a count: a window, of constant size
        return {name: with_room(value) for name, value in stream.items()}
    frames, held = stream["frames"], stream["key"].shape[-3]  # scanned layers have a number each, all equal
    size = max(held, 2 << ((int(frames.max()) if "room" in stream else held) - 1).bit_length())
    grown = {name: _longer(stream[name], size) for name in ("key", "value")}
    return dict(stream) | grown | {"room": jnp.zeros(frames.shape, jnp.bool_)}


def _longer(x: Array, frames: int) -> Array:  # (... t heads d) -> (... frames heads d)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, frames - x.shape[-3]), (0, 0), (0, 0)])


def _written(x: Array, part: Array, start: int | Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=-3)


def constrain_grid(x: Array) -> Array:
    """`constrain` for ``(B, T, H, W, C)`` and ``(B, H, W, C)``: flattening to tokens loses the spatial sharding."""
    names = ("batch", "time", "height", "width", "channel")
    return constrain(x, *(names if x.ndim == 5 else names[:1] + names[2:]))
