"""Shards of encoded images and clips with random access: tar (WebDataset layout), Parquet and ArrayRecord."""

from __future__ import annotations

import bisect
import collections
import contextlib
import hashlib
import itertools
import json
import os
import struct
import tarfile
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .labels import class_names, label_column, label_of_member
from .records import Record, Unusable, kind_of_bytes, kind_of_name

CAPTION_FIELDS = ("caption", "text", "txt", "prompt", "description")
PIXEL_FIELDS = ("image", "video", "jpg", "jpeg", "png", "webp", "mp4", "webm", "img", "bytes", "image_bytes", "clip")


class _Shards:
    """What the three formats share: a run of shards, each with a number of records."""

    views = 1
    any_size = False
    classes: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[str], counts: Sequence[int]):
        self._paths = list(paths)
        self._ends = list(itertools.accumulate(counts))
        if not self._ends or not self._ends[-1]:
            raise ValueError(f"no images or clips in {len(paths)} shard(s), the first one {paths[0]!r}.")

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def name(self, index: int) -> str:
        shard, row = self._locate(index)
        return f"{self._paths[shard]}[{row}]"

    def manifest(self) -> Iterator[tuple[str, int]]:
        for path in self._paths:
            yield os.path.basename(path), os.path.getsize(path)


# Tar ---------------------------------------------------------------------------------------------------------------

_INDEX_VERSION = 2


class TarSource(_Shards):
    """WebDataset shards: members ``key.jpg``, ``key.txt``, ``key.json`` ... with one key are one sample.

    Captions come from a ``.txt`` or ``.caption`` member, or from "caption" or "text" in a ``.json`` one, labels from a
    ``.cls`` member, or from "label" or "cls" in a ``.json`` one. Each shard is scanned
    once; the offsets are kept in ``<shard>.index.json`` beside it (in the user's cache when the folder is read-only)
    and made anew when the shard's size or time changes. Compressed tars have no random access.
    """

    def __init__(self, paths: Sequence[str], *, labels: bool = False):
        indices = [_tar_index(path) for path in paths]
        self._samples = [index["samples"] for index in indices]
        self.dropped = [(path, index["damage"]) for path, index in zip(paths, indices, strict=True) if index["damage"]]
        super().__init__(paths, [len(samples) for samples in self._samples])
        kinds = {kind_of_name(sample[1]) for samples in self._samples for sample in samples}
        self.kind = kinds.pop() if len(kinds) == 1 else "mixed"
        self.has_captions = any(sample[4] for samples in self._samples for sample in samples)
        self.has_labels = labels
        if labels and not any(sample[5] for samples in self._samples for sample in samples):
            raise ValueError(f"no labels in {len(paths)} tar shard(s), the first one {paths[0]!r}: no .cls, no .json")
        self.description = f"{len(self)} samples ({self.kind}) in {len(paths)} tar shard(s)"

    def name(self, index: int) -> str:
        shard, row = self._locate(index)
        key, extension = self._samples[shard][row][:2]
        return f"{self._paths[shard]}:{key}.{extension}"

    def __getitem__(self, index: int) -> Record:
        shard, row = self._locate(index)
        _, extension, offset, size, caption, label = self._samples[shard][row]
        name, number = self.name(index), None
        with open(self._paths[shard], "rb") as file:
            data = _read_at(file, offset, size, name)
            text = _read_at(file, *caption[1:], name) if caption else None
            if self.has_labels and label:
                number = label_of_member(label[0], _read_at(file, *label[1:], name))
        return Record(kind_of_name(extension), data, name, _caption(caption, text), number)


def _read_at(file, offset: int, size: int, name: str) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise Unusable(f"the shard ends within {name}")
    return data


def _caption(caption: Sequence | None, text: bytes | None) -> str | None:
    if not caption:
        return None
    decoded = text.decode("utf-8", "replace").strip()
    if caption[0] != "json":
        return decoded
    try:
        fields = json.loads(decoded)
    except ValueError as error:
        raise Unusable(f"damaged JSON caption: {error}") from error
    return next((str(fields[name]) for name in CAPTION_FIELDS if name in fields), None)


