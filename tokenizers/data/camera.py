"""Clips from photographs: a virtual camera that moves, zooms and turns, and objects that move in front of it."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

MAX_ANGLE = math.radians(12)  # of the camera, from upright
ANGLE_PER_FRAME = math.radians(1.0)
ZOOM_PER_FRAME = 0.015  # natural logarithm
PAN_PER_FRAME = 0.04  # of the window's short side
CLOSEST = 0.25  # the smallest window, relative to the largest that fits


def virtual_camera_clip(
    photo: np.ndarray,
    cutouts: np.ndarray,
    frames: int,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> np.ndarray:
    """A clip of uint8 RGB ``(T, h, w, 3)`` from one photograph, with one or two objects cut out of another.

    The camera never leaves the photograph. The photograph is first low-passed to the resolution of the widest frame,
    so no frame aliases, and then sampled bicubically.

    Args:
      photo: uint8 ``(H, W, 3)``, the background.
      cutouts: uint8 ``(H', W', 3)``, the photograph that the objects are cut from.
      frames: T.
      size: ``(h, w)``.
      rng: draws everything.
    """
    height, width = size
    centers, scales, angles = _camera_path(photo.shape[:2], frames, size, rng)
    background, centers, scales = _low_pass(photo, centers, scales, size)
    objects = [_Object(cutouts, frames, size, rng) for _ in range(int(rng.integers(1, 3)))]
    clip = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        matrix = _matrix(centers[t], scales[t], angles[t], (width / 2, height / 2))
        canvas = background.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        for thing in objects:
            thing.paste(canvas, t)
        clip[t] = np.asarray(canvas)
    return clip


def _ease(frames: int, rng: np.random.Generator) -> np.ndarray:
    """Monotone times from 0 to 1 that speed up or slow down in between."""
    t = np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1)
    return t + rng.uniform(-0.8, 0.8) * np.sin(2 * np.pi * t) / (2 * np.pi)


def _camera_path(
    photo: tuple[int, int], frames: int, size: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres ``(T, 2)`` as (x, y), photo pixels per clip pixel ``(T,)`` and angles ``(T,)``."""
    time = _ease(frames, rng)
    angles = rng.uniform(-0.5, 0.5) * MAX_ANGLE + rng.uniform(-1, 1) * ANGLE_PER_FRAME * frames * time
    angles = np.clip(angles, -MAX_ANGLE, MAX_ANGLE)
    turn = float(np.abs(angles).max())
    half_width = 0.5 * (size[1] * math.cos(turn) + size[0] * math.sin(turn))
    half_height = 0.5 * (size[0] * math.cos(turn) + size[1] * math.sin(turn))
    largest = min(photo[1] / (2 * half_width), photo[0] / (2 * half_height))
    # Closer than one photo pixel per clip pixel there is nothing to see but interpolation.
    closest = min(1.0, max(CLOSEST, 1 / largest)) if largest > 1 else 1.0
    ratio = rng.uniform(-1, 1) * ZOOM_PER_FRAME * frames * time
    scales = largest * math.exp(rng.uniform(math.log(closest), 0.0)) * np.exp(ratio)
    scales *= min(1.0, largest / scales.max())
    low = np.array([half_width, half_height]) * scales.max()
    high = np.maximum(np.array([photo[1], photo[0]]) - low, low)
    start = rng.uniform(low, high)
    direction = rng.uniform(0, 2 * math.pi)
    reach = rng.uniform(0, PAN_PER_FRAME) * frames * scales.min() * min(size)
    end = np.clip(start + reach * np.array([math.cos(direction), math.sin(direction)]), low, high)
    return start + _ease(frames, rng)[:, None] * (end - start), scales, angles


