"""Step-addressed batches: batch ``k`` is a pure function of (config, seed, k).

It does not depend on the number of worker processes, read threads or training processes: the plan of a batch (which
items, which random seed for each) is made for the global batch, and each process loads only its rows of it. To resume
is to ask for ``batches(start=k)``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags

from .. import errors
from .indexing import Library, Skips, manifest_digest
from .loading import Item, LoadBatch, Pool
from .settings import Settings, StreamSettings, resolve

SPLITS = ("train", "held_out", "once")


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The batches of one stream at one resolution; ``share`` is its part of the stream's batches."""

    stream: str
    settings: StreamSettings
    item: Item
    pools: tuple[Pool, ...]
    pool_shares: tuple[float, ...]
    share: float

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Global batch shape ``(B, T, H, W, 3)``."""
        return (self.settings.batch_size, self.item.frames, *self.item.size, 3)


class Pipeline:
    """Batches of uint8 RGB from a data config.

    Args:
      config: see `settings.Settings`; a mapping or a ConfigDict.
      seed: of the shuffling and every random choice.
      split: "train" (endless, random), "held_out" (finite, ordered, fixed views), or "once": the items that are
        trained on, as held-out ones are shown.
      process_index, process_count: this process gets rows ``[i * B / n, (i + 1) * B / n)`` of each global batch.

    Attributes:
      shapes: all (stream, global shape ``(B, T, H, W, 3)``) that batches can have.
      fingerprint: hash of what decides the batches: settings, seed, and the names and sizes of the files.
      skipped: count, times and last messages of unusable files seen so far (`indexing.Skips`).
      classes: names of the classes, in the order of the labels; empty where there are no labels, or numbers only.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        seed: int = 0,
        split: str = "train",
        process_index: int = 0,
        process_count: int = 1,
    ):
        if split not in SPLITS:
            raise errors.unknown("split", split, SPLITS)
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be in [0, {process_count}), got {process_index}")
        self.settings = resolve(config)
        self.split = split
        self.skipped = Skips()
        self._seed = seed
        self._process = (process_index, process_count)
        self._library = Library(self.skipped, self.settings.labels)
        self._buckets = [
            bucket for name, stream in self.settings.streams.items() for bucket in self._make_buckets(name, stream)
        ]
        self.shapes = [(bucket.stream, bucket.shape) for bucket in self._buckets]
        self.classes = self._classes()
        self.fingerprint = self._fingerprint()

    def _classes(self) -> tuple[str, ...]:
        named = [source for source in self._library.sources() if source.has_labels]
        for source in named[1:]:
            if source.classes != named[0].classes:
                raise ValueError(
                    f"one label would mean two things: {named[0].description} and {source.description} have other "
                    f"classes: {named[0].classes[:5]}..., {source.classes[:5]}..."
                )
        return named[0].classes if named else ()

    def _make_buckets(self, name: str, stream: StreamSettings) -> list[Bucket]:
        settings = self.settings
        if stream.batch_size % self._process[1]:
            raise ValueError(
                f"stream {name!r}: batch_size {stream.batch_size} is not a multiple of {self._process[1]} processes"
            )
        columns: list[list[Pool]] = []
        for entry in stream.sources:
            source, members = self._library.split(entry, "held_out" if self.split == "held_out" else "train")
            if stream.frames > 1 and source.kind == "image" and not settings.virtual_camera:
                raise ValueError(
                    f"stream {name!r} wants {stream.frames} frames, but {source.description} are images; "
                    "set virtual_camera=True to make clips from them, or frames=1"
                )
            columns.append(self._library.pools(source, members, stream.resolutions))
        # Of source s, the share of bucket b is the share of its items there, whatever the other sources hold.
        totals = [max(1, sum(len(pool) for pool in column)) for column in columns]
        weights = np.array([entry.weight for entry in stream.sources]) / sum(entry.weight for entry in stream.sources)
        buckets = []
        for number, size in enumerate(stream.resolutions):
            pools = [column[number] for column in columns]
            shares = [w * len(pool) / total for w, pool, total in zip(weights, pools, totals, strict=True)]
            kept = [(pool, share) for pool, share in zip(pools, shares, strict=True) if len(pool)]
            if not kept:
                logging.getLogger(__name__).warning("stream %s: no item is nearest to %s; left out", name, size)
            else:
                item = Item(
                    frames=stream.frames,
                    size=size,
                    fps=stream.fps,
                    stride=stream.stride,
                    sampling=stream.sampling,
                    crop=settings.crop,
                    flip=settings.flip,
                    zoom=settings.zoom,
                    resample=settings.resample,
                    virtual_camera=settings.virtual_camera,
                )
                pools, shares = zip(*kept, strict=True)
                buckets.append(Bucket(name, stream, item, pools, shares, sum(shares)))
        if not buckets:
            raise ValueError(f"stream {name!r} is empty: no usable item. {'; '.join(self.skipped.last)}")
        return buckets

    def _fingerprint(self) -> str:
        facts = [self.settings.facts(), self._seed, [manifest_digest(source) for source in self._library.sources()]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def num_batches(self) -> int | None:
        """Number of batches; ``None`` for the endless training split."""
        if self.split == "train":
            return None
        return sum(-(-len(_held_out_plan(bucket)) // bucket.settings.batch_size) for bucket in self._buckets)

    def summary(self) -> str:
        """What was found and what the batches look like, for the log."""
        lines = [f"data ({self.split}), fingerprint {self.fingerprint}"]
        lines += [f"  source: {source.description}" for source in self._library.sources()]
        weights = sum(stream.weight for stream in self.settings.streams.values())
        for bucket in self._buckets:
            share = bucket.settings.weight * bucket.share / weights
            items = sum(len(pool) for pool in bucket.pools)
            lines.append(f"  {bucket.stream}: {items} items, uint8 {bucket.shape}, {share:.1%} of the batches")
        if self.skipped.count:
            lines.append(f"  skipped {self.skipped.count} files, the last: {self.skipped.last[-1]}")
        return "\n".join(lines)

    def batches(self, start: int = 0, stride: int = 1) -> Batches:
        """Batches ``start``, ``start + stride``, ... of this process; close them (or use ``with``) to stop workers."""
        return Batches(self, start, stride)

    def evaluation_items(self) -> Iterator[dict[str, Any]]:
        """Items one by one, in order: pixels uint8 ``(T, H, W, 3)``, stream, name, any caption and label."""
        if self.split == "train":
            raise ValueError("evaluation items belong to splits 'held_out' and 'once', this pipeline has 'train'")
        with self.batches() as batches:
            for batch in batches:
                for row in np.flatnonzero(batch["valid"]):
                    item = {"pixels": batch["pixels"][row], "stream": batch["stream"], "name": batch["name"][row]}
                    yield item | {key: batch[key][row] for key in ("caption", "label") if key in batch}

    def dataset(self):
        """All batches of this process as a `grain.MapDataset`, including their "skipped" lists."""
        import grain

        parts = [self._bucket_dataset(bucket) for bucket in self._buckets]
        if len(parts) == 1:
            return parts[0]
        if self.split != "train":
            return grain.MapDataset.concatenate(parts)
        return grain.MapDataset.mix(parts, [bucket.settings.weight * bucket.share for bucket in self._buckets])

    def _bucket_dataset(self, bucket: Bucket):
        import grain  # It takes a second to import, and imports jax itself when that is installed.

        index, count = self._process
        rows = bucket.settings.batch_size // count
        sources = [pool.source for pool in bucket.pools]
        load = LoadBatch(
            bucket.stream,
            bucket.item,
            bucket.pools,
            (index * rows, (index + 1) * rows),
            self.split == "train",
            any(source.has_captions for source in sources),
            any(source.has_labels for source in sources),
        )
        if self.split != "train":
            plan = _held_out_plan(bucket)
            plan += [None] * (-len(plan) % bucket.settings.batch_size)
            size = bucket.settings.batch_size
            return grain.MapDataset.source([plan[i : i + size] for i in range(0, len(plan), size)]).map(load)
        parts = []
        for number, pool in enumerate(bucket.pools):
            parts.append(_epochs(len(pool), self._derived_seed(bucket, number)).map(_Tag(number)))
        items = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, bucket.pool_shares)
        plan = items.random_map(_draw_seed, seed=self._derived_seed(bucket, -1))
        return plan.batch(bucket.settings.batch_size, batch_fn=list).map(load)

    def _derived_seed(self, bucket: Bucket, number: int) -> int:
        """A 32-bit seed of its own for every stream, resolution and source."""
        name = zlib.crc32(f"{bucket.stream} {bucket.item.size} {number}".encode())
        return int(np.random.SeedSequence([self._seed, name]).generate_state(1)[0])


# Grain's shuffle walks a cipher of at least 16 bits until it meets a position that exists: 2 ms an item for a dozen.
_TABLE = 2**16


def _epochs(size: int, seed: int):
    """Positions in [0, size) without end, each epoch in an order of its own."""
    import grain

    if size >= _TABLE:
        return grain.MapDataset.range(size).shuffle(seed).repeat()
    return grain.MapDataset.range(sys.maxsize).map(_Shuffled(size, seed))


@dataclasses.dataclass(frozen=True)
class _Shuffled:
    size: int
    seed: int

    def __call__(self, number: int) -> int:
        epoch, position = divmod(int(number), self.size)
        return int(_permutation(self.size, self.seed, epoch)[position])


@functools.lru_cache(maxsize=64)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


@dataclasses.dataclass(frozen=True)
class _Tag:
    number: int

    def __call__(self, position: int) -> tuple[int, int]:
        return self.number, int(position)


def _draw_seed(item: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    return (*item, int(rng.integers(2**63)))


def _held_out_plan(bucket: Bucket) -> list[tuple[int, int, int] | None]:
    """(pool, position, view) of every held-out item, in order."""
    return [
        (number, position, view)
        for number, pool in enumerate(bucket.pools)
        for position in range(len(pool))
        for view in range(pool.source.views)
    ]


class Batches:
    """Iterator over the batches of this process.

    A batch is ``{"pixels": uint8 (B / processes, T, H, W, 3), "stream": name}``, with "caption" (list of str, "" where
    there is none) if a source has captions, "label" (int32 per row, -1 where there is none) if a source has labels,
    and, in the held-out split, "valid" (bool per row; false for padding and unusable items, whose pixels are 0) and
    "name".

    ``get_state`` and ``set_state`` work as those of Grain iterators; the state is the number of the next batch, so it
    fits any number of workers and processes.
    """

    def __init__(self, pipeline: Pipeline, start: int, stride: int = 1):
        if start < 0 or stride < 1:
            raise ValueError(f"start must be at least 0 and stride at least 1, got {start} and {stride}")
        self._pipeline = pipeline
        self._next, self._stride = start, stride
        self._iterator = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = self._open()
        batch = dict(next(self._iterator))
        self._pipeline.skipped.add(batch.pop("skipped"))
        batch |= {key: np.asarray(batch[key]) for key in ("pixels", "label") if key in batch}
        self._next += self._stride
        return batch

    def _open(self):
        import grain

        settings: Settings = self._pipeline.settings
        dataset = self._pipeline.dataset()
        # A slice that starts at the end would wrap around.
        rest = dataset[self._next :: self._stride] if self._next < len(dataset) else []
        if len(rest) == 0:
            return iter(())
        threads = settings.read_threads if settings.prefetch else 0
        per_process = -(-settings.prefetch // max(1, settings.workers))
        reading = grain.ReadOptions(threads, max(per_process, threads) if threads else 0)
        loaded = rest.to_iter_dataset(reading)
        if settings.workers:
            if not flags.FLAGS.is_parsed():
                # Grain reads its flags here; in a notebook or a test nobody parsed any, and the defaults are meant.
                flags.FLAGS.mark_as_parsed()
            loaded = loaded.mp_prefetch(grain.MultiprocessingOptions(settings.workers, max(1, per_process)))
        return iter(loaded)

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch and the fingerprint of the data."""
        return {"next": self._next, "fingerprint": self._pipeline.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved state; one of other data or settings is refused."""
        if state["fingerprint"] != self._pipeline.fingerprint:
            raise ValueError(
                f"the saved data position belongs to fingerprint {state['fingerprint']}, this data has "
                f"{self._pipeline.fingerprint}: the files, the settings or the seed changed"
            )
        self.close()
        self._next = int(state["next"])

    def close(self) -> None:
        """Stop the worker processes and threads."""
        iterator, self._iterator = self._iterator, None
        if hasattr(iterator, "close"):
            iterator.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