def _tar_index(path: str) -> dict:
    status = os.stat(path)
    stamp = [_INDEX_VERSION, status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    places = [path + ".index.json", os.path.join(cache_folder(), f"{os.path.basename(path)}.{digest}.index.json")]
    for place in places:
        try:
            with open(place, encoding="utf-8") as file:
                index = json.load(file)
            if index["stamp"] == stamp:
                return index
        except (OSError, ValueError, KeyError, TypeError):
            continue  # Absent, or cut off by a crash of another writer: it is made again.
    samples, damage = _scan_tar(path)
    index = {"stamp": stamp, "samples": samples, "damage": damage}
    for place in places:
        try:
            write_atomically(place, json.dumps(index).encode())
            break
        except OSError:
            continue  # Read-only: the cache is next; without any, the shard is scanned every time.
    return index


def _scan_tar(path: str) -> tuple[list, str]:
    """[[key, extension, offset, size, caption, label], ...] and what was damaged.

    Caption and label are [extension, offset, size] of the member that holds them, or null.
    """
    pixels: dict[str, list] = {}
    captions: dict[str, list] = {}
    labels: dict[str, list] = {}
    damage = ""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, base = os.path.split(member.name)
                if not member.isfile() or base.startswith("."):
                    continue
                stem, _, extension = base.partition(".")
                key, kind = os.path.join(folder, stem), kind_of_name(base)
                last = extension.lower().rpartition(".")[2]
                if kind:
                    pixels.setdefault(key, [key, extension, member.offset_data, member.size])
                elif last in ("txt", "caption") or (last == "json" and key not in captions):
                    captions[key] = [last, member.offset_data, member.size]
                if last == "cls" or (last == "json" and key not in labels):
                    labels[key] = [last, member.offset_data, member.size]
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # Where tarfile stopped there is no end marker.
                damage = f"the shard is damaged after {len(pixels)} samples: not a tar header"
    except (tarfile.TarError, EOFError) as error:
        if not pixels:
            raise ValueError(f"{path!r} is not an uncompressed tar file: {error}") from error
        damage = f"the shard is damaged after {len(pixels)} samples: {error}"
    if pixels:
        end = max(offset + size for _, _, offset, size in pixels.values())
        if end > os.path.getsize(path):
            damage = damage or "the shard is cut off within its last sample"
    return [[*sample, captions.get(key), labels.get(key)] for key, sample in pixels.items()], damage


def cache_folder() -> str:
    """Where indices go that cannot lie beside their data: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tokenizers_data")


def write_atomically(path: str, data: bytes) -> None:
    """Write a file that readers see whole or not at all, also when several processes write it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# Parquet -----------------------------------------------------------------------------------------------------------


class ParquetSource(_Shards):
    """Parquet files with a column of encoded bytes and, optionally, one of captions and one of labels.

    The pixel column is binary or a struct {bytes, path} (as the `datasets` library writes), the first one found of
    `PIXEL_FIELDS`; captions of `CAPTION_FIELDS`; labels are integers of `LABEL_FIELDS`, and their names those that the
    `datasets` library keeps in the schema. Parquet is read by row groups: the last few are kept, so groups of
    tens of rows, or tar or ArrayRecord shards, are faster for shuffled reading than groups of thousands.
    """

    kept_row_groups = 8

    def __init__(self, paths: Sequence[str], *, labels: bool = False):
        from pyarrow import parquet

        self.dropped: list[tuple[str, str]] = []
        good, self._groups = [], []
        for path in paths:
            try:
                with parquet.ParquetFile(path) as file:
                    schema = file.schema_arrow
                    self._groups.append([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
                good.append(path)
            except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError.
                self.dropped.append((path, f"not a readable Parquet file: {error}"))
        if not good:
            raise ValueError(f"no readable Parquet file among {len(paths)}; {paths[0]!r}: {self.dropped[0][1]}")
        self._column = next((name for name in PIXEL_FIELDS if name in schema.names), None)
        self._caption = next((name for name in CAPTION_FIELDS if name in schema.names), None)
        if self._column is None:
            have, wanted = ", ".join(schema.names), ", ".join(PIXEL_FIELDS)
            raise ValueError(f"no column of encoded images in {good[-1]!r}: it has {have}; accepted: {wanted}.")
        self.has_labels = labels
        self._label = label_column(schema, good[-1]) if labels else None
        self.classes = class_names(schema, self._label) if labels else ()
        super().__init__(good, [sum(rows) for rows in self._groups])
        self._open_caches()
        self.has_captions = self._caption is not None
        self.kind = "video" if self._column in ("video", "mp4", "webm", "clip") else "image"
        self.description = f"{len(self)} rows ({self.kind}) in {len(good)} Parquet file(s), column {self._column!r}"

    def _open_caches(self) -> None:
        self._lock = threading.Lock()
        self._recent: collections.OrderedDict = collections.OrderedDict()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_recent")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open_caches()

    def __getitem__(self, index: int) -> Record:
        shard, row = self._locate(index)
        group = 0
        while row >= self._groups[shard][group]:
            row -= self._groups[shard][group]
            group += 1
        table = self._row_group(shard, group)
        value = table.column(self._column)[row].as_py()
        caption = table.column(self._caption)[row].as_py() if self._caption else None
        label = table.column(self._label)[row].as_py() if self._label else None
        if isinstance(value, Mapping):
            data = value.get("bytes")
            if data is None and value.get("path"):
                data = os.path.join(os.path.dirname(self._paths[shard]), value["path"])
        else:
            data = value
        if not isinstance(data, (bytes, str)) or not data:
            raise Unusable("the row holds no encoded bytes")
        kind = kind_of_bytes(data) if isinstance(data, bytes) else kind_of_name(data) or self.kind
        return Record(kind, data, self.name(index), None if caption is None else str(caption), label)

    def _row_group(self, shard: int, group: int):
        from pyarrow import parquet

        with self._lock:
            if (shard, group) in self._recent:
                self._recent.move_to_end((shard, group))
                return self._recent[shard, group]
        try:
            with parquet.ParquetFile(self._paths[shard]) as file:
                columns = [name for name in (self._column, self._caption, self._label) if name]
                table = file.read_row_group(group, columns, use_threads=False)
        except (OSError, ValueError) as error:
            raise Unusable(f"damaged row group {group}: {error}") from error
        with self._lock:
            self._recent[shard, group] = table
            while len(self._recent) > self.kept_row_groups:
                self._recent.popitem(last=False)
        return table


# ArrayRecord -------------------------------------------------------------------------------------------------------

_MAGIC = b"TKR\x01"
# Without read-ahead: the reads are shuffled.
_RANDOM_ACCESS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}


def write_array_record(path: str, records: Iterable[Record]) -> int:
    """Write records with encoded bytes as an ArrayRecord file that `ArrayRecordSource` reads; returns their number.

    Each entry is the magic ``TKR\\x01``, the header's length as a little-endian uint32, a JSON header (kind, name,
    caption, label) and the encoded bytes. Entries of bare encoded bytes are read as well.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    writer, count = ArrayRecordWriter(path, "group_size:1"), 0
    for record in records:
        if not isinstance(record.data, bytes):
            raise ValueError(f"{record.name}: ArrayRecord holds encoded bytes, got {type(record.data).__name__}")
        fields = {key: getattr(record, key) for key in ("kind", "name", "caption", "label")}
        header = json.dumps(fields).encode()
        writer.write(_MAGIC + struct.pack("<I", len(header)) + header + record.data)
        count += 1
    writer.close()
    return count


class ArrayRecordSource(_Shards):
    """ArrayRecord files of `write_array_record`, or of bare encoded images or clips."""

    def __init__(self, paths: Sequence[str], *, labels: bool = False):
        from array_record.python.array_record_module import ArrayRecordReader

        self.dropped: list[tuple[str, str]] = []
        good, counts = [], []
        for path in paths:
            try:
                reader = ArrayRecordReader(path)
                counts.append(reader.num_records())
                reader.close()
                good.append(path)
            except (RuntimeError, ValueError, OSError) as error:
                self.dropped.append((path, f"not a readable ArrayRecord file: {error}"))
        if not good:
            raise ValueError(f"no readable ArrayRecord file among {len(paths)}; {paths[0]!r}: {self.dropped[0][1]}")
        super().__init__(good, counts)
        self._open_readers()
        first = self._first()
        self.kind = first.kind if first else "mixed"
        self.has_captions = first is not None and first.caption is not None
        self.has_labels = labels
        if labels and (first is None or first.label is None):
            raise ValueError(f"no labels in {len(good)} ArrayRecord file(s), the first one {good[0]!r}")
        self.description = f"{len(self)} records ({self.kind}) in {len(good)} ArrayRecord file(s)"

    def _first(self) -> Record | None:
        """The first readable record of the first few: a file holds records of one kind."""
        for index in range(min(len(self), 16)):
            with contextlib.suppress(Unusable):
                return self[index]
        return None

    def _open_readers(self) -> None:
        self._lock = threading.Lock()
        self._readers: dict = {}

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_readers")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open_readers()

    def __getitem__(self, index: int) -> Record:
        from array_record.python.array_record_module import ArrayRecordReader

        shard, row = self._locate(index)
        try:
            with self._lock:  # One reader per file and process.
                if shard not in self._readers:
                    path = self._paths[shard]
                    self._readers[shard] = ArrayRecordReader(path, **_RANDOM_ACCESS)
                entry = self._readers[shard].read([row])[0]
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            raise Unusable(f"damaged record: {error}") from error
        return _parse_entry(entry, self.name(index))


def _parse_entry(entry: bytes, name: str) -> Record:
    if not entry.startswith(_MAGIC):
        return Record(kind_of_bytes(entry), entry, name)
    start = len(_MAGIC) + 4
    try:
        end = start + struct.unpack("<I", entry[len(_MAGIC) : start])[0]
        header = json.loads(entry[start:end])
        known = f"{name} ({header['name']})"
        return Record(header["kind"], entry[end:], known, header.get("caption"), header.get("label"))
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise Unusable(f"damaged header: {error!r}") from error
