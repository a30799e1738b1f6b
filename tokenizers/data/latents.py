"""Latents of a data set on disk, and batches of them: what a generator is trained on.

A folder holds ``latents.json`` (what made them), ArrayRecord shards with the labels of each beside it and, when
complete, ``statistics.npz``. A record is one item: its latents ``(h, w, C)``, and those of the mirrored picture where
the folder has them. Training sees either with equal chance, as LightningDiT's does.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from .. import errors
from .indexing import Skips

ABOUT, STATISTICS = "latents.json", "statistics.npz"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
NO_LABEL = -1  # of an item


def shard(folder: str | os.PathLike, number: int) -> pathlib.Path:
    """Path of a shard."""
    return pathlib.Path(folder) / f"latents-{number:05d}.array_record"


def write_shard(path: pathlib.Path, labels: np.ndarray, latents: np.ndarray, dtype: str) -> None:
    """Writes a shard that is there whole or not at all.

    Args:
      path: of the file.
      labels: ``(N,)``.
      latents: ``(N, copies, h, w, C)``: of every item, then of its mirrored copy, if there is one.
      dtype: of `DTYPES`, to store them in.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    np.save(_labels(path), np.asarray(labels, np.int32))
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    for row in np.ascontiguousarray(latents.astype(errors.pick("dtype of latents", dtype, DTYPES))):
        writer.write(row.tobytes())
    writer.close()
    os.replace(partial, path)


def _labels(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".labels.npy")


class Shards:
    """The items of finished shards by number: ``read(indices, copies)``. Threads may share it.

    Attributes:
      labels: int32 ``(N,)`` of all items.
    """

    def __init__(self, paths: Sequence[pathlib.Path], shape: Sequence[int], copies: int, dtype: str):
        from array_record.python.array_record_module import ArrayRecordReader

        # Without read-ahead: the reads are shuffled.
        options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
        self._readers = [ArrayRecordReader(str(path), **options) for path in paths]
        self._ends = list(itertools.accumulate(reader.num_records() for reader in self._readers))
        self.labels = np.concatenate([np.zeros(0, np.int32), *(np.load(_labels(path)) for path in paths)])
        if len(self.labels) != len(self):
            raise ValueError(
                f"{paths[0].parent} has {len(self)} items and {len(self.labels)} labels; extract it again."
            )
        self._locks = [threading.Lock() for _ in self._readers]
        self._paths, self._shape = paths, (copies, *shape)
        self._dtype = errors.pick("dtype of latents", dtype, DTYPES)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, indices: Sequence[int], copies: Sequence[int]) -> np.ndarray:
        """Latents float32 ``(n, h, w, C)`` of items; copy 1 is the mirrored one."""
        latents = np.empty((len(indices), *self._shape[1:]), np.float32)
        for row, (index, copy) in enumerate(zip(indices, copies, strict=True)):
            number = bisect.bisect_right(self._ends, index)
            first = self._ends[number - 1] if number else 0
            with self._locks[number]:
                (record,) = self._readers[number].read([int(index) - first])
            if len(record) != np.prod(self._shape) * self._dtype.itemsize:
                raise ValueError(f"{self._paths[number]}: a record of {len(record)} bytes; extract the latents again.")
            latents[row] = np.frombuffer(record, self._dtype).reshape(self._shape)[copy]
        return latents


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of every channel ``(C,)``, float32: mean, standard deviation (unbiased), smallest and largest value."""

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, shards: Shards, items: int, seed: int = 0) -> Statistics:
        """Of that many items drawn at random, none twice, not mirrored (LightningDiT's are of 10,000)."""
        chosen = np.sort(np.random.default_rng(seed).permutation(len(shards))[:items])
        count, mean, scatter, low, high = 0, 0.0, 0.0, np.inf, -np.inf
        for start in range(0, len(chosen), 256):
            part = chosen[start : start + 256]
            values = shards.read(part, np.zeros(len(part), int)).astype(np.float64)
            values = values.reshape(-1, values.shape[-1])
            own = values.mean(axis=0)
            total = count + len(values)
            difference = own - mean
            scatter = scatter + np.square(values - own).sum(axis=0) + difference**2 * (count * len(values) / total)
            mean, count = mean + difference * (len(values) / total), total
            low, high = np.minimum(low, values.min(axis=0)), np.maximum(high, values.max(axis=0))
        if count < 2:
            raise ValueError(f"statistics of latents need at least 2 vectors, got {count}.")
        found = (mean, np.sqrt(scatter / (count - 1)), low, high)
        return cls(*(np.asarray(value, np.float32) for value in found))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes ``statistics.npz``, whole or not at all."""
        partial = pathlib.Path(folder) / f"{STATISTICS}.partial"
        with partial.open("wb") as file:
            np.savez(file, **dataclasses.asdict(self))
        os.replace(partial, pathlib.Path(folder) / STATISTICS)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Statistics:
        """What `save` wrote."""
        with np.load(pathlib.Path(folder) / STATISTICS, allow_pickle=False) as file:
            return cls(**{field.name: file[field.name] for field in dataclasses.fields(cls)})

    def normalize(self, latents):
        """To mean 0 and standard deviation 1 in every channel; a constant channel stays constant."""
        return (latents - self.mean) / self._spread

    def restore(self, latents):
        """The inverse of `normalize`."""
        return latents * self._spread + self.mean

    @property
    def _spread(self) -> np.ndarray:
        return np.where(self.std > 0, self.std, np.float32(1))


class LatentFolder:
    """A complete folder of latents.

    Attributes:
      about: the content of ``latents.json``.
      shape: of the latents of an item, ``(h, w, C)``.
      classes: number of classes, 0 where the data has none.
      statistics: `Statistics`.
      shards: `Shards`.

    Raises:
      ValueError: when there is no such folder, or it is not complete.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).expanduser()
        if not path or not (self.path / ABOUT).is_file():
            raise ValueError(f"{str(path)!r} is no folder of latents: it has no {ABOUT}. Extract them first.")
        self.about: Mapping[str, Any] = json.loads((self.path / ABOUT).read_text())
        if not self.about.get("complete"):
            raise ValueError(f"{self.path} is not complete; run the command that extracts its latents again.")
        made = self.about["latents"]
        self.shape = tuple(made["shape"])
        self.copies = made["copies"]
        self.classes: int = self.about["classes"]
        self.statistics = Statistics.load(self.path)
        paths = [shard(self.path, number) for number in range(self.about["shards"])]
        self.shards = Shards(paths, self.shape, self.copies, made["dtype"])

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def digest(self) -> str:
        """Hash of what made the latents, and of their statistics."""
        facts = [json.dumps(self.about, sort_keys=True), *(v.tolist() for v in vars(self.statistics).values())]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class _Settings:
    path: str
    batch_size: int
    flip: bool = True
    read_threads: int = 2
    prefetch: int = 4


