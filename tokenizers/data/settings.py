"""The data part of a config: its keys, their defaults, and the errors for anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .. import errors
from .decode import SAMPLING
from .sources import WITHOUT_PATH
from .transforms import CROPS, FILTERS


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """One data set of a mixture.

    ``held_out`` is "" (none), a fraction of the items such as 0.01 or "0.01", or the path of another data set. The
    embedded photographs have a split of their own, which "" and any fraction mean: two of them are never trained on.
    Of ``shapes``, ``drawings`` are drawn for training, and that fraction of them (a tenth for "") are other ones.
    """

    source: str = "embedded"
    path: str = ""
    weight: float = 1.0
    held_out: str | float = ""
    drawings: int = 10_000


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """Batches of one kind: clips of ``frames`` frames at each of ``resolutions`` (h, w).

    Attributes:
      frames: frames per clip; 1 for images, or for single random frames of videos.
      resolutions: one or more (h, w); with several, each item goes to the one with the nearest aspect ratio.
      batch_size: items per batch over all processes.
      weight: share of the batches.
      fps: frame rate that videos are resampled to, 0 for their own.
      stride: take every ``stride``-th frame at that rate.
      sampling: how the frames of a clip are chosen, one of `decode.SAMPLING`.
      sources: the mixture of data sets.
    """

    frames: int
    resolutions: tuple[tuple[int, int], ...]
    batch_size: int
    weight: float = 1.0
    fps: float = 0.0
    stride: int = 1
    sampling: str = "time"
    sources: tuple[SourceSettings, ...] = ()


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole data config.

    Attributes:
      streams: by name, sorted.
      virtual_camera: make clips from images in streams with several frames.
      crop: "random", "center", or "adm" (squares as `transforms.adm_crop` makes them, in evaluation too).
      flip: mirror half of the items.
      zoom: range of the random enlargement before a random crop, at least 1 (see `transforms.choose_crop`).
      resample: resize filter, one of `transforms.FILTERS`.
      labels: give the classes of the items: folders in a folder of images, or the labels in shards.
      workers: worker processes; 0 loads in this one.
      read_threads: threads in each process that load whole batches, 0 for none.
      prefetch: batches kept ready.
    """

    streams: dict[str, StreamSettings]
    virtual_camera: bool = False
    crop: str = "random"
    flip: bool = False
    zoom: tuple[float, float] = (1.0, 1.0)
    resample: str = "lanczos"
    labels: bool = False
    workers: int = 0
    read_threads: int = 2
    prefetch: int = 4

    def facts(self) -> dict[str, Any]:
        """Everything that decides what the batches hold, without paths and without how fast they come."""
        facts = dataclasses.asdict(self)
        for key in ("workers", "read_threads", "prefetch"):
            del facts[key]
        if not self.labels:  # Runs from before there were labels go on.
            del facts["labels"]
        for stream in facts["streams"].values():
            for source in stream["sources"]:
                del source["path"], source["drawings"]  # Counted where the source names its files.
                if held_out_fraction(source["held_out"]) is None:
                    del source["held_out"]
        return facts


_SOURCE_KEYS = ("source", "path", "held_out", "drawings")


def resolve(config: Mapping[str, Any]) -> Settings:
    """Checked settings from a mapping (a plain one or an ml_collections ConfigDict).

    ``source``, ``path``, ``held_out``, ``drawings`` and ``sources`` may stand at the top, for all streams, or in a
    stream. ``sources`` is ``{name: {source, path, weight, held_out, drawings}}``. ``None`` and ``sources={}`` mean
    "not given".
    """
    given = _given(config)
    fields = {field.name for field in dataclasses.fields(Settings)}
    _check_keys("data config key", given, fields | {"sources", *_SOURCE_KEYS})
    if not given.get("streams"):
        raise ValueError("the data config has no streams; needs {name: {frames, resolutions, batch_size}}")
    streams = {name: _stream(name, _given(given["streams"][name]), given) for name in sorted(given["streams"])}
    settings = Settings(**{**{k: v for k, v in given.items() if k in fields}, "streams": streams})
    settings = dataclasses.replace(settings, zoom=tuple(float(z) for z in settings.zoom))
    if settings.crop not in CROPS:
        raise errors.unknown("crop", settings.crop, CROPS)
    errors.pick("resample filter", settings.resample, FILTERS)
    if len(settings.zoom) != 2 or not 1.0 <= settings.zoom[0] <= settings.zoom[1]:
        raise ValueError(f"zoom must be (low, high) with 1 <= low <= high, got {settings.zoom}")
    if settings.zoom != (1.0, 1.0) and settings.crop != "random":
        raise ValueError(
            f"zoom {settings.zoom} belongs to random crops, but crop is {settings.crop!r}; use zoom=(1, 1)"
        )
    if settings.crop == "adm" and any(h != w for stream in streams.values() for h, w in stream.resolutions):
        raise ValueError("crop='adm' makes squares: every resolution must be one.")
    for key in ("workers", "read_threads", "prefetch"):
        if not isinstance(getattr(settings, key), int) or getattr(settings, key) < 0:
            raise ValueError(f"{key} must be an integer of at least 0, got {getattr(settings, key)!r}")
    return settings


