"""Pictures and frames too large for the memory of a device, tile by tile: approximate, and how much so is measured.

A network sees each tile alone, so what it would see beyond the border of a tile (and the statistics that norms and
attention take over a whole frame) is missing. Tiles therefore overlap: of the latents of two neighbours each gives the
half of the overlap that is nearer to it, and decoded pixels are blended linearly. Exact, where there are several
devices, is `Tokenizer.shard` over a mesh whose context axis splits the height or the width.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import pixels as pixel_values
from .types import Array, Encoding, Spec


@dataclasses.dataclass(frozen=True)
class Span:
    """One tile along one axis, in latent cells: it covers [start, stop), and its latents are used in [first, last)."""

    start: int
    stop: int
    first: int
    last: int


def spans(cells: int, tile: int, overlap: int) -> tuple[Span, ...]:
    """Tiles of one size that cover an axis, evenly spread.

    Args:
      cells: length of the axis.
      tile: length of a tile; an axis that is not longer is one tile.
      overlap: cells that neighbours share at least.
    """
    if cells <= tile:
        return (Span(0, cells, 0, cells),)
    count = -(-(cells - overlap) // (tile - overlap))
    starts = [i * (cells - tile) // (count - 1) for i in range(count)]
    borders = [0, *((left + tile + right) // 2 for left, right in itertools.pairwise(starts)), cells]
    return tuple(
        Span(start, start + tile, first, last)
        for start, (first, last) in zip(starts, itertools.pairwise(borders), strict=True)
    )


@dataclasses.dataclass(frozen=True)
class TiledTokenizer:
    """A tokenizer that works tile by tile; its methods are those of `Tokenizer`. Made by `Tokenizer.tiled`.

    Attributes:
      tokenizer: the `Tokenizer` that sees the tiles; all tiles have one shape, so it compiles once.
      tile: height and width of a tile in pixels, multiples of the compression.
      overlap: pixels that neighbours share at least, a multiple of the compression.
    """

    tokenizer: Any
    tile: tuple[int, int]
    overlap: int

    def __post_init__(self):
        spec, name = self.tokenizer.spec, self.tokenizer.name
        if spec.tokens_per_item is not None or getattr(self.tokenizer.module, "input_size", None) is not None:
            raise ValueError(f"{name} cannot be tiled: its tokens are no grid over inputs of any size.")
        for side, step in zip(self.tile, spec.compression[1:], strict=True):
            if side % step or self.overlap % step or not 0 <= self.overlap <= side // 2:
                raise ValueError(
                    f"tile={self.tile} and overlap={self.overlap} do not fit {name}: they must be multiples of its "
                    f"compression {spec.compression[1:]}, and the overlap at most half a tile."
                )

    @property
    def spec(self) -> Spec:
        """That of the tokenizer."""
        return self.tokenizer.spec

    @property
    def name(self) -> str:
        """That of the tokenizer."""
        return self.tokenizer.name

    def encode(self, pixels, strict: bool = False) -> Encoding:
        """See `Tokenizer.encode`. Loss terms are means over the tiles."""
        pixels = self._fitted(pixels, strict)
        tiles = self._tiles_of_pixels(pixels)
        return self._joined(tiles, [self.tokenizer.encode(tiles.cut_pixels(pixels, tile)) for tile in tiles])

    def decode(self, latents) -> Array:
        """See `Tokenizer.decode`."""
        tiles = self._tiles_of_cells(latents.shape[-3:-1])
        return tiles.blend([self.tokenizer.decode(tiles.cut(latents, tile, -3)) for tile in tiles])

    def decode_indices(self, indices) -> Array:
        """See `Tokenizer.decode_indices`."""
        tiles = self._tiles_of_cells(self._grid(indices))
        parts = (tiles.cut(indices, tile, self._index_axis) for tile in tiles)
        return tiles.blend([self.tokenizer.decode_indices(part) for part in parts])

    def reconstruct(self, pixels) -> Array:
        """See `Tokenizer.reconstruct`."""
        return pixel_values.cropped(self.spec, self.decode(self.encode(pixels).latents), tuple(pixels.shape))

    def encode_stream(self, chunks: Iterable[Any]) -> Iterator[Encoding]:
        """See `Tokenizer.encode_stream`; every tile has a history of its own."""
        first, chunks = _peek(self._fitted(chunk, strict=False) for chunk in chunks)
        if first is None:
            return
        tiles = self._tiles_of_pixels(first)
        for parts in _side_by_side(self.tokenizer.encode_stream, tiles.cut_pixels, tiles, chunks):
            yield self._joined(tiles, parts)

    def decode_stream(self, chunks: Iterable[Any]) -> Iterator[Array]:
        """See `Tokenizer.decode_stream`; every tile has a history of its own."""
        first, chunks = _peek(chunk.latents if isinstance(chunk, Encoding) else chunk for chunk in chunks)
        if first is None:
            return
        axis = self._index_axis if jnp.issubdtype(first.dtype, jnp.integer) else -3
        tiles = self._tiles_of_cells(first.shape[axis:][:2])
        cut = functools.partial(tiles.cut, axis=axis)
        for parts in _side_by_side(self.tokenizer.decode_stream, cut, tiles, chunks):
            yield tiles.blend(parts)

    @property
    def _index_axis(self) -> int:
        """The axis of height in indices, counted from the end."""
        return -3 if self.spec.codebooks > 1 else -2

    def _grid(self, indices) -> tuple[int, int]:
        return indices.shape[self._index_axis :][:2]

    def _fitted(self, pixels, strict: bool):
        """Pixels of whole latent cells in height and width."""
        pixel_values.check(pixels, self.spec.channels)
        fitted = pixel_values.fitted(self.spec, None, tuple(pixels.shape), strict)
        return pixel_values.pad(pixels, (*pixels.shape[:-3], *fitted[-3:]))

    def _tiles_of_pixels(self, pixels) -> _Tiles:
        down, across = self.spec.compression[1:]
        return self._tiles_of_cells((pixels.shape[-3] // down, pixels.shape[-2] // across))

    def _tiles_of_cells(self, cells: Sequence[int]) -> _Tiles:
        steps = self.spec.compression[1:]
        axes = zip(cells, self.tile, steps, strict=True)
        return _Tiles(tuple(spans(n, side // step, self.overlap // step) for n, side, step in axes), steps)

    def _joined(self, tiles: _Tiles, parts: Sequence[Encoding]) -> Encoding:
        """One encoding from those of the tiles."""

        def join(values: Sequence[Any], axis: int):
            return None if values[0] is None else tiles.join(values, axis)

        names = ("latents", "mean", "logvar")
        grids = {name: join([getattr(part, name) for part in parts], -3) for name in names}
        indices = join([part.indices for part in parts], self._index_axis)
        losses = jax.tree.map(lambda *values: sum(values) / len(values), *(part.losses for part in parts))
        return Encoding(indices=indices, losses=losses, **grids)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The tiles of a grid of latent cells, row by row; iterating gives pairs of `Span`s (down, across)."""

    axes: tuple[tuple[Span, ...], tuple[Span, ...]]
    steps: tuple[int, int]

    def __iter__(self) -> Iterator[tuple[Span, Span]]:
        return itertools.product(*self.axes)

    def cut(self, array, tile: tuple[Span, Span], axis: int, steps: tuple[int, int] = (1, 1)):
        """The part of an array whose height is ``axis`` (from the end), and whose width follows it."""
        down, across = (slice(s.start * step, s.stop * step) for s, step in zip(tile, steps, strict=True))
        return array[(..., down, across, *(slice(None),) * (-axis - 2))]

    def cut_pixels(self, pixels, tile: tuple[Span, Span]):
        """The pixels of a tile."""
        return self.cut(pixels, tile, -3, self.steps)

    def join(self, parts: Sequence[Any], axis: int) -> Array:
        """Grids of the tiles as one: of every tile what counts of it."""
        rows, columns = self.axes
        kept = []
        for part, tile in zip(parts, self, strict=True):
            used = (slice(span.first - span.start, span.last - span.start) for span in tile)
            kept.append(part[(..., *used, *(slice(None),) * (-axis - 2))])
        lines = [jnp.concatenate(kept[i * len(columns) :][: len(columns)], axis=axis + 1) for i in range(len(rows))]
        return jnp.concatenate(lines, axis=axis)

    def blend(self, parts: Sequence[Array]) -> Array:
        """Pixels ``(..., h, w, C)`` of the tiles as one picture, with linear transitions where they overlap."""
        if len(parts) == 1:
            return parts[0]
        size = tuple(spans[-1].stop * step for spans, step in zip(self.axes, self.steps, strict=True))
        picture = jnp.zeros((*parts[0].shape[:-3], *size, parts[0].shape[-1]), jnp.float32)
        weights = [_ramps(spans, step) for spans, step in zip(self.axes, self.steps, strict=True)]
        numbers = itertools.product(*(range(len(spans)) for spans in self.axes))
        for part, (row, column) in zip(parts, numbers, strict=True):
            down, across = (
                slice(spans[i].start * step, spans[i].stop * step)
                for spans, i, step in zip(self.axes, (row, column), self.steps, strict=True)
            )
            weight = weights[0][row][:, None, None] * weights[1][column][:, None]
            picture = picture.at[..., down, across, :].add(part * weight)
        return picture


