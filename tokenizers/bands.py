"""Streams of large frames tile by tile, exactly, with histories that wait in the memory of the host.

Where a network is local (convolutions, norms of single positions) a tile of a frame gives what the whole frame gives,
up to the rounding of sums, but for a halo along its borders, which its neighbours give. The layers on the coarsest
grid, attention among them, see whole frames. Every tile has a history of its own, and the rest has one. Of all these
only that of the part at work is on the device.

`Tokenizer.tiled` takes tiles for frames instead: it works with any network, and is approximate.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from . import pixels as pixel_values
from .nn.attention import with_room
from .nn.conv import STREAM
from .parallel import platform
from .parallel.constrain import whole
from .tiling import Span, spans
from .types import Array, Encoding

# Calls a function of (module, variables, state, value) with the first two filled in, on the devices of the tokenizer.
Run = Callable[[Callable, Any, Any], tuple[Any, Any]]
Sides = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class InTiles:
    """Takes the chunks of a stream in tiles. Histories go in and come out, ``{}`` at the start of a clip.

    Attributes:
      module: one with a ``halo`` (docs/architecture.md, Streaming).
      name: of the tokenizer, for errors.
      run: see `Run`.
      tile: height and width in pixels of what may be on the device at a time, halo included.
    """

    module: nn.Module
    name: str
    run: Run
    tile: Sides

    def __post_init__(self):
        halo, sides = getattr(self.module, "halo", None), self.module.spec.compression[1:]
        if halo is None:
            raise ValueError(
                f"{self.name} cannot be streamed in tiles: above its coarsest grid it has layers (norms, mostly) that "
                "see whole frames, so tiles would change its numbers. Leave tile out, and split frames over devices "
                "with shard if they are too large; Tokenizer.tiled is approximate."
            )
        least = [2 * max(halo) * side for side in sides]
        if len(self.tile) != 2 or any(t % s or t <= n for t, s, n in zip(self.tile, sides, least, strict=False)):
            raise ValueError(
                f"tile={self.tile} does not fit {self.name}: accepted are a height and a width that are multiples of "
                f"{sides} and above {tuple(least)}, since so many pixels only serve the neighbours."
            )

    def encode(self, state: Any, pixels: Any) -> tuple[Encoding, Any]:
        """Pixels ``(B, t, H, W, C)`` of a chunk, H and W of any size, to its encoding."""
        sides = self.module.spec.compression[1:]
        pixels = _fitted(self.module, np.asarray(pixels))
        grid = tuple(size // side for size, side in zip(pixels.shape[2:4], sides, strict=True))
        features, tiles = self._by_tiles("encode", state, pixels, grid, sides, (1, 1))
        encoding, rest = self._turn("encode", "rest", state.get("rest", {}), features)
        return encoding, {"tiles": tiles, "rest": rest}

    def decode(self, state: Any, latents: Any, last: bool = False) -> tuple[Array, Any]:
        """Latents or indices of a chunk to its pixels; ``last`` of its clip is one that leaves no history."""
        features, rest = self._turn("decode", "rest", state.get("rest", {}), latents, last)
        features = np.asarray(features)
        sides = self.module.spec.compression[1:]
        pixels, tiles = self._by_tiles("decode", state, features, features.shape[2:4], (1, 1), sides, last)
        return jnp.asarray(pixels), {"tiles": tiles, "rest": rest}

    def _by_tiles(
        self, method: str, state: Any, x: np.ndarray, grid: Sides, cut: Sides, give: Sides, last: bool = False
    ) -> tuple[np.ndarray, list[Any]]:
        """The local part: ``cut`` and ``give`` are the sides of a latent cell in ``x`` and in the result."""
        places = _places(self.module, method, grid, self.tile)
        before, after, result = state.get("tiles", [{}] * len(places)), [], None
        for place, history in zip(places, before, strict=True):
            part, history = self._turn(method, "local", history, x[_inside(place, cut)], last)
            part = np.asarray(part)
            if result is None:
                size = tuple(n * side for n, side in zip(grid, give, strict=True))
                result = np.empty((*part.shape[:2], *size, part.shape[-1]), part.dtype)
            result[_used(place, give)] = part[_used(place, give, inside=True)]
            after.append(history)
        return result, after

    def _turn(self, method: str, part: str, state: Any, value: Any, last: bool = False) -> tuple[Any, Any]:
        """Runs one part, whose history comes from the host and goes back there."""
        result, state = quietly(self.run, functools.partial(_run_part, method, part, not last), state, value)
        return result, jax.device_get(with_room(state))


def quietly(run: Run, function: Callable, state: Any, value: Any) -> tuple[Any, Any]:
    """Keys of attention outgrow their buffers now and then; JAX would warn that it cannot use these again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return run(function, state, value)