def _given(config: Any) -> dict[str, Any]:
    plain = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(plain, Mapping):
        raise ValueError(f"the data config and its streams are mappings, got {type(config).__name__}: {config!r}")
    return {key: value for key, value in plain.items() if value is not None}


def _check_keys(what: str, given: Mapping[str, Any], accepted: set[str]) -> None:
    for key in given:
        if key not in accepted:
            raise errors.unknown(what, key, sorted(accepted))


def _stream(name: str, given: dict[str, Any], top: Mapping[str, Any]) -> StreamSettings:
    fields = {field.name for field in dataclasses.fields(StreamSettings)}
    _check_keys(f"key in stream {name!r}", given, fields | set(_SOURCE_KEYS))
    for key in ("resolutions", "batch_size"):
        if key not in given:
            raise ValueError(f"stream {name!r} lacks {key!r}")
    values = {"frames": 1, **{k: v for k, v in given.items() if k in fields}}
    values["resolutions"] = _resolutions(name, given["resolutions"])
    values["sources"] = _mixture(name, given, top)
    for key in ("frames", "batch_size", "stride"):
        if not isinstance(values.get(key, 1), int) or values.get(key, 1) < 1:
            raise ValueError(f"stream {name!r}: {key} must be an integer of at least 1, got {values[key]!r}")
    if values.get("weight", 1.0) <= 0 or values.get("fps", 0.0) < 0:
        raise ValueError(f"stream {name!r}: weight must be positive and fps at least 0, got {given}")
    if values.get("sampling", "time") not in SAMPLING:
        raise errors.unknown("frame sampling", values["sampling"], SAMPLING)
    return StreamSettings(**values)


def _resolutions(name: str, value: Any) -> tuple[tuple[int, int], ...]:
    try:
        sizes = tuple((int(height), int(width)) for height, width in value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"stream {name!r}: resolutions must be pairs ((height, width), ...), got {value!r}") from error
    if not sizes or min(min(size) for size in sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"stream {name!r}: resolutions must be one or more different positive pairs, got {value!r}")
    return sizes


def _mixture(name: str, given: Mapping[str, Any], top: Mapping[str, Any]) -> tuple[SourceSettings, ...]:
    own = any(given.get(key) for key in ("source", "path", "sources"))
    place = given if own else top
    held_out = given.get("held_out", top.get("held_out", "")) or ""
    drawings = given.get("drawings", top.get("drawings", SourceSettings.drawings))
    several = place.get("sources") or {}
    if several and (place.get("source") or place.get("path")):
        raise ValueError(f"stream {name!r}: sources (a mixture) and source or path exclude each other; leave one empty")
    if not several:
        kind = place.get("source") or ("auto" if place.get("path") else "embedded")
        return (_with_path(SourceSettings(kind, place.get("path", ""), 1.0, held_out, drawings)),)
    accepted = {field.name for field in dataclasses.fields(SourceSettings)}
    mixture = []
    for key in sorted(several):
        entry = _given(several[key])
        _check_keys(f"key in source {key!r}", entry, accepted)
        kind = entry.get("source") or ("auto" if entry.get("path") else "embedded")
        weight = float(entry.get("weight", 1.0))
        if weight <= 0:
            raise ValueError(f"source {key!r}: weight must be positive, got {weight}")
        rest = (entry.get("held_out", held_out), entry.get("drawings", drawings))
        mixture.append(_with_path(SourceSettings(kind, entry.get("path", ""), weight, *rest)))
    return tuple(mixture)


def _with_path(source: SourceSettings) -> SourceSettings:
    if source.path or source.source in WITHOUT_PATH:
        return source
    raise ValueError(
        f"config.data.path is empty, and source {source.source!r} reads from disk: set it to a folder of images, "
        "videos or images with texts (source images, videos, captions), or to shards (array_record, parquet, tar); "
        "docs/data.md says what belongs in them. Configs run as they are, on embedded data, in their variant "
        "':smoke': --config=configs/<name>.py:smoke."
    )


def held_out_fraction(held_out: str | float) -> float | None:
    """The held-out fraction, or ``None`` when ``held_out`` is a path or nothing."""
    try:
        value = float(held_out)
    except ValueError:
        return None
    if not 0 < value < 1:
        raise ValueError(f"the held-out fraction must be between 0 and 1, got {held_out!r}")
    return value
