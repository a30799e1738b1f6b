"""A whole data set as tokens: fixed-size items in, numbered .npz shards out; the same command goes on where it stopped.

Each shard holds ``indices`` (N, ...) int32 of a discrete tokenizer, or ``latents`` (and ``logvar``, if there is one)
float32 of a continuous one, ``names`` (N,), ``captions`` (N,) where the data has any, and the number of files that were
``unusable``. ``dataset.json`` says how they were made.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from .. import pixels
from ..api import Tokenizer
from ..data.pipeline import Pipeline
from ..parallel import mesh as meshes
from ..types import Encoding
from . import files

_ABOUT = "dataset.json"


def pipeline(
    path: str, kind: str, size: tuple[int, int], frames: int, fps: float, stride: int, batch_size: int, workers: int
) -> Pipeline:
    """All items of a data set once, in order: centre crops of one size, the first clip of every video."""
    stream = {"frames": frames, "resolutions": (size,), "batch_size": batch_size, "fps": fps, "stride": stride}
    config = {"source": kind, "path": path, "held_out": path, "crop": "center", "flip": False, "workers": workers}
    return Pipeline(config | {"streams": {"items": stream}}, split="held_out")


def tokenize(tokenizer: Tokenizer, data: Pipeline, target: str | pathlib.Path, shard_items: int) -> dict[str, Any]:
    """Writes the shards that are not there yet.

    Args:
      tokenizer: spread over all local devices if there are several.
      data: see `pipeline`.
      target: folder; an earlier start of the same work is continued, anything else in it is refused.
      shard_items: items per shard, rounded up to whole batches.

    Returns:
      The content of ``dataset.json``.
    """
    folder = pathlib.Path(target).expanduser()
    (_, shape), *_ = data.shapes
    pixels.fitted(tokenizer.spec, getattr(tokenizer.module, "input_size", None), shape, strict=True)
    per_shard = -(-shard_items // shape[0])
    about = _about(tokenizer, data, per_shard * shape[0])
    if _claim(folder, about):
        return json.loads((folder / _ABOUT).read_text())
    if jax.device_count() > 1:
        tokenizer = tokenizer.shard(meshes.make_mesh())
    done = _finished_shards(folder, about["shards"])
    with data.batches(start=done * per_shard) as batches:
        shown = tqdm.tqdm(batches, total=data.num_batches, initial=done * per_shard, unit="batch", disable=None)
        before = data.skipped.count
        for number, arrays in enumerate(_shards(tokenizer, shown, per_shard), done):
            files.save(_shard(folder, number), arrays | {"unusable": np.asarray(data.skipped.count - before)})
            before = data.skipped.count
    counts = np.sum([_counts(_shard(folder, number)) for number in range(about["shards"])], axis=0)
    about |= {"items": int(counts[0]), "unusable": int(counts[1]), "complete": True}
    _write(folder, about)
    return about


def _about(tokenizer: Tokenizer, data: Pipeline, shard_items: int) -> dict[str, Any]:
    (_, shape), *_ = data.shapes
    return {
        "tokenizer": files.facts(tokenizer) | {"weights": tokenizer.digest()},
        "data": {"fingerprint": data.fingerprint, "shape": list(shape[1:])},
        "shard_items": shard_items,
        "shards": -(-data.num_batches // (shard_items // shape[0])),
    }


def _claim(folder: pathlib.Path, about: Mapping[str, Any]) -> bool:
    """Makes the folder the place of this work; whether the work is complete already."""
    path = folder / _ABOUT
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [key for key in about if before.get(key) != about[key]]
        if changed:
            lines = "; ".join(f"{key}: {before.get(key)} -> {about[key]}" for key in changed)
            raise ValueError(f"{folder} holds tokens made in another way ({lines}); choose a new folder.")
        return bool(before.get("complete"))
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty and holds no {_ABOUT}; choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, about)
    return False


def _write(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    partial = folder / f"{_ABOUT}.partial"
    partial.write_text(json.dumps(about, indent=2) + "\n")
    os.replace(partial, folder / _ABOUT)


def _shard(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"tokens-{number:05d}.npz"


def _finished_shards(folder: pathlib.Path, count: int) -> int:
    return next((number for number in range(count) if not _shard(folder, number).exists()), count)


def _counts(path: pathlib.Path) -> tuple[int, int]:
    """(items, unusable files) of a shard."""
    with np.load(path, allow_pickle=False) as shard:
        return len(shard["names"]), int(shard["unusable"])


def _shards(tokenizer: Tokenizer, batches, per_shard: int) -> Iterator[dict[str, np.ndarray]]:
    """Arrays of one shard after the other; unusable items and rows that fill the last batch are left out."""
    held: list[dict[str, np.ndarray]] = []
    for batch in batches:
        held.append(_tokens(tokenizer, batch))
        if len(held) == per_shard:
            yield _stacked(held)
            held = []
    if held:
        yield _stacked(held)


def _stacked(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _tokens(tokenizer: Tokenizer, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    clips, valid = batch["pixels"], np.asarray(batch["valid"], bool)
    # A single frame goes in as a picture: the tokens have no time axis then.
    encoding: Encoding = tokenizer.encode(clips[:, 0] if clips.shape[1] == 1 else clips)
    if encoding.indices is not None:
        kept = {"indices": encoding.indices}
    else:
        kept = {"latents": encoding.latents} | ({} if encoding.logvar is None else {"logvar": encoding.logvar})
    arrays = {key: np.asarray(value)[valid] for key, value in kept.items()}
    for key, name in (("names", "name"), ("captions", "caption")):
        if name in batch:
            arrays[key] = np.asarray(batch[name], dtype=np.str_)[valid]
    return arrays
