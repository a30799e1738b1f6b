"""Indexed, picklable data sources: ``len(source)``, ``source[i] -> Record``, ``source.name(i)``.

Kinds, for `open_source(kind, path)`:

* ``embedded``: the photographs in scikit-image, no download (`embedded.py`).
* ``shapes``: drawn pictures with captions and classes, no download (`shapes.py`).
* ``images``, ``videos``: a folder (searched recursively), one file, or a glob pattern.
* ``captions``: images or videos with text: ``a.jpg`` beside ``a.txt``, or a ``metadata.jsonl`` with ``file_name`` and
  ``text`` (or ``caption``) in the folder.
* ``array_record``, ``parquet``, ``tar``: shards (`shards.py`).
* ``auto``: looks at the content and takes the one kind it finds.

Folders are read in sorted order; hidden files and folders are ignored; symbolic links are followed.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from .. import errors
from . import embedded, shapes, shards
from .labels import class_folders
from .records import Record, kind_of_name

CAPTION_EXTENSIONS = (".txt", ".caption")
METADATA = "metadata.jsonl"
KINDS = ("auto", "embedded", "shapes", "images", "videos", "captions", "array_record", "parquet", "tar")
WITHOUT_PATH = ("embedded", "shapes")


def open_source(kind: str, path: str = "", *, held_out: bool = False, drawings: int = 10_000, labels: bool = False):
    """The source of one data set.

    Args:
      kind, path: as above.
      held_out: the embedded photographs that are kept for evaluation, or drawings that are not training ones.
      drawings: how many ``shapes`` has.
      labels: records have the number of their class: that of their folder, or what their shard says.

    Raises:
      ValueError: unknown kind, missing path, nothing usable in it, or (``auto``) content that fits several kinds.
    """
    if kind not in KINDS:
        raise errors.unknown("data source", kind, KINDS)
    if kind not in WITHOUT_PATH and not path:
        raise ValueError(f"data source {kind!r} needs a path; only {' and '.join(WITHOUT_PATH)} have none")
    if kind in WITHOUT_PATH and path:
        raise ValueError(f"the data set {kind!r} has no path, got {path!r}; name another source for it")
    if kind == "shapes":
        return shapes.ShapesSource(drawings, held_out=held_out)
    if kind == "embedded":
        return embedded.EmbeddedSource(held_out=held_out)
    path = os.path.expanduser(os.fspath(path))
    files = list_files(path)
    if kind == "auto":
        kind = _detect(path, files)
    if kind in _SHARDS:
        extensions, source = _SHARDS[kind]
        chosen = [name for name, _ in files if name.lower().endswith(extensions) or path == name]
        if not chosen:
            raise ValueError(f"no {kind} shards in {path!r}: looked for names ending in {', '.join(extensions)}.")
        return source(chosen, labels=labels)
    media = [(name, size) for name, size in files if kind_of_name(name)]
    if kind == "captions":
        return _captioned(path, files, media, labels)
    wanted = {"images": "image", "videos": "video"}[kind]
    media = [(name, size) for name, size in media if kind_of_name(name) == wanted]
    if not media:
        raise ValueError(f"no {kind} in {path!r} ({_describe(files)}).")
    return FileSource(path, media, labels=labels)


_SHARDS = {
    "tar": ((".tar",), shards.TarSource),
    "parquet": ((".parquet",), shards.ParquetSource),
    "array_record": ((".array_record", ".arrayrecord"), shards.ArrayRecordSource),
}


def list_files(path: str) -> list[tuple[str, int]]:
    """Sorted (path, bytes) of every visible file under a folder, of one file, or of what a glob pattern matches."""
    if os.path.isfile(path):
        return [(path, os.path.getsize(path))]
    if os.path.isdir(path):
        return sorted(_walk(path, set()))
    matches = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not matches:
        raise ValueError(f"data path {path!r} does not exist and, as a pattern, matches no file.")
    return [(name, os.path.getsize(name)) for name in matches]


def _walk(folder: str, visited: set[str]) -> Iterator[tuple[str, int]]:
    real = os.path.realpath(folder)
    if real in visited:  # A link to a folder above it.
        return
    visited.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, visited)
            elif entry.is_file():
                yield entry.path, entry.stat().st_size


def _shard_kind(name: str) -> str | None:
    return next((kind for kind, (extensions, _) in _SHARDS.items() if name.lower().endswith(extensions)), None)


def _describe(files: Sequence[tuple[str, int]]) -> str:
    found = Counter(_shard_kind(name) or kind_of_name(name) or "other" for name, _ in files)
    return "found " + (", ".join(f"{count} {kind}" for kind, count in sorted(found.items())) or "no files")


def _detect(path: str, files: Sequence[tuple[str, int]]) -> str:
    """The one kind of data in a folder; mixtures and emptiness are errors that list what was found."""
    found = {_shard_kind(name) for name, _ in files} - {None}
    media = {kind_of_name(name) for name, _ in files} - {None}
    if media and not found:
        stems = {os.path.splitext(name)[0] for name, _ in files if name.lower().endswith(CAPTION_EXTENSIONS)}
        paired = any(os.path.splitext(name)[0] in stems for name, _ in files if kind_of_name(name))
        if paired or any(os.path.basename(name) == METADATA for name, _ in files):
            return "captions"
    found |= {kind + "s" for kind in media}
    if len(found) != 1:
        accepted = ", ".join(KINDS[1:])
        raise ValueError(f"cannot tell what {path!r} holds ({_describe(files)}); name its kind: {accepted}.")
    return found.pop()


class FileSource:
    """Image and video files, one record each, optionally with captions.

    Attributes:
      kind: "image", "video" or "mixed".
      dropped: (name, reason) of files left out while indexing.
      has_captions: whether records carry text.
      has_labels: whether records carry the number of their class.
      classes: names of the classes in the order of their numbers.
      views: fixed evaluation views per item.
      any_size: whether items are drawn at the size that is asked for.
    """

    views = 1
    any_size = False

    def __init__(
        self,
        root: str,
        files: Sequence[tuple[str, int]],
        captions: Sequence[tuple[str, str]] = (),
        dropped: Sequence[tuple[str, str]] = (),
        *,
        labels: bool = False,
    ):
        """``captions`` holds, per file, ("text", its caption) or ("file", the path of the text)."""
        self._root = root if os.path.isdir(root) else os.path.dirname(root)
        self._files = list(files)
        self._captions = list(captions)
        self.dropped = list(dropped)
        kinds = {kind_of_name(name) for name, _ in files}
        self.kind = kinds.pop() if len(kinds) == 1 else "mixed"
        self.has_captions = bool(captions)
        self.has_labels = labels
        self.classes, self._labels = class_folders(root, [name for name, _ in files]) if labels else ((), ())
        self.description = f"{len(self._files)} files ({self.kind}) in {root}"

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index][0]

    def __getitem__(self, index: int) -> Record:
        name = self._files[index][0]
        caption = None
        if self._captions:
            how, caption = self._captions[index]
            if how == "file":
                with open(caption, encoding="utf-8", errors="replace") as file:
                    caption = file.read().strip()
        return Record(kind_of_name(name), name, name, caption, self._labels[index] if self._labels else None)

    def manifest(self) -> Iterator[tuple[str, int]]:
        """(name relative to the folder, bytes) of every file: moving the folder is no change, its content is."""
        for name, size in self._files:
            yield os.path.relpath(name, self._root), size


def _captioned(
    path: str, files: Sequence[tuple[str, int]], media: Sequence[tuple[str, int]], labels: bool
) -> FileSource:
    texts: dict[str, tuple[str, str]] = {}
    stems = {os.path.splitext(name)[0]: name for name, _ in files if name.lower().endswith(CAPTION_EXTENSIONS)}
    for name, _ in media:
        stem = os.path.splitext(name)[0]
        if stem in stems:
            texts[name] = ("file", stems[stem])
    for name, _ in files:
        if os.path.basename(name) == METADATA:
            texts.update(_read_metadata(name))
    kept = [item for item in media if item[0] in texts]
    dropped = [(name, "no caption") for name, _ in media if name not in texts]
    if not kept:
        raise ValueError(
            f"no captioned files in {path!r} ({_describe(files)}): a caption is a text file of the same name "
            f"({', '.join(CAPTION_EXTENSIONS)}) or a line of {METADATA} with file_name and text."
        )
    return FileSource(path, kept, [texts[name] for name, _ in kept], dropped, labels=labels)


def _read_metadata(path: str) -> dict[str, tuple[str, str]]:
    captions = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row["text"] if "text" in row else row["caption"]
                captions[os.path.join(os.path.dirname(path), os.path.normpath(row["file_name"]))] = ("text", str(text))
            except (ValueError, KeyError, TypeError) as error:
                message = f"{path}, line {number}: needs a JSON object with file_name and text (or caption): {error!r}"
                raise ValueError(message) from error
    return captions