class LatentPipeline:
    """Batches of normalized latents with labels, endless; batch ``k`` is a pure function of (folder, seed, k).

    A batch is ``{"latents": float32 (B / processes, h, w, C), "label": int32 (B / processes,)}``. An item without a
    label has the number of classes, which generators read as none.

    Args:
      config: ``path`` of the folder, ``batch_size`` (global), ``flip`` (mirrored copies with equal chance),
        ``read_threads``, ``prefetch``.
      seed: of order and mirroring.
      process_index, process_count: this process gets rows ``[i * B / n, (i + 1) * B / n)`` of each global batch.

    Attributes:
      folder: `LatentFolder`.
      shapes: ``[("latents", (B, h, w, C))]``.
      fingerprint: hash of what decides the batches.
      skipped: counts nothing: latents have no unusable items.
    """

    def __init__(self, config: Mapping[str, Any], *, seed: int = 0, process_index: int = 0, process_count: int = 1):
        known = [field.name for field in dataclasses.fields(_Settings)]
        for key in config:
            if key not in known:
                raise errors.unknown("key of the latents' config", key, known)
        self.settings = _Settings(**config)
        size = self.settings.batch_size
        if not isinstance(size, int) or size < 1 or size % process_count:
            raise ValueError(f"batch_size={size!r} must be a positive multiple of {process_count} processes.")
        self.folder = LatentFolder(self.settings.path)
        if self.settings.flip and self.folder.copies < 2:
            raise ValueError(f"flip=True needs mirrored copies, which {self.folder.path} lacks; extract it with flip.")
        self.shapes = [("latents", (size, *self.folder.shape))]
        self.skipped = Skips()
        self._seed, self._rows = (
            seed,
            (process_index * size // process_count, (process_index + 1) * size // process_count),
        )
        facts = [self.folder.digest, seed, size, self.settings.flip]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def summary(self) -> str:
        """What was found, for the log."""
        made, origin = self.folder.about["latents"], self.folder.about["tokenizer"]
        copies = " and their mirrored copies" if self.settings.flip else ""
        return (
            f"latents, fingerprint {self.fingerprint}\n  {len(self.folder)} items{copies} of {origin['name']}, "
            f"{made['dtype']} {self.folder.shape}, {self.folder.classes or 'no'} classes, in {self.folder.path}"
        )

    def batch(self, number: int) -> dict[str, np.ndarray]:
        """This process's rows of one batch."""
        size, count = self.settings.batch_size, len(self.folder)
        rows = range(*self._rows)
        places = [divmod(number * size + row, count) for row in rows]
        indices = [int(_order(count, self._seed, epoch)[place]) for epoch, place in places]
        # Drawn for the global batch, whatever part of it is read here.
        mirrored = np.random.default_rng([self._seed, number]).integers(0, 2, size)[slice(*self._rows)]
        latents = self.folder.shards.read(indices, mirrored if self.settings.flip else np.zeros(len(rows), int))
        labels = self.folder.shards.labels[indices]
        labels = np.where(labels == NO_LABEL, self.folder.classes, labels).astype(np.int32)
        return {"latents": self.folder.statistics.normalize(latents), "label": labels}

    def batches(self, start: int = 0) -> LatentBatches:
        """Batches ``start``, ``start + 1``, ...; close them (or use ``with``) to stop the threads."""
        return LatentBatches(self, start)


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


class LatentBatches:
    """Iterator over the batches of a `LatentPipeline`, read ahead by its threads."""

    def __init__(self, pipeline: LatentPipeline, start: int):
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}")
        import grain

        settings = pipeline.settings
        threads = settings.read_threads if settings.prefetch else 0
        reading = grain.ReadOptions(threads, max(settings.prefetch, threads) if threads else 0)
        numbers = grain.MapDataset.range(start, 2**62)
        self._iterator = iter(numbers.map(pipeline.batch).to_iter_dataset(reading))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def close(self) -> None:
        """Stops the threads."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()

    def __enter__(self) -> LatentBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
