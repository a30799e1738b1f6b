"""Reading, saving and comparing configs."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

# May change when a run is resumed: they alter how the run is watched or where it computes, not what it computes.
RESUMABLE = (
    "steps",
    "log",
    "checkpoint",
    "evaluation",
    "mesh",
    "distributed",
    "compilation_cache",
    "data.workers",
    "data.prefetch",
)


def to_dict(config: ml_collections.ConfigDict | Mapping) -> dict[str, Any]:
    """Plain nested dictionaries and JSON values (tuples become lists)."""
    plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    return json.loads(json.dumps(plain))


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """``{"optimizer.lr": 1e-4, ...}``."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def differences(old: Mapping, new: Mapping) -> list[str]:
    """Lines ``field: old -> new`` of the fields whose change makes it another run."""
    a, b = flatten(old), flatten(new)
    lines = []
    for name in sorted(set(a) | set(b)):
        free = any(name == field or name.startswith(field + ".") for field in RESUMABLE)
        if not free and a.get(name) != b.get(name):
            lines.append(f"{name}: {a.get(name)!r} -> {b.get(name)!r}")
    return lines


def claim_folder(folder: pathlib.Path, config: Mapping) -> bool:
    """Makes ``folder`` the folder of this run and saves the config there; whether a run is already in it.

    Raises:
      ValueError: when another run, or something else, is in the folder.
    """
    path = folder / "config.json"
    plain = to_dict(config)
    existing = path.is_file()
    if existing:
        changed = differences(json.loads(path.read_text()), plain)
        if changed:
            raise ValueError(
                f"{folder} holds a run with another config; resume it with the same one, or choose another --workdir.\n  "
                + "\n  ".join(changed)
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not a run of train.py; choose another --workdir.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(plain, indent=2, sort_keys=True) + "\n")
    return existing


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces a file in one step, so that a kill leaves the old or the new one."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text)
    os.replace(temporary, path)
