"""Whole pictures and videos from and to files, for the command line and for notebooks."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from . import errors

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif")
SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)


@dataclasses.dataclass(frozen=True)
class Item:
    """A picture ``(H, W, 3)`` or a video ``(T, H, W, 3)``, uint8 RGB, and the video's frames per second (0 for pictures)."""

    pixels: np.ndarray
    fps: float


def read(path: str | pathlib.Path) -> Item:
    """All of a picture or video file.

    Raises:
      ValueError: for an unknown ending or an unreadable file.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise errors.unknown("file ending", suffix, SUFFIXES)
    from .data import decode, records

    try:
        if suffix in IMAGE_SUFFIXES:
            return Item(decode.decode_image(str(path)), 0.0)
        return Item(*_whole_video(path))
    except records.Unusable as error:
        raise ValueError(f"{path}: {error}") from error


def _whole_video(path: pathlib.Path) -> tuple[np.ndarray, float]:
    import av

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            fps = float(stream.average_rate or 25)
            frames = [
                np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90) % 4) for f in container.decode(stream)
            ]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is not a readable video ({error}).") from error
    if not frames:
        raise ValueError(f"{path} holds no video frame.")
    return np.stack(frames), fps


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Float pixels in [-1, 1] to uint8, clipped and rounded."""
    return np.round((np.clip(np.asarray(pixels, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def write(path: str | pathlib.Path, pixels: np.ndarray, fps: float = 0.0) -> None:
    """Writes uint8 ``(H, W, 3)`` as a picture or ``(T, H, W, 3)`` as a video; makes the folder.

    Raises:
      ValueError: when the file's ending does not fit what is to be written.
    """
    path = pathlib.Path(path)
    accepted = IMAGE_SUFFIXES if pixels.ndim == 3 else VIDEO_SUFFIXES
    if path.suffix.lower() not in accepted:
        what = "a picture" if pixels.ndim == 3 else "a video"
        raise ValueError(f"{path}: {what} cannot be written with that ending. Accepted: {', '.join(accepted)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels.ndim == 3:
        import PIL.Image

        PIL.Image.fromarray(pixels).save(path)
        return
    from .evaluate.pictures import write_mp4

    write_mp4(path, pixels, fps or 12.0)
