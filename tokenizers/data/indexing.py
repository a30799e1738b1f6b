"""Which item belongs to which split and bucket, decided once from names and headers."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .decode import probe
from .loading import Pool
from .records import Unusable
from .settings import SourceSettings, held_out_fraction
from .shards import cache_folder, write_atomically
from .sources import WITHOUT_PATH, open_source
from .transforms import nearest_aspect

# Reading that many headers is slow enough to keep the answer.
_WORTH_CACHING = 1000


class Skips:
    """Files that were left out: counted, and logged once per file with path and reason.

    Attributes:
      count: different files skipped so far.
      times: how often an item fell to the next one, repeats of the same file included.
      last: the latest "path: reason" messages, newest last.
    """

    kept = 20

    def __init__(self):
        self.count, self.times = 0, 0
        self.last: list[str] = []
        self._seen: set[str] = set()

    def add(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Count (path, reason) pairs."""
        for name, reason in skipped:
            self.times += 1
            if name in self._seen:
                continue
            self._seen.add(name)
            self.count += 1
            self.last = [*self.last, f"{name}: {reason}"][-self.kept :]
            logging.getLogger(__name__).warning("skipped %s: %s", name, reason)


def manifest_digest(source) -> str:
    """Hash of the names and sizes of a source's files."""
    digest = hashlib.sha256()
    for name, size in source.manifest():
        digest.update(f"{name}\0{size}\n".encode())
    return digest.hexdigest()


class Library:
    """The sources of a pipeline, opened once each, with their splits and sizes.

    Args:
      skips: gets the files left out.
      labels: whether items have the number of their class.
    """

    def __init__(self, skips: Skips, labels: bool = False):
        self._skips, self._labels = skips, labels
        self._sources: dict[tuple, object] = {}
        self._sizes: dict[int, np.ndarray] = {}

    def sources(self) -> list:
        """Every source opened so far."""
        return list(self._sources.values())

    def split(self, settings: SourceSettings, split: str) -> tuple[object, np.ndarray]:
        """(source, indices of its items in the split)."""
        fraction = held_out_fraction(settings.held_out) if settings.held_out else None
        own_split = settings.source in WITHOUT_PATH
        if fraction is not None and not own_split:
            source = self._open(settings.source, settings.path)
            return source, _by_fraction(source, fraction, split)
        if split == "train":
            source = self._open(settings.source, settings.path, drawings=settings.drawings)
        elif settings.held_out and fraction is None:
            kind = "auto" if own_split else settings.source
            source = self._open(kind, str(settings.held_out))
        elif own_split:
            drawings = max(1, round((fraction or 0.1) * settings.drawings))
            source = self._open(settings.source, "", held_out=True, drawings=drawings)
        else:
            raise ValueError(
                f"no held-out data for {settings.path!r}: set held_out to a path, or to a fraction such as 0.01"
            )
        return source, np.arange(len(source))

    def _open(self, kind: str, path: str, held_out: bool = False, drawings: int = 1):
        key = (kind, path, held_out, drawings if kind == "shapes" else 0)
        if key not in self._sources:
            self._sources[key] = open_source(kind, path, held_out=held_out, drawings=drawings, labels=self._labels)
            self._skips.add(self._sources[key].dropped)
        return self._sources[key]

    def pools(self, source, members: np.ndarray, buckets: tuple[tuple[int, int], ...]) -> list[Pool]:
        """One pool per bucket: its items are those whose aspect ratio is nearest to its own."""
        if source.any_size or len({round(math.log(width / height), 9) for height, width in buckets}) == 1:
            return [Pool(source, members) for _ in buckets]
        if id(source) not in self._sizes:
            self._sizes[id(source)] = _read_sizes(source, self._skips)
        sizes = self._sizes[id(source)]
        chosen: list[list[int]] = [[] for _ in buckets]
        for index in members:
            if sizes[index, 0]:
                for bucket in nearest_aspect(int(sizes[index, 0]), int(sizes[index, 1]), buckets):
                    chosen[bucket].append(int(index))
        return [Pool(source, np.array(indices, np.int64)) for indices in chosen]


def _by_fraction(source, fraction: float, split: str) -> np.ndarray:
    """Items by a hash of their file's base name, so that adding files moves few of the old ones."""
    names = (os.path.basename(source.name(index)) for index in range(len(source)))
    order = np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names], kind="stable")
    held_out = max(1, round(fraction * len(source)))
    if held_out >= len(source):
        raise ValueError(f"{len(source)} items cannot be split: held_out={fraction} leaves none to train on")
    return np.sort(order[:held_out] if split == "held_out" else order[held_out:])


def _read_sizes(source, skips: Skips) -> np.ndarray:
    """int32 ``(N, 2)`` of (height, width) of every item, zeros where the header is unreadable."""
    place = os.path.join(cache_folder(), f"sizes-{manifest_digest(source)[:32]}.npy")
    if len(source) >= _WORTH_CACHING:
        try:
            sizes = np.load(place)
            if sizes.shape == (len(source), 2):
                return sizes
        except (OSError, ValueError):
            pass  # Not there yet, or damaged: read again.

    def read(index: int) -> tuple[int, int]:
        try:
            return probe(source[index])
        except (Unusable, OSError) as error:
            failures.append((source.name(index), str(error)))
            return 0, 0

    failures: list[tuple[str, str]] = []
    with ThreadPoolExecutor(8) as pool:
        sizes = np.array(list(pool.map(read, range(len(source)))), np.int32).reshape(-1, 2)
    skips.add(sorted(failures))
    if len(source) >= _WORTH_CACHING:
        buffer = io.BytesIO()
        np.save(buffer, sizes)
        try:
            write_atomically(place, buffer.getvalue())
        except OSError as error:
            logging.getLogger(__name__).warning("cannot keep image sizes in %s: %s", place, error)
    return sizes
