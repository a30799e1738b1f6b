"""Whole pictures and videos from and to files, for the command line and for notebooks.

A video is a file, or numbered pictures named by a pattern as in FFmpeg: ``frames/%05d.png``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from . import errors
from .data.records import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

SUFFIXES = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)
WRITABLE_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
WRITABLE_VIDEOS = (".mp4", ".mkv", ".mov", ".avi")

_FALLBACK_FPS = 25.0  # of containers that do not say, and of numbered pictures
_NUMBER = re.compile(r"%(?:0(\d+))?d")


@dataclasses.dataclass(frozen=True)
class Item:
    """A picture ``(H, W, 3)`` or video ``(T, H, W, 3)``, uint8 RGB, and its frames per second (0 for a picture)."""

    pixels: np.ndarray
    fps: float


def is_sequence(path: str | pathlib.Path) -> bool:
    """Whether a name is a pattern of numbered pictures."""
    return _NUMBER.search(pathlib.Path(path).name) is not None


def sequence(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The numbered pictures that a pattern names, in order.

    Raises:
      ValueError: where there is none.
    """
    path = pathlib.Path(path)
    before, digits, after = _NUMBER.split(path.name, maxsplit=1)
    number = re.compile(f"{re.escape(before)}(\\d{{{digits or 1},}}){re.escape(after)}")
    found = ((number.fullmatch(entry.name), entry) for entry in path.parent.glob("*"))
    numbered = sorted((int(match[1]), entry) for match, entry in found if match)
    if not numbered:
        raise ValueError(f"no file is called {path}, with a number in place of {_NUMBER.search(path.name)[0]}.")
    return [entry for _, entry in numbered]


def is_video(path: str | pathlib.Path) -> bool:
    """Whether a file name has the ending of a video, or is a pattern of numbered pictures.

    Raises:
      ValueError: for an ending that is neither a picture's nor a video's.
    """
    if is_sequence(path):
        return True
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise errors.unknown("file ending", suffix, SUFFIXES)
    return suffix in VIDEO_EXTENSIONS


def read(path: str | pathlib.Path) -> Item:
    """All of a picture or video file.

    Raises:
      ValueError: for an unknown ending or an unreadable file.
    """
    if is_video(path):
        with open_video(path) as video:
            return Item(np.stack(list(video)), video.fps)
    return Item(read_image(path), 0.0)


def read_image(path: str | pathlib.Path) -> np.ndarray:
    """A picture file as uint8 RGB ``(H, W, 3)``, upright.

    Raises:
      ValueError: for an unreadable file.
    """
    from .data import decode, records

    try:
        return decode.decode_image(str(path))
    except records.Unusable as error:
        raise ValueError(f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Video:
    """An open video file: an iterator over its frames, uint8 RGB ``(H, W, 3)``, upright, and what its header says.

    ``frames`` is 0 where the header does not say how many there are.
    """

    fps: float
    frames: int
    _decoded: Iterator[np.ndarray]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._decoded


@contextlib.contextmanager
def open_video(path: str | pathlib.Path) -> Iterator[Video]:
    """Opens a video for reading frame by frame.

    Raises:
      ValueError: for an unreadable file, an empty one, or one whose frames change their size.
    """
    import av

    from .data import decode

    if is_sequence(path):
        pictures = sequence(path)
        yield Video(_FALLBACK_FPS, len(pictures), _pictures(path, pictures))
        return
    try:
        container = decode.open_container(str(path))
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path} is not a readable video ({error}).") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"{path} holds no video.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield Video(float(stream.average_rate or _FALLBACK_FPS), stream.frames, _frames(path, container, stream))


def _frames(path, container, stream) -> Iterator[np.ndarray]:
    import av

    upright = (
        np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))
        for frame in container.decode(stream)
    )
    try:
        yield from _of_one_size(path, upright)
    except av.FFmpegError as error:
        raise ValueError(f"{path} is damaged ({error}).") from error


def _pictures(path, pictures: list[pathlib.Path]) -> Iterator[np.ndarray]:
    yield from _of_one_size(path, map(read_image, pictures))


def _of_one_size(path, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    shape = None
    for pixels in frames:
        if shape not in (None, pixels.shape):
            raise ValueError(f"{path}: the frame size changes from {shape[:2]} to {pixels.shape[:2]}.")
        shape = pixels.shape
        yield pixels
    if shape is None:
        raise ValueError(f"{path} holds no video frame.")


def write(path: str | pathlib.Path, pixels: np.ndarray, fps: float = 0.0) -> None:
    """Writes uint8 ``(H, W, 3)`` as a picture or ``(T, H, W, 3)`` as a video (12 frames per second unless given).

    Raises:
      ValueError: when the file's ending does not fit what is to be written.
    """
    if pixels.ndim == 4:
        with VideoWriter(path, fps or 12.0) as writer:
            writer.add(pixels)
        return
    import PIL.Image

    path = check_target(path, video=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    lossy = path.suffix.lower() in (".jpg", ".jpeg", ".webp")
    PIL.Image.fromarray(pixels).save(path, **({"quality": 95} if lossy else {}))


def check_target(path: str | pathlib.Path, video: bool) -> pathlib.Path:
    """The path, if its ending is one that `write` can write.

    Raises:
      ValueError: with the accepted endings.
    """
    path = pathlib.Path(path)
    as_video = video and not is_sequence(path)
    accepted, what = (WRITABLE_VIDEOS, "a video") if as_video else (WRITABLE_IMAGES, "a picture")
    if path.suffix.lower() not in accepted:
        raise ValueError(f"{path}: {what} cannot be written with that ending. Accepted: {', '.join(accepted)}.")
    return path


class VideoWriter:
    """Writes a video frame by frame; makes the folder, and removes the file when an error ends the ``with`` block.

    A pattern, ``frames/%05d.png``, is written as pictures from number 1 on; those stay after an error.

    H.264 (MPEG-4 where PyAV lacks it) at high quality with 4:2:0 colour. That needs even sizes: odd ones are kept by
    writing 4:4:4 colour instead, which some players cannot show. MPEG-4 cannot do that: it refuses odd sizes.
    """

    def __init__(self, path: str | pathlib.Path, fps: float):
        self.path = check_target(path, video=True)
        self._fps = Fraction(fps).limit_denominator(1000)
        self._container: Any = None
        self._stream: Any = None
        self._numbered = 0

    def add(self, frames: np.ndarray) -> None:
        """Appends uint8 frames ``(T, H, W, 3)``."""
        import av

        if is_sequence(self.path):
            for frame in frames:
                self._numbered += 1
                write(self.path.with_name(self.path.name % self._numbered), frame)
            return
        if self._container is None:
            self._open(frames.shape[1], frames.shape[2])
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self._container.mux(self._stream.encode(picture))

    def _open(self, height: int, width: int) -> None:
        import av

        h264, odd = "libx264" in av.codecs_available, bool(height % 2 or width % 2)
        if odd and not h264:
            raise ValueError(f"{self.path}: this PyAV has no H.264 encoder, and MPEG-4 cannot hold {height}x{width}.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self.path), "w")
        options = {"crf": "14"} if h264 else {"q:v": "2"}
        self._stream = self._container.add_stream("libx264" if h264 else "mpeg4", rate=self._fps, options=options)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv444p" if odd else "yuv420p"

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._container is None:
            return
        if kind is None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        if kind is not None:
            self.path.unlink(missing_ok=True)
