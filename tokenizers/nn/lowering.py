"""What a convolution becomes: XLA's own, or what is faster than it on a CPU (`benchmarks/conv_lowering.py`).

Every function here takes ``x`` ``(B, [T,] H, W, C)``, ``kernel`` ``([kt,] kh, kw, C / groups, D)`` and, one entry per
spatial axis, ``strides``, ``pads`` (zeros before and after) and ``dilation``. `tokenizers.nn.conv` chooses.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from ..parallel.constrain import divided

Array = jax.Array

_DIMENSIONS = {4: ("NHWC", "HWIO", "NHWC"), 5: ("NDHWC", "DHWIO", "NDHWC")}


def native(x, kernel, *, strides, pads, dilation, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=_DIMENSIONS[x.ndim],
        feature_group_count=groups,
    )


def repeat(x: Array, factors: Sequence[int]) -> Array:
    """Repeats every element ``factors`` times: ``(..., H, W, C)`` -> ``(..., f0 * H, f1 * W, C)``. No gather."""
    if set(factors) == {1}:
        return x
    rank = len(factors)
    lead, sizes, channels = x.shape[: -1 - rank], x.shape[-1 - rank : -1], x.shape[-1]
    expanded = x.reshape(*lead, *(n for size in sizes for n in (size, 1)), channels)
    repeated = tuple(n for size, factor in zip(sizes, factors, strict=True) for n in (size, factor))
    sizes = tuple(size * factor for size, factor in zip(sizes, factors, strict=True))
    return jnp.broadcast_to(expanded, (*lead, *repeated, channels)).reshape(*lead, *sizes, channels)


# ------------------------------------------------------------------------------------------------------------ for CPUs


def _in_float32(lowered):
    # Partial sums of 16 bit numbers would be rounded once per tap; the CPU computes them in float32 in any case.
    @functools.wraps(lowered)
    def run(x, kernel, **geometry):
        if jnp.finfo(x.dtype).bits >= 32:
            return lowered(x, kernel, **geometry)
        return lowered(x.astype(jnp.float32), kernel.astype(jnp.float32), **geometry).astype(x.dtype)

    return run


def for_cpu(kernel_shape: tuple[int, ...], strides: tuple[int, ...], groups: int, batch: int = 1) -> Callable | None:
    """The fastest rewriting measured for a kernel, ``None`` where XLA's own convolution is as good."""
    *size, inputs, outputs = kernel_shape
    if (inputs, outputs) == (1, groups) and groups > 1:
        return _depthwise
    if groups != 1 or set(size) == {1}:
        return None
    if outputs * 4 <= inputs and set(strides) == {1} and max(size[-2:]) > 1:
        return _shift_add
    if len(size) == 2:
        return in_bands if _band_count(batch) > 1 else None
    kt, kh, kw = size
    if kt == 1:
        return _fold_time
    if kh == kw == 1:
        # The matrix product has the faster gradient; for few channels the convolution is 2 times faster forward.
        return _matmul_taps if inputs >= 512 else _flatten_space
    return _concat_taps if inputs < 32 else _sum_taps


def _frames(x, kernel, strides, pads, dilation):
    """A 2D convolution of every frame: x (B, T, H, W, C), kernel (kh, kw, C, D)."""
    b, t = x.shape[:2]
    y = in_bands(x.reshape(b * t, *x.shape[2:]), kernel, strides=strides[1:], pads=pads[1:], dilation=dilation[1:])
    return y.reshape(b, t, *y.shape[1:])


def _pad_time(x, pads):
    return jnp.pad(x, ((0, 0), pads[0], *((0, 0),) * (x.ndim - 2))) if any(pads[0]) else x


