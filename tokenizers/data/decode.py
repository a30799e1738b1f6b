"""Encoded bytes to uint8 RGB pixels: images by Pillow, clips by PyAV. Anything unreadable raises `Unusable`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageOps

from .. import errors
from .records import Record, Unusable

# Transparent pixels are shown on white, as browsers and viewers do: the colour stored under them is arbitrary.
BACKGROUND = (255, 255, 255)

# PyAV before 19 refuses a file whose metadata is not UTF-8, unless it is asked not to.
_ANY_METADATA = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}

# How the frames of a clip are chosen, see `decode_clip`.
SAMPLING = ("time", "spread")

# How far before the wanted time to look for a key frame when the container's index was wrong; None is the beginning.
_SEEK_MARGINS = (0.0, 2.0, 20.0, None)


def decode_image(data: bytes | str | np.ndarray, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """Encoded image to uint8 RGB ``(H, W, 3)``, upright.

    EXIF orientation is applied; grayscale is repeated; transparency is composited on white; 16-bit gray is scaled to
    8 bits; CMYK and palettes are converted; an animation gives its first frame.

    Args:
      data: encoded bytes, a path, or pixels (returned as they are).
      at_least: ``(H, W)`` that the caller will shrink to anyway: JPEGs more than twice that size are decoded smaller,
        which is several times faster.
    """
    if isinstance(data, np.ndarray):
        return _check_pixels(data)
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            if at_least is not None and image.format == "JPEG":
                side = 2 * max(at_least)
                image.draft(image.mode, (side, side))
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise almost any type on damaged input.
        raise Unusable(f"not a readable image ({type(error).__name__}: {error})") from error


def _check_pixels(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise Unusable(f"pixels must be uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", None)):
        # Pillow's own conversion clips at 255 instead of scaling.
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Unusable(f"pixels of mode {image.mode!r} have no defined value range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def spread_frames(total: int, rate: float, frames: int, fps: float, draw: float) -> np.ndarray:
    """Frame numbers of a clip as VidTok's authors choose them (`sample_frames_with_fps`).

    Every ``round(rate / fps)``-th frame, but spread evenly over one frame more than these cover, so that one step in
    the clip is longer than the others.

    Args:
      total: frames of the video.
      rate: its frames per second.
      frames: frames of the clip.
      fps: wanted frames per second.
      draw: in [0, 1), the place of the clip among the possible ones; 0 starts at the first frame.

    Returns:
      int ``(min(frames, total),)``, not decreasing.
    """
    length = (frames - 1) * max(round(rate / fps), 1) + 1
    start = int(draw * max(total - length, 1))
    return np.linspace(start, min(total - 1, start + length), min(frames, total)).astype(int)


def decode_clip(
    data: bytes | str,
    frames: int,
    *,
    fps: float = 0.0,
    stride: int = 1,
    sampling: str = "time",
    rng: np.random.Generator | None = None,
    at_least: tuple[int, int] | None = None,
) -> np.ndarray:
    """A clip of a video as uint8 RGB ``(T, H, W, 3)``, upright; only the frames around it are decoded.

    Args:
      data: encoded bytes or a path.
      frames: T.
      fps: frame rate the video is resampled to before striding: the frame nearest in time is taken, so a lower rate
        drops frames and a higher one repeats them. 0 takes the video's own frames.
      stride: take every ``stride``-th frame at that rate.
      sampling: one of `SAMPLING`: ``time`` as said above; ``spread`` takes the video's own frames at whole steps, see
        `spread_frames`, and repeats the last one where the video is too short.
      rng: draws the start, uniformly over all possible ones; ``None`` starts at the first frame.
      at_least: ``(H, W)`` that the caller will shrink to anyway: larger videos are reduced to twice that while their
        colours are converted, which saves time and memory.

    Raises:
      Unusable: damaged, without a video stream, or too short for ``frames`` at this rate and stride.
    """
    if sampling not in SAMPLING:
        raise errors.unknown("frame sampling", sampling, SAMPLING)
    draw = 0.0 if rng is None else float(rng.random())
    try:
        with contextlib.closing(_Video(data)) as video:
            if sampling == "spread":
                return _to_pixels(video.pick_spread(draw, frames, fps, stride), at_least)
            step = stride / fps if fps > 0 else None
            picked = video.pick_by_header(draw, frames, step, stride) or video.pick_by_scan(draw, frames, step, stride)
            return _to_pixels(picked, at_least)
    except (av.FFmpegError, EOFError) as error:
        raise Unusable(f"not a readable video ({type(error).__name__}: {error})") from error


class _Video:
    """Finds frames by time in an open container. Times are seconds since the stream's first frame."""

    def __init__(self, data: bytes | str):
        self.data = data
        self.container, self.stream = _open(data)
        rate = self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate
        self.period = float(1 / rate) if rate else 1 / 25
        self.base = self.stream.time_base or Fraction(1, 90000)
        self.origin = float((self.stream.start_time or 0) * self.base)
        self.counted = False
        self.started = False

    def close(self) -> None:
        self.container.close()

    def pick_by_header(self, draw: float, frames: int, step: float | None, stride: int) -> list | None:
        """The clip if the container's duration can be believed, else ``None``."""
        if self.stream.duration:
            duration = float(self.stream.duration * self.base)
        elif self.container.duration:
            duration = self.container.duration / av.time_base
        else:
            return None
        length = (frames - 1) * (step or stride * self.period)
        room = duration - self.period - length
        if room < -0.5 * self.period:
            return None
        start = draw * max(room, 0.0)
        if step:
            return self._nearest([start + k * step for k in range(frames)])
        return self._every(start, frames, stride)

    def pick_by_scan(self, draw: float, frames: int, step: float | None, stride: int) -> list:
        """The clip from the times of all packets, read without decoding."""
        times = self._scan()
        if step is None:
            room = len(times) - 1 - (frames - 1) * stride
            first = int(draw * (room + 1))
            wanted = times[first : first + (frames - 1) * stride + 1 : stride]
        else:
            length = (frames - 1) * step
            room = times[-1] - times[0] - length if times else -1.0
            room = 0.0 if -0.5 * self.period <= room < 0 else room
            wanted = [times[0] + draw * room + k * step for k in range(frames)] if times else []
        picked = self._nearest(wanted) if room >= 0 else None
        if picked is None:
            rate = f"{1 / step:.3g} frames per second" if step else f"stride {stride}"
            raise Unusable(f"too short: {len(times)} frames, {frames} wanted at {rate}")
        return picked

    def pick_spread(self, draw: float, frames: int, fps: float, stride: int) -> list:
        """The clip that `spread_frames` says, filled up by its last frame."""
        times = self._scan()
        if not times:
            raise Unusable("no frames")
        wanted = spread_frames(len(times), 1 / self.period, frames, fps / stride if fps > 0 else 1 / self.period, draw)
        picked = self._nearest([times[number] for number in wanted])
        if picked is None:
            raise Unusable(f"fewer frames can be decoded than the {len(times)} that the file announces")
        return picked + picked[-1:] * (frames - len(picked))

    def _scan(self) -> list[float]:
        container, stream = _open(self.data)
        stamps, count = [], 0
        with container:
            for packet in container.demux(stream):
                if packet.size:
                    count += 1
                    stamp = packet.pts if packet.pts is not None else packet.dts
                    if stamp is not None:
                        stamps.append(float(stamp * self.base))
        if len(stamps) < count:  # A raw stream: frames are numbered instead.
            self.counted = True
            return [n * self.period for n in range(count)]
        self.origin = min(stamps, default=0.0)
        return [stamp - self.origin for stamp in sorted(stamps)]

    def _decode(self, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames from the last key frame at or before ``start``."""
        for margin in _SEEK_MARGINS:
            back = margin is None or self.counted or start - margin <= 0
            if not back:
                self.container.seek(int((self.origin + start - margin) / self.base), stream=self.stream)
            elif self.started:  # Not every container can seek to its beginning, but all can be opened again.
                self.close()
                self.container, self.stream = _open(self.data)
            self.started = True
            decoded = self.container.decode(self.stream)
            first = next(decoded, None)
            if first is None and not back:
                continue
            if first is None:
                return
            time = self._time(first, 0)
            if time <= start + 0.5 * self.period or back:
                yield time, first
                for number, frame in enumerate(decoded, 1):
                    yield self._time(frame, number), frame
                return

    def _time(self, frame: av.VideoFrame, number: int) -> float:
        if self.counted or frame.pts is None:
            return number * self.period
        return float(frame.pts * self.base) - self.origin

    def _nearest(self, wanted: list[float]) -> list | None:
        """For each wanted time the frame nearest to it (the earlier one of two)."""
        picked, previous = [], None
        for time, frame in self._decode(wanted[0]):
            while len(picked) < len(wanted) and time >= wanted[len(picked)] - 1e-3 * self.period:
                target = wanted[len(picked)]
                # The thousandth of a frame keeps rounding from deciding ties.
                closer = previous is not None and target - previous[0] <= time - target + 1e-3 * self.period
                picked.append(previous[1] if closer else frame)
            if len(picked) == len(wanted):
                return picked
            previous = (time, frame)
        while previous and len(picked) < len(wanted) and wanted[len(picked)] <= previous[0] + 0.75 * self.period:
            picked.append(previous[1])
        return picked if len(picked) == len(wanted) else None

    def _every(self, start: float, frames: int, stride: int) -> list | None:
        """``frames`` frames from the first one at or after ``start``, ``stride`` apart."""
        picked, seen = [], 0
        for time, frame in self._decode(start):
            # A hundredth of a frame absorbs the rounding of time stamps to the container's clock.
            if time < start - 0.01 * self.period:
                continue
            if seen % stride == 0:
                picked.append(frame)
            if len(picked) == frames:
                return picked
            seen += 1
        return None


def open_container(data: bytes | str) -> av.container.InputContainer:
    """A container for reading, from encoded bytes or a path, whatever the encoding of its titles and tags."""
    return av.open(io.BytesIO(data) if isinstance(data, bytes) else data, **_ANY_METADATA)


def _open(data: bytes | str) -> tuple[av.container.InputContainer, av.VideoStream]:
    container = open_container(data)
    if not container.streams.video:
        container.close()
        raise Unusable("no video stream")
    stream = container.streams.video[0]
    # Many clips are decoded side by side, one thread each; frame threads would only decode past the clip.
    stream.codec_context.thread_count = 1
    return container, stream


def _to_pixels(frames: list, at_least: tuple[int, int] | None) -> np.ndarray:
    reformatter = av.video.reformatter.VideoReformatter()
    pixels, last = [], None
    for frame in frames:
        if frame.is_corrupt:
            raise Unusable("a damaged frame")
        if frame is not last:  # A frame that fills several times is converted once.
            width, height = _reduced(frame.width, frame.height, at_least)
            shrink = "AREA" if width < frame.width else None
            rgb = reformatter.reformat(frame, width, height, "rgb24", interpolation=shrink).to_ndarray()
            rgb = np.rot90(rgb, k=round(frame.rotation / 90) % 4)
            last = frame
        if pixels and rgb.shape != pixels[0].shape:
            raise Unusable("the frame size changes within the clip")
        pixels.append(rgb)
    return np.stack(pixels)


def _reduced(width: int, height: int, at_least: tuple[int, int] | None) -> tuple[int, int]:
    if at_least is None:
        return width, height
    factor = min(1.0, 2 * max(at_least) / min(width, height))
    return round(width * factor), round(height * factor)


def probe(record: Record) -> tuple[int, int]:
    """``(H, W)`` of an upright record, from its header where that is enough."""
    if isinstance(record.data, np.ndarray):
        return record.data.shape[0], record.data.shape[1]
    if record.kind == "video":
        clip = decode_clip(record.data, 1)
        return clip.shape[1], clip.shape[2]
    source = io.BytesIO(record.data) if isinstance(record.data, bytes) else record.data
    try:
        with Image.open(source) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap the axes.
            return (width, height) if turned else (height, width)
    except Exception as error:  # As in decode_image.
        raise Unusable(f"not a readable image ({type(error).__name__}: {error})") from error
