"""Convolutions, channels last: one function that picks the lowering by platform, and the modules built on it.

The causal scheme (all time padding in front) is that of MAGVIT-v2, https://arxiv.org/abs/2310.05737, section 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from ..errors import pick, unknown
from ..parallel.constrain import divided, splits
from . import lowering as lowerings

Array = jax.Array
Padding = str | int | Sequence[int | tuple[int, int]]

LOWERINGS = ("auto", "native")
PADDING_MODES = {"zeros": "constant", "replicate": "edge", "reflect": "reflect", "circular": "wrap"}
STREAM = "stream"


def convolve(
    x: Array,
    kernel: Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    repeats: int | Sequence[int] = 1,
    lowering: str = "auto",
) -> Array:
    """The one 2D / 3D convolution (cross-correlation, zero padding).

    Args:
      x: ``(B, H, W, C)`` or ``(B, T, H, W, C)``.
      kernel: ``(kh, kw, C / groups, D)`` or ``(kt, kh, kw, C / groups, D)``, of the dtype of ``x``.
      strides: one number or one per spatial axis.
      padding: ``"SAME"`` (sizes divide by the stride, rounding up; an odd element goes after), ``"VALID"``, or one
        number or ``(before, after)`` pair per spatial axis.
      dilation: of the kernel, one number or one per spatial axis.
      groups: feature groups.
      repeats: nearest upsampling of ``x`` before it is padded and convolved, one number or one per spatial axis.
      lowering: ``"auto"`` rewrites 3D convolutions as 2D ones, and those of a repeated input as smaller ones, when
        compiled for a CPU, where XLA's own is 1.5 to 3 times slower (`benchmarks/conv_lowering.py`), as are its
        gradients of kernels for fewer than eight pictures; elsewhere it is XLA's own. ``"native"`` is always XLA's own,
        one convolution in the program (exports for several platforms, tests that count collectives).

    Returns:
      ``(B, [T',] H', W', D)`` in the dtype of ``x``.
    """
    if lowering not in LOWERINGS:
        raise unknown("convolution lowering", lowering, LOWERINGS)
    if x.ndim not in (4, 5) or kernel.ndim != x.ndim:
        raise ValueError(f"convolve needs x and kernel of the same rank, 4 or 5; got shapes {x.shape}, {kernel.shape}.")
    rank = x.ndim - 2
    strides, dilation = per_axis(strides, rank, "strides"), per_axis(dilation, rank, "dilation")
    repeats = per_axis(repeats, rank, "repeats")
    sizes = [n * factor for n, factor in zip(x.shape[1:-1], repeats, strict=True)]
    pads = padding_pairs(padding, sizes, kernel.shape[:-2], strides, dilation)
    geometry = {"strides": strides, "pads": pads, "dilation": dilation}
    return _convolve(x, kernel, **geometry, groups=groups, repeats=repeats, lowering=lowering)


# The jit gives calls outside of any jit a cache (every call would compile its two branches anew); inside another jit
# it leaves no trace.
@functools.partial(
    jax.jit, static_argnames=("strides", "pads", "dilation", "groups", "repeats", "lowering"), inline=True
)
def _convolve(x, kernel, *, strides, pads, dilation, groups, repeats, lowering):
    geometry = {"strides": strides, "pads": pads, "dilation": dilation}
    rewritten = lowerings.for_cpu(kernel.shape, strides, groups, x.shape[0])
    folded = max(repeats) > 1 and lowerings.folds(repeats, kernel.shape[:-2], **geometry, groups=groups)

    def native(x, kernel):
        return lowerings.native(lowerings.repeat(x, repeats), kernel, **geometry, groups=groups)

    def for_cpu(x, kernel):
        if folded:
            small = rewritten or lowerings.native
            return lowerings.of_repeated(x, kernel, convolve=small, repeats=repeats, **geometry)
        return rewritten(lowerings.repeat(x, repeats), kernel, **geometry)

    if lowering == "native" or not (rewritten or folded):
        return native(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=for_cpu, default=native)


# ------------------------------------------------------------------------------------------------------------ padding


def per_axis(value: int | Sequence[int], rank: int, what: str) -> tuple[int, ...]:
    """One number for all axes, or one per axis, as a tuple of ``rank`` numbers."""
    values = (value,) * rank if isinstance(value, (int, np.integer)) else tuple(value)
    if len(values) != rank or min(values) < 1:
        raise ValueError(f"{what} must be one positive number or {rank} of them; got {value!r}.")
    return tuple(int(v) for v in values)


def padding_pairs(
    padding: Padding,
    sizes: Sequence[int],
    kernel_size: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> tuple[tuple[int, int], ...]:
    """``padding`` (see `convolve`) as one ``(before, after)`` pair per spatial axis."""
    rank = len(sizes)
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise unknown("padding", padding, ("SAME", "VALID", "one number or (before, after) pair per axis"))
        extent = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
        pads = jax.lax.padtype_to_pads(tuple(sizes), extent, tuple(strides), padding.upper())
    elif isinstance(padding, (int, np.integer)):
        pads = [(padding, padding)] * rank
    else:
        pads = [(p, p) if isinstance(p, (int, np.integer)) else tuple(p) for p in padding]
        if len(pads) != rank or any(len(p) != 2 for p in pads):
            raise ValueError(f"padding must be one number or {rank} numbers or (before, after) pairs; got {padding!r}.")
    if any(n < 0 for pair in pads for n in pair):
        raise ValueError(f"padding must not be negative; got {padding!r}.")
    return tuple((int(before), int(after)) for before, after in pads)


def pad_space(x: Array, pads: Sequence[tuple[int, int]], mode: str) -> Array:
    """Pads the last axes but the channels: ``len(pads)`` of them, in one of `PADDING_MODES`."""
    name = pick("padding mode", mode, PADDING_MODES)
    if not any(map(any, pads)):
        return x
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1 - len(pads)) + tuple(pads) + ((0, 0),), mode=name)


# ---------------------------------------------------------------------------------------------------------- streaming


def streams(module: nn.Module) -> bool:
    """Whether this call leaves history for the next chunk: the collection ``stream`` is mutable, and it is no init."""
    return module.is_mutable_collection(STREAM) and not module.is_initializing()


def starts_clip(module: nn.Module) -> bool:
    """Whether this call sees the start of a clip; when streaming, remembers that the next one does not.

    For modules that treat the first frame apart but need no earlier frames. Static: it is the presence of a variable.
    """
    started = module.has_variable(STREAM, "started")
    if not started and streams(module):
        module.put_variable(STREAM, "started", jnp.zeros((), jnp.bool_))
    return not started


def leave(module: nn.Module, history: Array, result: Array) -> Array:
    """Leaves ``history`` in the place of that of the chunk before, from which ``result`` came, and returns ``result``.

    A donated history can be written over as soon as nothing reads it any more. The CPU's compiler does not see to that
    (it drops barriers, keeps old and new ones and copies them when all else is done: 5 GiB for 2160p video), so there
    the new history depends on the result, and the result on the new history, by choices that fall one way: no number
    is above infinity. The values do not change.
    """
    before = module.get_variable(STREAM, "history", history)
    if module.has_variable(STREAM, "history") and history.size and result.size and not divided():

        def in_turn(before, history, result):
            history = jnp.where(_first(result) > jnp.inf, before.astype(history.dtype), history)
            return history, jnp.where(_first(history) > jnp.inf, 0, result)

        def as_they_are(before, history, result):
            return history, result

        history, result = jax.lax.platform_dependent(before, history, result, cpu=in_turn, default=as_they_are)
    module.put_variable(STREAM, "history", history)
    return result


def _first(x: Array) -> Array:
    return x[(0,) * x.ndim]


# ------------------------------------------------------------------------------------------------------------ modules


class _Conv(nn.Module):
    """What the convolution modules share: fields, parameters, bias.

    Attributes:
      features: output channels.
      kernel_size: one number or one per axis.
      strides: one number or one per axis.
      padding: see `convolve`; for `CausalConv3d` of height and width only.
      padding_mode: what the padding is filled with: ``zeros``, ``replicate``, ``reflect`` or ``circular``.
      dilation: one number or one per axis.
      groups: feature groups.
      repeats: nearest upsampling of the input before all else, one number or one per axis.
      use_bias: adds ``bias`` ``(D,)``.
      dtype: compute dtype; ``None`` promotes input and (float32) parameters together.
      lowering: see `convolve`.
    """

    features: int
    kernel_size: int | tuple[int, ...] = 3
    strides: int | tuple[int, ...] = 1
    padding: Padding = "SAME"
    padding_mode: str = "zeros"
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    repeats: int | tuple[int, ...] = 1
    use_bias: bool = True
    dtype: Any = None
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros_init()
    lowering: str = "auto"

    def geometry(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Kernel size, strides and dilation with one number per axis."""
        names = ("kernel_size", "strides", "dilation")
        return tuple(per_axis(getattr(self, name), rank, name) for name in names)

    def sizes(self, x: Array, rank: int) -> tuple[int, ...]:
        """Of the spatial axes of ``x`` (..., C), upsampled."""
        factors = per_axis(self.repeats, rank, "repeats")
        return tuple(n * factor for n, factor in zip(x.shape[-1 - rank : -1], factors, strict=True))

    def parameters(self, x: Array, kernel_size: tuple[int, ...]) -> tuple[Array, Array, Array | None]:
        """Input, kernel ``(*kernel_size, C / groups, D)`` and bias ``(D,)`` or None, in the compute dtype."""
        inputs = x.shape[-1]
        if inputs % self.groups or self.features % self.groups:
            raise ValueError(f"groups {self.groups} must divide the channels {inputs} and {self.features}.")
        shape = (*kernel_size, inputs // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        return promote_dtype(x, kernel, bias, dtype=self.dtype)

    def apply_kernel(self, x: Array, kernel: Array, bias: Array | None, pads: Sequence[tuple[int, int]]) -> Array:
        """Upsamples, pads in the module's mode, convolves, adds the bias; a 2D kernel takes each frame of a clip."""
        rank = len(pads)
        _, strides, dilation = self.geometry(rank)
        repeats = per_axis(self.repeats, rank, "repeats")
        if self.padding_mode != "zeros":
            x = pad_space(lowerings.repeat(x, repeats), pads, self.padding_mode)
            pads, repeats = ((0, 0),) * rank, (1,) * rank
        if x.ndim > kernel.ndim:
            kernel, strides, dilation = kernel[None], (1, *strides), (1, *dilation)
            pads, repeats = ((0, 0), *pads), (1, *repeats)
        y = convolve(
            x,
            kernel,
            strides=strides,
            padding=pads,
            dilation=dilation,
            groups=self.groups,
            repeats=repeats,
            lowering=self.lowering,
        )
        return y if bias is None else y + bias


class Conv2d(_Conv):
    """2D convolution of every image or frame. Parameters ``kernel`` (kh, kw, C, D) and ``bias`` (D,), float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (..., h w c) -> (..., h' w' d)
        kernel_size, strides, dilation = self.geometry(2)
        leading = x.shape[:-3]
        x, kernel, bias = self.parameters(x, kernel_size)
        pads = padding_pairs(self.padding, self.sizes(x, 2), kernel_size, strides, dilation)
        apart = len(leading) == 2 and splits("time")  # a split time that is merged with the batch would be gathered
        y = self.apply_kernel(x if apart else x.reshape(-1, *x.shape[-3:]), kernel, bias, pads)
        return y.reshape(*leading, *y.shape[-3:])


class Conv3d(_Conv):
    """3D convolution, not causal. Parameters ``kernel`` (kt, kh, kw, C, D) and ``bias`` (D,), float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b t' h' w' d)
        kernel_size, strides, dilation = self.geometry(3)
        x, kernel, bias = self.parameters(x, kernel_size)
        pads = padding_pairs(self.padding, self.sizes(x, 3), kernel_size, strides, dilation)
        return self.apply_kernel(x, kernel, bias, pads)


class CausalConv3d(_Conv):
    """3D convolution whose time axis is padded in front only. Parameters as `Conv3d`.

    ``padding`` and ``padding_mode`` are those of height and width.

    Streaming: when the collection ``stream`` is mutable, the module leaves in it the input frames that later outputs
    still need, and puts those of the previous call in front of its input. So a clip cut in chunks,
    ``y, stream = module.apply(params | stream, chunk, mutable="stream")``, gives what the whole clip gives. A call
    without history is the start of a clip.

    Attributes:
      time_mode: ``replicate`` puts copies of the first frame in front, ``zeros`` puts zeros.
      time_padding: how many; ``None`` is ``(kt - 1) * dilation``, so that output ``j`` ends at input ``j * stride``.
    """

    time_mode: str = "replicate"
    time_padding: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b t' h' w' d)
        if self.time_mode not in ("zeros", "replicate"):
            raise unknown("time padding mode", self.time_mode, ("zeros", "replicate"))
        if per_axis(self.repeats, 3, "repeats")[0] != 1:
            raise ValueError(f"a causal convolution repeats in space only, (1, h, w); got repeats={self.repeats!r}.")
        kernel_size, strides, dilation = self.geometry(3)
        x, kernel, bias = self.parameters(x, kernel_size)
        pads = padding_pairs(self.padding, self.sizes(x, 3)[1:], kernel_size[1:], strides[1:], dilation[1:])
        extent = (kernel_size[0] - 1) * dilation[0] + 1
        front = extent - 1 if self.time_padding is None else self.time_padding
        history = self.get_variable(STREAM, "history") if self.has_variable(STREAM, "history") else None
        alone = history is None and not streams(self)
        if alone and x.shape[1] == 1 and front == extent - 1:
            # An image: every tap sees the same frame (or zeros), so one 2D convolution does.
            kernel = kernel.sum(0, keepdims=True) if self.time_mode == "replicate" else kernel[-1:]
            return self.apply_kernel(x, kernel, bias, ((0, 0), *pads))
        if alone and self.time_mode == self.padding_mode == "zeros":
            return self.apply_kernel(x, kernel, bias, ((front, 0), *pads))
        if history is None:
            first = x[:, :1] if self.time_mode == "replicate" else jnp.zeros_like(x[:, :1])
            history = jnp.repeat(first, front, axis=1)
        x = jnp.concatenate([history.astype(x.dtype), x], axis=1)
        left = self._left(x, extent, strides[0])
        y = self.apply_kernel(x, kernel, bias, ((0, 0), *pads))
        return y if left is None else leave(self, left, y)

    def _left(self, x: Array, extent: int, stride: int) -> Array | None:
        """What the next chunk needs of this one and its history ``x``; ``None`` where nothing streams."""
        if not streams(self):
            return None
        used = max((x.shape[1] - extent) // stride + 1, 0) * stride
        if used == 0 or used > x.shape[1]:
            raise ValueError(
                f"a chunk of {x.shape[1]} frames (history included) does not fit a temporal kernel of extent {extent} "
                f"and stride {stride}: it must hold at least {extent} frames, and whole strides."
            )
        return x[:, used:]


class FactorizedConv3d(nn.Module):
    """A ``(1, k, k)`` convolution ``spatial`` followed by a ``(kt, 1, 1)`` convolution ``temporal``, nothing between.

    Attributes:
      kernel_size, strides: one number or one for (time, height, width).
      padding, padding_mode: of height and width.
      causal: the temporal one is a `CausalConv3d`, else a `Conv3d` with ``SAME`` padding.
      middle_features: channels between the two; ``None`` is ``features``.
      time_mode: time padding, see `CausalConv3d`; without ``causal``, one of `PADDING_MODES`.
    """

    features: int
    kernel_size: int | tuple[int, ...] = 3
    strides: int | tuple[int, ...] = 1
    padding: Padding = "SAME"
    padding_mode: str = "zeros"
    causal: bool = True
    middle_features: int | None = None
    time_mode: str = "replicate"
    time_padding: int | None = None
    use_bias: bool = True
    dtype: Any = None
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros_init()
    lowering: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b t h w c) -> (b t' h' w' d)
        kt, kh, kw = per_axis(self.kernel_size, 3, "kernel_size")
        st, sh, sw = per_axis(self.strides, 3, "strides")
        names = ("use_bias", "dtype", "kernel_init", "bias_init", "lowering")
        shared = {name: getattr(self, name) for name in names}
        pads = padding_pairs(self.padding, x.shape[2:-1], (kh, kw), (sh, sw), (1, 1))
        x = Conv3d(
            self.middle_features or self.features,
            (1, kh, kw),
            (1, sh, sw),
            padding=((0, 0), *pads),
            padding_mode=self.padding_mode,
            name="spatial",
            **shared,
        )(x)
        if self.causal:
            shared |= {"time_mode": self.time_mode, "time_padding": self.time_padding}
            return CausalConv3d(self.features, (kt, 1, 1), (st, 1, 1), name="temporal", **shared)(x)
        if self.time_padding is not None:
            raise ValueError("time_padding belongs to causal=True; got causal=False.")
        return Conv3d(self.features, (kt, 1, 1), (st, 1, 1), padding_mode=self.time_mode, name="temporal", **shared)(x)