def _taps(x, kt, strides, dilation):
    """The kt time-shifted, time-strided views of x (already padded), each with one frame per output frame."""
    count = max((x.shape[1] - (kt - 1) * dilation[0] - 1) // strides[0] + 1, 0)
    starts = [tap * dilation[0] for tap in range(kt)]
    return [x[:, start : start + max((count - 1) * strides[0] + 1, 0) : strides[0]] for start in starts]


def _fold_time(x, kernel, *, strides, pads, dilation):
    return _frames(_pad_time(x, pads)[:, :: strides[0]], kernel[0], strides, pads, dilation)


@_in_float32
def _depthwise(x, kernel, *, strides, pads, dilation):
    # Every channel alone: no matrix products. XLA's own is 10 to 60 times slower; in 3D its gradient takes minutes to
    # compile.
    sizes = kernel.shape[:-2]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    extents = [(size - 1) * step + 1 for size, step in zip(sizes, dilation, strict=True)]
    spans = [
        (n - extent) // stride * stride + 1 for n, extent, stride in zip(x.shape[1:-1], extents, strides, strict=True)
    ]
    total = 0
    for tap in np.ndindex(*sizes):
        starts = [at * step for at, step in zip(tap, dilation, strict=True)]
        where = tuple(
            slice(start, start + span, stride) for start, span, stride in zip(starts, spans, strides, strict=True)
        )
        total += x[:, *where] * kernel[(*tap, 0)]
    return total


@_in_float32
def _sum_taps(x, kernel, *, strides, pads, dilation):
    taps = _taps(_pad_time(x, pads), kernel.shape[0], strides, dilation)
    return sum(_frames(frames, k, strides, pads, dilation) for frames, k in zip(taps, kernel, strict=True))


def _concat_taps(x, kernel, *, strides, pads, dilation):
    kt, kh, kw, inputs, outputs = kernel.shape
    stacked = jnp.concatenate(_taps(_pad_time(x, pads), kt, strides, dilation), axis=-1)
    kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(kh, kw, kt * inputs, outputs)
    return _frames(stacked, kernel, strides, pads, dilation)


@_in_float32
def _shift_add(x, kernel, *, strides, pads, dilation):
    """For few outputs: one matrix product gives what every tap adds, then each is added where it belongs."""
    del strides  # all one
    *sizes, inputs, outputs = kernel.shape
    rank = len(sizes)
    products = x @ jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1)
    products = jnp.pad(products, ((0, 0), *pads, (0, 0)))
    spans = [n - (size - 1) * step for n, size, step in zip(products.shape[1:-1], sizes, dilation, strict=True)]
    total = 0
    # Split, not sliced: the gradient is then one concatenation, not a sum of as many padded arrays as there are taps.
    parts = jnp.split(products, products.shape[-1] // outputs, axis=-1)
    for part, tap in zip(parts, np.ndindex(*sizes), strict=True):
        where = [slice(tap[axis] * dilation[axis], tap[axis] * dilation[axis] + spans[axis]) for axis in range(rank)]
        total += part[:, *where]
    return total


def _flatten_space(x, kernel, *, strides, pads, dilation):
    x = _resample_space(x, strides, pads)
    b, t, h, w, c = x.shape
    y = in_bands(
        x.reshape(b, t, h * w, c),
        kernel[:, 0],
        strides=(strides[0], 1),
        pads=(pads[0], (0, 0)),
        dilation=(dilation[0], 1),
    )
    return y.reshape(b, y.shape[1], h, w, y.shape[-1])


@_in_float32
def _matmul_taps(x, kernel, *, strides, pads, dilation):
    x = _resample_space(x, strides, pads)
    stacked = jnp.concatenate(_taps(_pad_time(x, pads), kernel.shape[0], strides, dilation), axis=-1)
    return stacked @ kernel.reshape(-1, kernel.shape[-1])


def _resample_space(x, strides, pads):
    """What padding and strides mean to a kernel of height and width one."""
    x = jnp.pad(x, ((0, 0), (0, 0), *pads[1:], (0, 0))) if any(map(any, pads[1:])) else x
    return x[:, :, :: strides[1], :: strides[2]]


# -------------------------------------------------------------------------------------- the gradient of a 2D kernel

# XLA computes it as a convolution whose channels are the batch: with fewer than eight it is 1.3 to 3 times slower.
_PICTURES = 8


def _band_count(batch: int) -> int:
    """Into how many bands a picture is cut; several devices have parts of pictures or batches already."""
    return 1 if divided() or batch == 0 else -(-_PICTURES // batch)


def in_bands(x, kernel, *, strides, pads, dilation):
    """XLA's own 2D convolution; the gradient of its kernel sees bands of a picture as pictures of their own."""
    bands = _band_count(x.shape[0])
    if bands == 1:
        return native(x, kernel, strides=strides, pads=pads, dilation=dilation)
    return _in_bands(x, kernel, bands, (strides, pads, dilation))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _in_bands(x, kernel, bands, geometry):
    strides, pads, dilation = geometry
    return native(x, kernel, strides=strides, pads=pads, dilation=dilation)


def _in_bands_tangent(bands, geometry, primals, tangents):
    x, kernel = primals
    by_x, by_kernel = tangents
    result = _in_bands(x, kernel, bands, geometry)
    parts = []
    if not isinstance(by_x, SymbolicZero):
        parts.append(_in_bands(by_x, kernel, bands, geometry))
    if not isinstance(by_kernel, SymbolicZero):
        # Checkpointed, or the bands, which overlap, would be kept for the backward pass in the place of `x`.
        parts.append(jax.checkpoint(_bands, prevent_cse=False, static_argnums=(2, 3))(x, by_kernel, bands, geometry))
    return result, sum(parts) if parts else jnp.zeros_like(result)


_in_bands.defjvp(_in_bands_tangent, symbolic_zeros=True)


def _bands(x, kernel, bands, geometry):
    """The same convolution, with bands of the output, along the axis where the kernel is shorter, in the batch."""
    strides, pads, dilation = geometry
    axis = int(kernel.shape[1] < kernel.shape[0])
    extent = (kernel.shape[axis] - 1) * dilation[axis] + 1
    stride, (before, after), size = strides[axis], pads[axis], x.shape[1 + axis]
    outputs = (before + size + after - extent) // stride + 1
    rows = -(-outputs // bands)
    ends = ((bands * rows) - 1) * stride + extent
    widths = [(0, 0)] * x.ndim
    widths[1 + axis] = (before, max(ends - before - size, 0))
    x = jnp.pad(x, widths)
    starts = [band * rows * stride for band in range(bands)]
    parts = [jax.lax.slice_in_dim(x, at, at + (rows - 1) * stride + extent, axis=1 + axis) for at in starts]
    stacked = jnp.stack(parts, axis=1)
    stacked = stacked.reshape(-1, *stacked.shape[2:])
    pads = tuple((0, 0) if i == axis else pad for i, pad in enumerate(pads))
    y = native(stacked, kernel, strides=strides, pads=pads, dilation=dilation)
    y = jnp.moveaxis(y.reshape(-1, bands, *y.shape[1:]), 1, 1 + axis)
    y = y.reshape(*y.shape[: 1 + axis], bands * rows, *y.shape[3 + axis :])
    return jax.lax.slice_in_dim(y, 0, outputs, axis=1 + axis)


# ------------------------------------------------------------------------------------------------- of a repeated input


def folds(repeats: tuple[int, ...], kernel_size, strides, pads, dilation, groups: int) -> bool:
    """Whether `of_repeated` applies: the output has as many elements as the repeated input along the repeated axes."""
    axes = zip(repeats, kernel_size, pads, strict=True)
    same = all(factor == 1 or sum(pad) == size - 1 for factor, size, pad in axes)
    return same and groups == 1 and set(strides) == set(dilation) == {1}


@_in_float32
def of_repeated(x, kernel, *, convolve: Callable, repeats, strides, pads, dilation):
    """The convolution of ``repeat(x, repeats)`` without the repeated input: less than half of the products.

    Equal neighbours are multiplied by the sum of their taps. Which taps fall together depends on the position modulo
    the factor, so there is one small kernel per phase, and the phases interleave.

    Args:
      convolve: ``convolve(x, kernel, strides, pads, dilation)``, for the small kernels.
      repeats: per spatial axis.
    """
    plans = [
        [_phase(phase, factor, size, pad) for phase in range(factor)]
        for factor, size, pad in zip(repeats, kernel.shape[:-2], pads, strict=True)
    ]
    outputs = []
    for phases in itertools.product(*plans):
        small = kernel
        for axis, (sums, _) in enumerate(phases):
            small = jnp.moveaxis(jnp.tensordot(sums, small, ((1,), (axis,))), 0, axis)
        outputs.append(convolve(x, small, strides=strides, pads=tuple(pad for _, pad in phases), dilation=dilation))
    return _interleave(outputs, repeats)


def _phase(phase: int, factor: int, size: int, pad: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Which taps meet which element of the unrepeated input ``(taps there, size)``, and the padding that is left."""
    if factor == 1:
        return np.eye(size, dtype=np.float32), pad
    elements = [(phase + tap - pad[0]) // factor for tap in range(size)]
    first, last = elements[0], elements[-1]
    sums = np.zeros((last - first + 1, size), np.float32)
    sums[np.array(elements) - first, np.arange(size)] = 1
    return sums, (max(-first, 0), max(last, 0))


def _interleave(parts: list[Array], repeats: tuple[int, ...]) -> Array:
    """Element ``n * factor + phase`` of each axis from element ``n`` of the part of that phase."""
    for axis in reversed(range(len(repeats))):
        factor = repeats[axis]
        groups = [parts[i : i + factor] for i in range(0, len(parts), factor)]
        shape = list(parts[0].shape)
        shape[1 + axis] *= factor
        parts = [jnp.stack(group, axis=2 + axis).reshape(shape) for group in groups]
    return parts[0]
