"""Pictures side by side for people: a labelled grid as PNG and a clip as MP4."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .baselines import Baseline
from .collect import BASELINES

DIFFERENCE_GAIN = 4
_INK, _FAINT, _PAPER, _GAP = (28, 32, 38), (105, 112, 122), (255, 255, 255), 8


@dataclasses.dataclass(frozen=True)
class Sample:
    """One item to show.

    Attributes:
      stream: name of its stream.
      row: its numbers, a row of ``items.csv``.
      reference, reconstruction: uint8 ``(T, H, W, 3)``.
      baselines: label -> the item as that baseline codes it.
    """

    stream: str
    row: dict[str, float]
    reference: np.ndarray
    reconstruction: np.ndarray
    baselines: dict[str, Baseline]


def preview_grid(samples: Sequence[Sample], cell: int = 256) -> Image.Image:
    """One row per item: input, reconstruction, difference, baselines; clips show their middle frame.

    Args:
      samples: at least one.
      cell: height of a picture in the grid; wide pictures get less.
    """
    labels = [label for label in BASELINES if any(label in sample.baselines for sample in samples)]
    titles = ["input", "reconstruction", f"difference x{DIFFERENCE_GAIN}", *(BASELINES[label] for label in labels)]
    rows = [_row(sample, labels, cell) for sample in samples]
    width = max(picture.width for row in rows for picture, _ in row if picture is not None)
    heights = [max(picture.height for picture, _ in row if picture is not None) for row in rows]
    header, caption = 30, 40
    size = (
        _GAP + len(titles) * (width + _GAP),
        _GAP + header + sum(height + caption + _GAP for height in heights),
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((_GAP + column * (width + _GAP), _GAP), title, _INK, _font(17))
    top = _GAP + header
    for row, height in zip(rows, heights, strict=True):
        for column, (picture, text) in enumerate(row):
            left = _GAP + column * (width + _GAP)
            if picture is None:
                continue
            sheet.paste(picture, (left, top))
            draw.multiline_text((left, top + picture.height + 3), text, _FAINT, _font(13), spacing=2)
        top += height + caption + _GAP
    return sheet


def _row(sample: Sample, labels: Sequence[str], cell: int) -> list[tuple[Image.Image | None, str]]:
    frames = len(sample.reference)
    middle = frames // 2
    reference, reconstruction = sample.reference[middle], sample.reconstruction[middle]
    difference = np.abs(reference.astype(np.int16) - reconstruction) * DIFFERENCE_GAIN
    what = f"{sample.stream} {int(sample.row['item'])}" + (f"\nframe {middle + 1} of {frames}" if frames > 1 else "")
    rate = sample.row["tokens"] * sample.row["bits_per_token"] / reference.shape[0] / reference.shape[1] / frames
    found = [(reference, what), (reconstruction, _caption(sample.row.get("psnr"), rate))]
    found.append((np.minimum(difference, 255).astype(np.uint8), ""))
    for label in labels:
        coded = sample.baselines.get(label)
        if coded is None:
            found.append((None, ""))
            continue
        rate = coded.bits / float(np.prod(sample.reference.shape[:3]))
        text = _caption(sample.row.get(f"{label}_psnr"), rate) + (", over budget" if coded.over_budget else "")
        found.append((coded.pixels[middle], text))
    return [(None if picture is None else _fitted(picture, cell), text) for picture, text in found]


def _caption(psnr: float | None, rate: float) -> str:
    return (f"{psnr:.2f} dB\n" if psnr is not None else "") + f"{rate:.3g} bits/pixel"


def _fitted(picture: np.ndarray, cell: int) -> Image.Image:
    height, width = picture.shape[:2]
    scale = min(cell / height, 1.6 * cell / width)
    # Whole factors keep the pixels of small pictures square and sharp.
    scale = max(1, int(scale)) if scale > 1 else scale
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize(size, method)


def _font(size: int):
    return ImageFont.load_default(size)


def side_by_side(sample: Sample, labels: Sequence[str] = ("bicubic", "h264"), height: int = 256) -> np.ndarray:
    """Frames of a clip, uint8 ``(T, h, w, 3)``: input, reconstruction and baselines beside each other, with titles."""
    parts = [("input", sample.reference), ("reconstruction", sample.reconstruction)]
    parts += [(BASELINES[label], sample.baselines[label].pixels) for label in labels if label in sample.baselines]
    frames = []
    for index in range(len(sample.reference)):
        pictures = [_fitted(pixels[index], height) for _, pixels in parts]
        sheet = Image.new(
            "RGB", (sum(p.width for p in pictures) + 4 * (len(parts) - 1), pictures[0].height + 26), _PAPER
        )
        draw, left = ImageDraw.Draw(sheet), 0
        for (title, _), picture in zip(parts, pictures, strict=True):
            draw.text((left + 4, 3), title, _INK, _font(15))
            sheet.paste(picture, (left, 26))
            left += picture.width + 4
        frames.append(np.asarray(sheet))
    return np.stack(frames)


def write_mp4(path: pathlib.Path, frames: np.ndarray, fps: float = 12.0) -> None:
    """Writes uint8 frames ``(T, H, W, 3)`` as H.264, or MPEG-4 where PyAV lacks its encoder; odd sizes grow by one."""
    import av

    odd = ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0))
    frames = np.pad(frames, odd, mode="edge")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    quality = {"crf": "14"} if codec == "libx264" else {"q:v": "2"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=quality)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