def lowered(
    run: Callable, statics: tuple, variables: Any, state: Any, value: Any, device: Any = None
) -> tuple[jax.stages.Lowered, int]:
    """A chunk's program ``run(*statics, variables, state, value)``, lowered from shapes, and the bytes of ``state``."""
    there = None if device is None else jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), (variables, state, value)
    )
    return run.lower(*statics, *placed), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


# The state goes in and comes out, unless nothing comes after it.
@functools.partial(platform.jit, lean=True, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _run_part(method: str, part: str, keep: bool, module: nn.Module, variables, state, value):
    if (method, part) == ("encode", "local"):
        value = pixel_values.to_float(value)
    elif part == "rest" and jnp.issubdtype(value.dtype, jnp.integer):
        value = module.apply(whole(variables), value, method="indices_to_latents")
    collections = [STREAM] if keep else False
    result = module.apply(dict(whole(variables)) | state, value, part=part, method=method, mutable=collections)
    return result if keep else (result, {})


def _fitted(module: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """With rows and columns repeated up to whole cells, as in `pixels.pad`; the frames of a chunk fit already."""
    sizes = pixel_values.fitted(module.spec, None, (1, *pixels.shape[2:]), strict=False)[1:3]
    ends = [(0, wanted - size) for wanted, size in zip(sizes, pixels.shape[2:4], strict=True)]
    return np.pad(pixels, ((0, 0), (0, 0), *ends, (0, 0)), mode="edge")


def _places(module: nn.Module, method: str, grid: Sides, tile: Sides) -> list[tuple[Span, Span]]:
    """The tiles of a grid of latent cells, row by row: as few as there can be, then as small as there can be."""
    overlap = 2 * module.halo[("encode", "decode").index(method)]
    axes = []
    for cells, pixels, side in zip(grid, tile, module.spec.compression[1:], strict=True):
        count = max(-(-(cells - overlap) // (pixels // side - overlap)), 1)
        axes.append(spans(cells, -(-(cells + (count - 1) * overlap) // count), overlap))
    return list(itertools.product(*axes))


def _inside(place: tuple[Span, Span], sides: Sides) -> tuple[slice, ...]:
    """The whole tile, in an array ``(B, T, H, W, C)`` with so many rows and columns to a cell."""
    cut = (slice(span.start * side, span.stop * side) for span, side in zip(place, sides, strict=True))
    return (slice(None), slice(None), *cut)


def _used(place: tuple[Span, Span], sides: Sides, inside: bool = False) -> tuple[slice, ...]:
    """What counts of the tile, in the frame, or ``inside`` of the tile itself."""
    starts = (span.start if inside else 0 for span in place)
    cut = (
        slice((span.first - start) * side, (span.last - start) * side)
        for span, start, side in zip(place, starts, sides, strict=True)
    )
    return (slice(None), slice(None), *cut)


def later_parts(
    module: nn.Module, variables: Any, size: Sides, frames: int, tile: Sides, device: Any = None
) -> Iterator[tuple]:
    """The programs of a later chunk in tiles, lowered from shapes alone; arguments as for `streaming.later_chunks`.

    Yields:
      (``"encode"``, ``"local"``, its `jax.stages.Lowered`, bytes of the history that it gets), then the same of the
      ``"rest"``, and of ``"decode"``, in the order in which they run. One is on the device at a time.
    """
    spec = module.spec
    steps = spec.compression[1:]
    grid = tuple(n // side for n, side in zip(size, steps, strict=True))
    cells = {}
    for method in ("encode", "decode"):
        place = _places(module, method, grid, tile)[0]
        cells[method] = tuple(span.stop - span.start for span in place)
    sides = tuple(n * side for n, side in zip(cells["encode"], steps, strict=True))
    counts = (frames + int(spec.first_frame_alone), frames)
    inputs = [jax.ShapeDtypeStruct((1, count, *sides, spec.channels), jnp.float32) for count in counts]
    for method, part in (("encode", "local"), ("encode", "rest"), ("decode", "rest"), ("decode", "local")):
        statics = (method, part, True, module)
        run = functools.partial(jax.eval_shape, functools.partial(_run_part, *statics), variables)
        start, state = run({}, inputs[0])
        state = jax.eval_shape(with_room, state)
        yield method, part, *lowered(_run_part, statics, variables, state, inputs[1], device)
        inputs = [getattr(given, "latents", given) for given in (start, run(state, inputs[1])[0])]
        if (method, part) != ("encode", "rest"):
            area = grid if method == "encode" else cells[method]
            inputs = [jax.ShapeDtypeStruct((*x.shape[:2], *area, x.shape[-1]), x.dtype) for x in inputs]
