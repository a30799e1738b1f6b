"""The value that every source returns, and what makes a file an image or a video."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp")
VIDEO_EXTENSIONS += (".ogv", ".gif", ".y4m", ".h264")

_IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\x00", b"MM\x00*", b"P5", b"P6")


class Unusable(Exception):
    """One file that cannot be used: corrupt, truncated, too short. The pipeline skips, counts and logs it."""


class Drawing(Protocol):
    """A picture that has no pixels of its own."""

    def render(self, height: int, width: int) -> np.ndarray:
        """uint8 RGB ``(height, width, 3)``."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One encoded image or clip.

    Attributes:
      kind: "image" or "video".
      data: encoded bytes, the path of a file, uint8 RGB pixels ``(H, W, 3)``, or a `Drawing`.
      name: where it came from, for messages.
      caption: the text that belongs to it, or ``None``.
      label: the number of its class, or ``None``.
    """

    kind: str
    data: bytes | str | np.ndarray | Drawing
    name: str
    caption: str | None = None
    label: int | None = None


def kind_of_name(name: str) -> str | None:
    """ "image", "video" or ``None`` from a file name or a bare extension."""
    extension = "." + name.lower().rpartition(".")[2]
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return "video" if extension in VIDEO_EXTENSIONS else None


def kind_of_bytes(data: bytes) -> str:
    """ "image" for bytes that start like a known image format, else "video"."""
    if data.startswith(_IMAGE_SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return "image"
    return "image" if data[4:12] in (b"ftypavif", b"ftypheic") else "video"
