"""What the same number of bits buys without a learned tokenizer: bicubic resampling, JPEG, WebP and H.264.

Every rule here favours the baseline where there is a choice:

* bicubic: colours on the same token grid, ``bits_per_token`` bits each, split over the channels in the best of many
  ways per item; the range of each channel is side information that is not counted.
* JPEG, WebP: frame by frame, one quality per item, the best one whose bits fit.
* H.264: clips only, tuned for PSNR, one constant rate factor per item, the best one whose bits fit; the
  container is not counted.

What a codec spends on a small constant picture at the same quality (headers and fixed tables) is not counted.

When even the lowest quality costs more than the budget, it is taken all the same and marked.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from ..errors import unknown


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One item coded by a baseline.

    Attributes:
      pixels: uint8 ``(T, H, W, 3)``.
      bits: bits that were counted.
      setting: what was chosen, for humans.
      over_budget: the lowest quality costs more than was allowed.
    """

    pixels: np.ndarray
    bits: float
    setting: str
    over_budget: bool = False


# ---------------------------------------------------------------------------------------------- bicubic


def bicubic(
    pixels: np.ndarray,
    grid: tuple[int, ...],
    bits_per_token: float,
    first_frame_alone: bool = False,
    sequence: bool = False,
) -> Baseline:
    """Bicubic down- and up-sampling with one quantized colour per token.

    Args:
      pixels: uint8 ``(T, H, W, 3)``.
      grid: token grid of the item, ``(T', H', W')`` or ``(H', W')`` (every frame has one).
      bits_per_token: budget of a token. More than 24 are spent on a finer grid of colours within the token.
      first_frame_alone: the first frame has a slice of the grid of its own.
      sequence: the last axis of ``grid`` is a sequence, ``(T, N)`` or ``(N,)``, that has no place in the picture: the
        best of several grids with at most N cells is taken.
    """
    candidates = [
        _bicubic(pixels, cells, bits_per_token, first_frame_alone) for cells in _grids(grid, pixels.shape[:3], sequence)
    ]
    best = min(candidates, key=lambda coded: np.square(coded.pixels.astype(np.float32) - pixels).mean())
    return dataclasses.replace(best, bits=math.prod(grid) * bits_per_token)


def _bicubic(pixels, grid: tuple[int, int, int], bits_per_token: float, first_frame_alone: bool) -> Baseline:
    frames, height, width, _ = pixels.shape
    slices, rows, columns = grid
    split = max(1, math.ceil(math.sqrt(bits_per_token / 24)))
    rows, columns = min(rows * split, height), min(columns * split, width)
    groups = temporal_groups(frames, slices, first_frame_alone)
    averaged = np.stack([pixels[start:stop].astype(np.float32).mean(axis=0) for start, stop in groups])
    small = np.clip(_resample(averaged, rows, columns), 0, 255)
    small, setting = quantize_colours(small, 2.0 ** (bits_per_token / split**2))
    restored = _resample(_interpolate_in_time(small, groups, frames), height, width)
    restored = np.clip(np.floor(restored + 0.5), 0, 255).astype(np.uint8)
    return Baseline(restored, 0.0, f"{len(groups)}x{rows}x{columns} {setting}")