def _ramps(spans: Sequence[Span], step: int) -> list[np.ndarray]:
    """Weights of the tiles' pixels along one axis; those of one pixel add up to one."""
    total = np.zeros(spans[-1].stop * step)
    found = []
    for i, span in enumerate(spans):
        start, stop = span.start * step, span.stop * step
        position = np.arange(start, stop) + 0.5
        weight = np.ones(stop - start)
        if i:
            weight = np.minimum(weight, (position - start) / max(spans[i - 1].stop * step - start, 1))
        if i + 1 < len(spans):
            weight = np.minimum(weight, (stop - position) / max(stop - spans[i + 1].start * step, 1))
        found.append(weight)
        total[start:stop] += weight
    return [
        (weight / total[span.start * step : span.stop * step]).astype(np.float32)
        for span, weight in zip(spans, found, strict=True)
    ]


def _peek(items: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The first item (None of nothing), and all of them."""
    iterator = iter(items)
    first = next(iterator, None)
    return first, iter(()) if first is None else itertools.chain([first], iterator)


def _side_by_side(stream: Callable, cut: Callable, tiles: _Tiles, chunks: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """What ``stream`` makes of the chunks of every tile; tiles take their turns, so few chunks are in memory."""
    places = list(tiles)
    copies = itertools.tee(chunks, len(places))
    parts = [stream(map(cut, copy, itertools.repeat(tile))) for copy, tile in zip(copies, places, strict=True)]
    yield from zip(*parts, strict=True)
