"""Antialiased resize, crop and flip of uint8 frames, one geometry per clip."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

from .. import errors

# Pillow widens these filters by the reduction factor, so all of them antialias; "nearest" would not and is absent.
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
CROPS = ("random", "center", "adm")


@dataclasses.dataclass(frozen=True)
class Crop:
    """Resize the frame to ``(height, width)``, then cut at ``(top, left)``; ``flip`` mirrors left and right."""

    height: int
    width: int
    top: int
    left: int
    flip: bool = False


def choose_crop(
    frame: tuple[int, int],
    size: tuple[int, int],
    *,
    rng: np.random.Generator | None = None,
    zoom: tuple[float, float] = (1.0, 1.0),
    flip: bool = False,
) -> Crop:
    """The smallest resize that covers ``size``, enlarged by a random zoom, and a crop in it.

    Args:
      frame: ``(H, W)`` of the frames.
      size: ``(H, W)`` wanted.
      rng: draws zoom (log-uniform), position and flip; ``None`` gives the centre crop without zoom or flip, with
        the sizes and offsets of torchvision's ``Resize`` (short side) and ``CenterCrop``.
      zoom: range of the extra enlargement, at least 1; stopped where it would magnify the frame's own pixels.
      flip: mirror half of the time.
    """
    if min(*frame, *size) < 1:
        raise ValueError(f"sizes must be positive, got a frame of {frame} for a crop of {size}")
    cover = max(size[0] / frame[0], size[1] / frame[1])
    if rng is not None:
        limit = max(1.0, min(zoom[1], 1 / cover))
        cover *= math.exp(rng.uniform(math.log(min(zoom[0], limit)), math.log(limit)))
    # Truncation of the long side is what the published evaluation transforms do; 1e-6 undoes 63.99999.
    height = max(size[0], int(frame[0] * cover + 1e-6))
    width = max(size[1], int(frame[1] * cover + 1e-6))
    if rng is None:
        return Crop(height, width, round((height - size[0]) / 2), round((width - size[1]) / 2))
    top = int(rng.integers(height - size[0] + 1))
    left = int(rng.integers(width - size[1] + 1))
    return Crop(height, width, top, left, bool(flip and rng.random() < 0.5))


def apply_crop(frames: np.ndarray, crop: Crop, size: tuple[int, int], resample: str = "lanczos") -> np.ndarray:
    """Resize and crop every frame alike: uint8 ``(T, H, W, 3)`` to uint8 ``(T, h, w, 3)``."""
    chosen = errors.pick("resample filter", resample, FILTERS)
    vertical, horizontal = frames.shape[1] / crop.height, frames.shape[2] / crop.width
    # Only the source pixels under the crop are resampled; the result is that of resizing everything first.
    box = (
        crop.left * horizontal,
        crop.top * vertical,
        min((crop.left + size[1]) * horizontal, frames.shape[2]),
        min((crop.top + size[0]) * vertical, frames.shape[1]),
    )
    out = np.empty((frames.shape[0], *size, 3), np.uint8)
    for source, target in zip(frames, out, strict=True):
        resized = np.asarray(Image.fromarray(source).resize((size[1], size[0]), chosen, box=box))
        target[:] = resized[:, ::-1] if crop.flip else resized
    return out


def adm_crop(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The centre crop of ADM (https://arxiv.org/abs/2105.05233), on whose pictures ImageNet's generators are trained.

    Halved by means of 2 x 2 pixels while it is at least twice as large as wanted, then resized to it (bicubic), then
    cut: uint8 ``(T, H, W, 3)`` to uint8 ``(T, side, side, 3)``.
    """
    if size[0] != size[1]:
        raise ValueError(f"crop='adm' makes squares, not pictures of {size} pixels.")
    side = size[0]
    out = np.empty((frames.shape[0], side, side, 3), np.uint8)
    for source, target in zip(frames, out, strict=True):
        picture = Image.fromarray(source)
        while min(picture.size) >= 2 * side:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        scale = side / min(picture.size)
        wanted = (round(picture.width * scale), round(picture.height * scale))
        whole = np.asarray(picture.resize(wanted, Image.Resampling.BICUBIC))
        top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
        target[:] = whole[top : top + side, left : left + side]
    return out


def nearest_aspect(height: int, width: int, buckets: tuple[tuple[int, int], ...]) -> list[int]:
    """Positions of the buckets ``(H, W)`` whose aspect ratio is nearest (on a log scale); several if they tie."""
    distance = [abs(math.log((width / height) / (w / h))) for h, w in buckets]
    return [i for i, value in enumerate(distance) if value <= min(distance) + 1e-9]