def _low_pass(
    photo: np.ndarray, centers: np.ndarray, scales: np.ndarray, size: tuple[int, int]
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """The part of the photo that the camera sees, at the widest frame's resolution; centres and scales to match."""
    radius = 0.5 * math.hypot(*size) * scales.max() + 2
    low = np.maximum(np.floor(centers.min(0) - radius), 0).astype(int)
    high = np.minimum(np.ceil(centers.max(0) + radius), (photo.shape[1], photo.shape[0])).astype(int)
    part = Image.fromarray(np.ascontiguousarray(photo[low[1] : high[1], low[0] : high[0]]))
    widest = max(1.0, float(scales.max()))
    target = tuple(max(1, round(side / widest)) for side in part.size)
    factor = np.array(target) / part.size
    if target != part.size:
        part = part.resize(target, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return part, (centers - low) * factor, scales * factor.mean()


def _matrix(center: np.ndarray, scale: float, angle: float, middle: tuple[float, float]) -> tuple[float, ...]:
    """Pillow's affine map from output to input pixels: turn and scale about ``middle``, which shows ``center``."""
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    x, y = middle
    return (cos, -sin, center[0] - cos * x + sin * y, sin, cos, center[1] - sin * x - cos * y)


class _Object:
    """A soft-edged piece of a photograph on a path of its own."""

    def __init__(self, photo: np.ndarray, frames: int, size: tuple[int, int], rng: np.random.Generator):
        side = rng.uniform(0.2, 0.45) * min(size)
        self.texture = self._cut(photo, side, rng)
        self.mask = self._outline(self.texture.size[0], rng)
        # From a point in or near the frame to another one: objects enter, cross and leave.
        extent = np.array([size[1], size[0]])
        start = rng.uniform(-0.1, 1.1, 2) * extent
        direction = rng.uniform(0, 2 * math.pi)
        reach = rng.uniform(0.2, 2.0) * PAN_PER_FRAME * frames * min(size)
        path = _ease(frames, rng)
        self.centers = start + reach * path[:, None] * np.array([math.cos(direction), math.sin(direction)])
        self.angles = rng.uniform(0, 2 * math.pi) + rng.uniform(-3, 3) * ANGLE_PER_FRAME * frames * path

    @staticmethod
    def _cut(photo: np.ndarray, side: float, rng: np.random.Generator) -> Image.Image:
        cut = min(min(photo.shape[:2]), max(side, rng.uniform(0.3, 0.9) * min(photo.shape[:2])))
        left, top = rng.uniform(0, photo.shape[1] - cut), rng.uniform(0, photo.shape[0] - cut)
        pixels = max(4, math.ceil(side))
        box = (left, top, left + cut, top + cut)
        return Image.fromarray(photo).resize((pixels, pixels), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)

    @staticmethod
    def _outline(pixels: int, rng: np.random.Generator) -> Image.Image:
        """A star-shaped blob, 1 inside and 0 at the border, with an edge about two pixels wide."""
        y, x = (np.mgrid[:pixels, :pixels] + 0.5) / pixels * 2 - 1
        bearing = np.arctan2(y, x)
        radius = 0.78 + sum(
            rng.uniform(0, 0.16 / k) * np.cos(k * bearing + rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5)
        )
        inside = np.clip((radius - np.hypot(x, y)) * pixels / 4 + 0.5, 0, 1)
        inside[0] = inside[-1] = inside[:, 0] = inside[:, -1] = 0
        return Image.fromarray((inside * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(0.5))

    def paste(self, canvas: Image.Image, t: int) -> None:
        """Draw the object of frame ``t`` onto the canvas."""
        side = self.texture.size[0]
        tile = math.ceil(side * math.sqrt(2)) + 2
        corner = np.floor(self.centers[t] - tile / 2).astype(int)
        matrix = _matrix(np.array([side / 2, side / 2]), 1.0, self.angles[t], tuple(self.centers[t] - corner))
        place = ((tile, tile), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        canvas.paste(self.texture.transform(*place), tuple(int(c) for c in corner), self.mask.transform(*place))
