"""The numbers and names of classes, from where each format keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from .records import Unusable

LABEL_FIELDS = ("label", "cls")


def class_folders(root: str, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Classes and the number of each file's class: the folders in ``root``, sorted, as torchvision's ImageFolder."""
    if not os.path.isdir(root):
        raise ValueError(f"labels need a folder with one folder per class, got {root!r}")
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    numbers = {name: number for number, name in enumerate(classes)}
    folders = [os.path.relpath(name, root).split(os.sep) for name in names]
    outside = [name for name, parts in zip(names, folders, strict=True) if len(parts) == 1]
    if outside:
        raise ValueError(
            f"labels need one folder per class in {root!r}, but {len(outside)} files, {outside[0]!r} one "
            "of them, are in none"
        )
    return tuple(classes), tuple(numbers[parts[0]] for parts in folders)


def label_of_member(extension: str, text: bytes) -> int | None:
    """From a ``.cls`` or ``.json`` member of a tar shard; ``None`` if the JSON has no label."""
    try:
        if extension == "cls":
            return int(text)
        fields = json.loads(text)
        return next((int(fields[name]) for name in LABEL_FIELDS if name in fields), None)
    except (ValueError, TypeError) as error:
        raise Unusable(f"damaged label: {error}") from error


def label_column(schema, path: str) -> str:
    """The column of labels in a Parquet file."""
    import pyarrow

    for name in LABEL_FIELDS:
        if name in schema.names and pyarrow.types.is_integer(schema.field(name).type):
            return name
    have = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise ValueError(f"no column of integer labels in {path!r}: it has {have}; accepted: {', '.join(LABEL_FIELDS)}.")


def class_names(schema, column: str) -> tuple[str, ...]:
    """Names that the `datasets` library keeps in the schema of a Parquet file, or none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[column]["names"])
    except (ValueError, KeyError, TypeError):  # Not written by that library, or no names kept.
        return ()
