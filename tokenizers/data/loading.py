"""From (pool, position, seed) to pixels: what the worker processes run for every item of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from .camera import CLOSEST, virtual_camera_clip
from .decode import decode_clip, decode_image
from .records import Record, Unusable
from .transforms import Crop, adm_crop, apply_crop, choose_crop

# After so many unusable files in a row the data set counts as empty.
MAX_TRIES = 4096


@dataclasses.dataclass(frozen=True)
class Pool:
    """Items that may be drawn for one stream and bucket: ``source[members[position]]``."""

    source: object
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.members)

    def name(self, position: int) -> str:
        return self.source.name(int(self.members[position % len(self)]))

    def record(self, position: int) -> Record:
        try:
            return self.source[int(self.members[position % len(self)])]
        except OSError as error:  # Deleted or unreadable since it was indexed.
            raise Unusable(f"cannot be read: {error}") from error


@dataclasses.dataclass(frozen=True)
class Item:
    """What a stream makes of a record: ``frames`` frames of ``size`` (h, w), and how."""

    frames: int
    size: tuple[int, int]
    fps: float = 0.0
    stride: int = 1
    sampling: str = "time"
    crop: str = "random"
    flip: bool = False
    zoom: tuple[float, float] = (1.0, 1.0)
    resample: str = "lanczos"
    virtual_camera: bool = False

    def training_pixels(self, pool: Pool, record: Record, rng: np.random.Generator) -> np.ndarray:
        """A random clip, crop and flip: uint8 ``(T, h, w, 3)``."""
        if record.kind == "image" and self.frames > 1:
            clip = self._camera_clip(pool, record, rng, 1 / CLOSEST)
            return clip[:, :, ::-1] if self.flip and rng.random() < 0.5 else clip
        if hasattr(record.data, "render"):  # Drawn to fit, and never mirrored: its caption knows left from right.
            return self._decode(record, rng, 1.0)
        if self.crop == "adm":
            frames = adm_crop(self._decode(record, rng, None), self.size)
            return frames[:, :, ::-1] if self.flip and rng.random() < 0.5 else frames
        frames = self._decode(record, rng, self.zoom[1])
        if self.crop == "random":
            crop = choose_crop(frames.shape[1:3], self.size, rng=rng, zoom=self.zoom, flip=self.flip)
        else:
            crop = choose_crop(frames.shape[1:3], self.size)
            crop = dataclasses.replace(crop, flip=bool(self.flip and rng.random() < 0.5))
        return apply_crop(frames, crop, self.size, self.resample)

    def evaluation_pixels(self, pool: Pool, record: Record, position: int, view: int) -> np.ndarray:
        """The fixed view ``view`` of an item: view 0 is the centre crop (of the first clip); see `corner_crop`."""
        if record.kind == "image" and self.frames > 1:
            return self._camera_clip(pool, record, np.random.default_rng([position, view]), None)
        frames = self._decode(record, None, None)
        if self.crop == "adm" and not view:
            return adm_crop(frames, self.size)
        crop = corner_crop(frames.shape[1:3], self.size, view) if view else choose_crop(frames.shape[1:3], self.size)
        return apply_crop(frames, crop, self.size, self.resample)

    def _decode(self, record: Record, rng: np.random.Generator | None, enlarge: float | None) -> np.ndarray:
        at_least = None if enlarge is None else tuple(round(side * enlarge) for side in self.size)
        if hasattr(record.data, "render"):
            return record.data.render(*(at_least or self.size))[None]
        if record.kind == "image":
            return decode_image(record.data, at_least)[None]
        how = {"fps": self.fps, "stride": self.stride, "sampling": self.sampling}
        return decode_clip(record.data, self.frames, **how, rng=rng, at_least=at_least)

    def _camera_clip(self, pool: Pool, record: Record, rng: np.random.Generator, enlarge: float | None) -> np.ndarray:
        if not self.virtual_camera:
            raise Unusable("an image cannot fill a stream of clips unless virtual_camera is on")
        photo = self._decode(record, None, enlarge)[0]
        try:
            other = pool.record(int(rng.integers(len(pool))))
            cutouts = self._decode(other, None, enlarge)[0] if other.kind == "image" else photo
        except Unusable:  # Counted when its own turn comes.
            cutouts = photo
        return virtual_camera_clip(photo, cutouts, self.frames, self.size, rng)


def corner_crop(frame: tuple[int, int], size: tuple[int, int], view: int) -> Crop:
    """Views 1 to 4: a corner of the frame at up to twice the size of the centre crop's resize."""
    cover = max(size[0] / frame[0], size[1] / frame[1])
    cover *= min(2.0, max(1.0, 1 / cover))
    height, width = max(size[0], int(frame[0] * cover)), max(size[1], int(frame[1] * cover))
    bottom, right = divmod(view - 1, 2)
    return Crop(height, width, bottom * (height - size[0]), right * (width - size[1]))


@dataclasses.dataclass(frozen=True)
class LoadBatch:
    """Loads this process's rows of a planned batch.

    The plan of a training batch lists (pool, position, seed) for the global batch, that of a held-out one (pool,
    position, view) or ``None`` for padding. Rows outside ``rows`` are other processes' and are not read.
    """

    stream: str
    item: Item
    pools: Sequence[Pool]
    rows: tuple[int, int]
    training: bool
    captions: bool
    labels: bool

    def __call__(self, plan: Sequence[tuple[int, int, int] | None]) -> dict:
        load = self._train if self.training else self._evaluate
        skipped: list[tuple[str, str]] = []
        loaded = [load(entry, skipped) for entry in plan[slice(*self.rows)]]
        batch = {"stream": self.stream, "pixels": np.stack([pixels for pixels, _, _ in loaded]), "skipped": skipped}
        if self.captions:
            batch["caption"] = [record.caption or "" if record else "" for _, record, _ in loaded]
        if self.labels:
            numbers = [-1 if record is None or record.label is None else record.label for _, record, _ in loaded]
            batch["label"] = np.array(numbers, np.int32)
        if not self.training:
            batch["valid"] = np.array([record is not None for _, record, _ in loaded])
            batch["name"] = [name for _, _, name in loaded]
        return batch

    def _train(self, entry: tuple[int, int, int], skipped: list) -> tuple[np.ndarray, Record, str]:
        number, position, seed = entry
        pool = self.pools[number]
        for step in range(min(len(pool), MAX_TRIES)):
            try:
                record = pool.record(position + step)
                pixels = self.item.training_pixels(pool, record, np.random.default_rng(seed))
                return pixels, record, record.name
            except Unusable as error:
                skipped.append((pool.name(position + step), str(error)))
        tried = min(len(pool), MAX_TRIES)
        name, reason = skipped[-1]
        raise ValueError(
            f"stream {self.stream!r} is empty: none of {tried} items in a row is usable; the last, {name}: {reason}"
        )

    def _evaluate(self, entry: tuple[int, int, int] | None, skipped: list) -> tuple[np.ndarray, Record | None, str]:
        padding = np.zeros((self.item.frames, *self.item.size, 3), np.uint8)
        if entry is None:
            return padding, None, ""
        number, position, view = entry
        pool = self.pools[number]
        try:
            record = pool.record(position)
            name = f"{record.name}#{view}" if view else record.name
            return self.item.evaluation_pixels(pool, record, position, view), record, name
        except Unusable as error:
            skipped.append((pool.name(position), str(error)))
            return padding, None, ""