def _grids(grid: tuple[int, ...], shape: tuple[int, int, int], sequence: bool) -> list[tuple[int, int, int]]:
    frames, height, width = shape
    if not sequence:
        if len(grid) not in (2, 3):
            raise ValueError(f"a token grid is (T', H', W') or (H', W'), got {grid}.")
        return [grid if len(grid) == 3 else (frames, *grid)]
    if len(grid) == 2:
        return [(frames, *_near_square(grid[1], height, width))]
    counts = [2**power for power in range(frames.bit_length()) if 2**power <= min(frames, grid[0])]
    return [(slices, *_near_square(grid[0] // slices, height, width)) for slices in counts]


def _near_square(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of at most ``tokens`` nearly square cells, as many as possible."""

    def stretch(cells):
        return abs(math.log((height / cells[0]) / (width / cells[1])))

    candidates = [(rows, tokens // rows) for rows in range(1, tokens + 1)]
    near = [cells for cells in candidates if stretch(cells) <= math.log(2) + 1e-9] or [min(candidates, key=stretch)]
    return max(near, key=lambda cells: (cells[0] * cells[1], -stretch(cells)))


def temporal_groups(frames: int, slices: int, first_frame_alone: bool) -> list[tuple[int, int]]:
    """Frames ``[start, stop)`` that each slice of the token grid stands for.

    >>> temporal_groups(9, 3, True)
    [(0, 1), (1, 5), (5, 9)]
    """
    alone = first_frame_alone and frames > 1 and slices > 1
    rest, start = (slices - 1, 1) if alone else (slices, 0)
    length = math.ceil((frames - start) / rest)
    bounds = [(first, min(first + length, frames)) for first in range(start, frames, length)]
    return ([(0, 1)] if alone else []) + bounds


def _interpolate_in_time(small: np.ndarray, groups: list[tuple[int, int]], frames: int) -> np.ndarray:
    centres = np.array([(start + stop - 1) / 2 for start, stop in groups])
    position = np.interp(np.arange(frames), centres, np.arange(len(groups)))
    below = np.floor(position).astype(int)
    above = np.minimum(below + 1, len(groups) - 1)
    share = (position - below)[:, None, None, None].astype(small.dtype)
    return small[below] * (1 - share) + small[above] * share


def _resample(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    # (T, H, W, C) float32, antialiased when shrinking; unrounded ("F" mode keeps floats)
    def channel(picture):
        return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))

    return np.stack([np.stack([channel(f[..., c].copy()) for c in range(f.shape[-1])], -1) for f in frames])


# Orthonormal, so that an error in it is the same error in RGB: luma and two opponent colours.
_OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], np.float64) / np.sqrt([[3], [2], [6]])
_LEVELS = (*range(1, 17), 18, 20, 22, 24, 28, 32, 36, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def quantize_colours(colours: np.ndarray, count: float) -> tuple[np.ndarray, str]:
    """Rounds colours to a lattice of at most ``count`` colours: the best of two spaces and many splits.

    Args:
      colours: float ``(..., 3)`` in [0, 255].
      count: number of colours that may be used, 2 to the bits per token.

    Returns:
      the rounded colours, float32, and the choice in words.
    """
    flat = colours.reshape(-1, 3).astype(np.float64)
    best = None
    for name, matrix in (("RGB", np.eye(3)), ("opponent", _OPPONENT)):
        axes = flat @ matrix.T
        errors = [{levels: _uniform_error(axes[:, c], levels) for levels in _LEVELS} for c in range(3)]
        for second in _LEVELS:
            for third in _LEVELS:
                if second * third > count:
                    break
                first = max(levels for levels in _LEVELS if levels * second * third <= count)
                levels = (first, second, third)
                error = sum(errors[c][levels[c]] for c in range(3))
                if best is None or error < best[0]:
                    best = (error, name, matrix, axes, levels)
    _, name, matrix, axes, levels = best
    rounded = np.stack([_uniform(axes[:, c], levels[c]) for c in range(3)], axis=-1) @ matrix
    return rounded.reshape(colours.shape).astype(np.float32), f"{name} {'x'.join(map(str, levels))} levels"


def _uniform(values: np.ndarray, levels: int) -> np.ndarray:
    low, high = values.min(), values.max()
    if levels == 1 or high == low:
        return np.full_like(values, values.mean())
    step = (high - low) / levels
    cell = np.minimum(np.floor((values - low) / step), levels - 1)
    return low + (cell + 0.5) * step


def _uniform_error(values: np.ndarray, levels: int) -> float:
    return float(np.square(values - _uniform(values, levels)).mean())


# ---------------------------------------------------------------------------------------------- codecs


def codec(name: str, pixels: np.ndarray, budget: float) -> Baseline:
    """The best quality of a codec whose bits fit into the budget, or the lowest one.

    Args:
      name: ``jpeg``, ``webp`` (frame by frame) or ``h264`` (the clip as a whole).
      pixels: uint8 ``(T, H, W, 3)``.
      budget: bits for the whole item.
    """
    if name in _STILL:
        low, high, encode, word = 0, 95 if name == "jpeg" else 100, _still_coder(name), "quality"
    elif name == "h264":
        # Rate factors fall as quality rises.
        low, high, encode, word = -51, 0, _h264, "crf"
    else:
        raise unknown("codec", name, (*_STILL, "h264"))
    best, result = low, encode(pixels, low)
    over = result[1] > budget
    while not over and low < high:
        middle = (low + high + 1) // 2
        candidate = encode(pixels, middle)
        if candidate[1] <= budget:
            low, best, result = middle, middle, candidate
        else:
            high = middle - 1
    decoded, bits = result
    return Baseline(decoded, bits, f"{word} {abs(best)}", over)


_STILL = {"jpeg": {"format": "JPEG", "optimize": True}, "webp": {"format": "WEBP", "method": 6}}


def _still_coder(name: str) -> Callable[[np.ndarray, int], tuple[np.ndarray, float]]:
    def stored(picture, quality):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, quality=quality, **_STILL[name])
        return buffer.getvalue()

    def encode(pixels, quality):
        fixed = len(stored(np.full((8, 8, 3), 128, np.uint8), quality))
        files = [stored(frame, quality) for frame in pixels]
        decoded = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
        return decoded, 8.0 * sum(max(len(file) - fixed, 0) for file in files)

    return encode


def h264_available() -> bool:
    """Whether PyAV was built with an encoder that has a constant rate factor."""
    import av

    return "libx264" in av.codecs_available


def _h264(pixels: np.ndarray, negative_factor: int) -> tuple[np.ndarray, float]:
    decoded, bits = _h264_file(pixels, negative_factor)
    # The encoder's signature and the parameter sets travel with the first picture, however small it is.
    _, fixed = _h264_file(np.full((1, 16, 16, 3), 128, np.uint8), negative_factor)
    return decoded, max(bits - fixed, 0.0)


def _h264_file(pixels: np.ndarray, negative_factor: int) -> tuple[np.ndarray, float]:
    import av

    frames, height, width, _ = pixels.shape
    # 4:2:0 needs even sides; the copy of the last row or column costs next to nothing.
    even = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer, bits = io.BytesIO(), 0
    options = {"crf": str(-negative_factor), "preset": "slow", "tune": "psnr"}
    # x264's macroblock tree reads memory that it never wrote when pictures are small, so that two encodings of one clip
    # differ by a percent. With the PSNR tuning it is hardly missed: this beats the default settings.
    options["x264-params"] = "mbtree=0"
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = even.shape[2], even.shape[1], "yuv420p"
        stream.thread_count = 1  # the same bits on every machine
        for frame in [*even, None]:
            picture = None if frame is None else av.VideoFrame.from_ndarray(frame, format="rgb24")
            for packet in stream.encode(picture):
                bits += 8 * packet.size
                container.mux(packet)
    buffer.seek(0)
    with av.open(buffer) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    if len(decoded) != frames:
        raise ValueError(f"the H.264 decoder returned {len(decoded)} of {frames} frames.")
    return decoded[:, :height, :width], float(bits)
