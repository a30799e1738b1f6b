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
    "profile",
    "stop_after_skipped",
    "mesh",
    "distributed",
    "compilation_cache",
    "data.workers",
    "data.read_threads",
    "data.prefetch",
)

_SMALLEST = {
    "steps": 1,
    "accumulate": 1,
    "stop_after_skipped": 1,
    "log.every": 1,
    "checkpoint.every": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 0,
    "evaluation.every": 0,
    "evaluation.max_items": 1,
    "profile.start": 0,
    "profile.steps": 0,
    "discriminator.start": 0,
    "discriminator.ramp": 0,
    "discriminator.r1_every": 1,
}


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


def check_numbers(config: Mapping) -> None:
    """Refuses counts that make no sense, by the name of their field.

    Raises:
      ValueError: with the field, its value and the smallest accepted one.
    """
    flat = flatten(config)
    for name, smallest in _SMALLEST.items():
        if name in flat and flat[name] < smallest:
            raise ValueError(f"config.{name}={flat[name]} must be at least {smallest}.")
    for name in ("ema_decay", "discriminator.ema_decay"):
        if name in flat and not 0 <= flat[name] < 1:
            raise ValueError(f"config.{name}={flat[name]} must be at least 0 and below 1.")


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
        changed = differences(read_config(folder), plain)
        if changed:
            raise ValueError(
                f"{folder} holds a run with another config; resume it with the same one, or choose another --workdir. "
                "Changed (saved -> given):\n  " + "\n  ".join(changed)
            )
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --workdir takes a folder.")
    elif folder.exists() and any(entry.name != _partial(path).name for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not a run of train.py; choose another --workdir.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(plain, indent=2, sort_keys=True) + "\n")
    return existing


def read_config(run: str | pathlib.Path) -> dict[str, Any]:
    """The resolved config that was saved with a run.

    Raises:
      ValueError: when there is none, or it is not readable.
    """
    path = pathlib.Path(run) / "config.json"
    if not path.is_file():
        raise ValueError(f"{run} has no config.json: it is not a run of train.py.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not readable JSON ({error}); restore it from a backup or start another run."
        ) from error


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces a file in one step, so that a kill leaves the old or the new one."""
    temporary = _partial(path)
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".partial")
