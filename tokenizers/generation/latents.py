"""A data set as latents of a tokenizer: what a generator learns from, and the way back from its samples to pixels."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax.errors import FlaxError

from .. import errors, pixels
from ..data import latents as stored
from ..data.pipeline import Pipeline
from ..parallel import mesh as meshes
from ..parallel import multihost, platform
from ..types import Array

POSTERIORS = ("sample", "mean")


class Coder:
    """A tokenizer whose latents of a picture are a map ``(h, w, C)``, whatever they are by themselves.

    A clip of one frame is a picture. Tokens without a grid, ``(N, D)``, become a map of one row ``(1, N, D)``. Codes of
    a codebook are latents like any others; on the way back every vector becomes the nearest code first, where the
    bottleneck's codes are what the decoder reads. A posterior is sampled, as VA-VAE's and LightningDiT's code does, or
    its mean is taken.

    Args:
      tokenizer: `api.Tokenizer`.
      size: height and width of the pictures.
      posterior: ``sample`` or ``mean``.
      seed: of the samples.

    Attributes:
      shape: ``(h, w, C)``.
      snaps: whether vectors become codes before they are decoded.

    Raises:
      ValueError: for sizes that do not fit the tokenizer, and decoders that read captions.
    """

    def __init__(self, tokenizer: Any, size: tuple[int, int], posterior: str = "sample", seed: int = 0):
        if posterior not in POSTERIORS:
            raise errors.unknown("posterior", posterior, POSTERIORS)
        module = tokenizer.module
        if getattr(module, "text", None) is not None:
            raise ValueError(
                f"the decoder of {tokenizer.name} reads captions, which a generator of latents has none of."
            )
        picture = (1, *size, tokenizer.spec.channels)
        fitted = pixels.fitted(tokenizer.spec, getattr(module, "input_size", None), picture, strict=False)
        if fitted != picture:
            raise ValueError(
                f"pictures of {size} pixels do not fit {tokenizer.name}; the nearest size is {fitted[1:3]}."
            )
        self.tokenizer, self.size, self.posterior, self.seed = tokenizer, tuple(size), posterior, seed
        found = _shapes_of(type(tokenizer).encode, tokenizer, jax.ShapeDtypeStruct(picture, jnp.uint8))
        self._own = tuple(found.latents.shape[1:])
        self.shape = self._own if len(self._own) == 3 else (1, *self._own)
        self.snaps = found.indices is not None and self._codes_are_latents()

    def encode(self, pictures: Array, numbers: Array) -> Array:
        """uint8 ``(B, H, W, 3)`` -> float32 ``(B, h, w, C)``; ``numbers`` ``(B,)`` of the items seed their samples."""
        encoding = self.tokenizer.encode(pictures)
        latents = encoding.latents
        if encoding.logvar is not None and self.posterior == "sample":
            latents = _drawn(encoding.mean, encoding.logvar, jax.random.key(self.seed), numbers)
        return latents.reshape(-1, *self.shape).astype(jnp.float32)

    def decode(self, latents: Array) -> Array:
        """``(B, h, w, C)`` -> uint8 ``(B, H, W, 3)``."""
        own = latents.reshape(-1, *self._own)
        if self.snaps:
            own = _nearest(self.tokenizer, own)
        decoded = self.tokenizer.decode(own)
        return pixels.to_uint8(decoded[:, : self.size[0], : self.size[1]])

    def facts(self) -> dict[str, Any]:
        """What decides the latents of a picture, as JSON values."""
        spec = self.tokenizer.spec
        return {
            "name": self.tokenizer.name,
            "weights": self.tokenizer.digest(),
            "compression": list(spec.compression),
            "codebook_size": spec.codebook_size,
            "latent_channels": spec.latent_channels,
            "posterior": self.posterior,
            "seed": self.seed,
            "decoded": "nearest codes" if self.snaps else "as they are",
        }

    def on(self, mesh: jax.sharding.Mesh) -> Coder:
        """The same over a mesh."""
        return Coder(self.tokenizer.shard(mesh), self.size, self.posterior, self.seed)

    def _codes_are_latents(self) -> bool:
        """Not where a projection stands between the bottleneck and the decoder, or several bottlenecks do."""
        bottleneck = getattr(self.tokenizer.module, "bottleneck", None)
        if not hasattr(bottleneck, "codes_to_indices") or getattr(self.tokenizer.module, "projected", False):
            return False
        example = jax.ShapeDtypeStruct((1, *self._own), jnp.float32)
        with contextlib.suppress(ValueError, FlaxError):  # the bottleneck is one of several, or takes another shape
            return _shapes_of(_nearest, self.tokenizer, example).shape == example.shape
        return False


def _shapes_of(function: Callable, tokenizer: Any, example: jax.ShapeDtypeStruct) -> Any:
    """What a function of a tokenizer and an array returns, without computing it; the variables may be shapes, too."""
    return jax.eval_shape(
        lambda variables, array: function(dataclasses.replace(tokenizer, variables=variables), array),
        tokenizer.variables,
        example,
    )


def _nearest(tokenizer: Any, latents: Array) -> Array:
    return tokenizer.indices_to_latents(_codes(tokenizer.module, tokenizer.variables, latents))


@platform.jit
def _drawn(mean: Array, logvar: Array, key: Any, numbers: Array) -> Array:
    # Item by item: a sample does not depend on the batch that its picture is in.
    noise = jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), mean.shape[1:]))(numbers)
    return mean + jnp.exp(0.5 * logvar) * noise


@functools.partial(platform.jit, static_argnums=0)
def _codes(module, variables, latents: Array) -> Array:
    return module.apply(variables, latents, method=lambda module, x: module.bottleneck.codes_to_indices(x))


def extract(
    coder: Coder,
    data: Pipeline,
    folder: str | os.PathLike,
    *,
    flip: bool = True,
    dtype: str = "float32",
    shard_items: int = 4096,
    statistics_items: int = 10_000,
) -> stored.LatentFolder:
    """Writes the shards that are not there yet, then the statistics.

    Every process makes a block of the shards of its own, on its own devices.

    Args:
      coder: of the tokenizer.
      data: all items once, in order (``split="once"`` or ``"held_out"``), for all processes the same; one stream of
        pictures of one size.
      folder: an earlier start of the same work is continued, anything else in it is refused.
      flip: mirrored copies, too.
      dtype: ``float32`` or ``bfloat16``, of the stored latents.
      shard_items: items per shard, rounded up to whole batches.
      statistics_items: how many items the statistics are of.
    """
    folder = pathlib.Path(folder).expanduser()
    (_, shape), *others = data.shapes
    if others or shape[1] != 1 or tuple(shape[2:4]) != coder.size:
        raise ValueError(
            f"latents are made of one stream of pictures of {coder.size} pixels; the data has {data.shapes}."
        )
    per_shard = -(-shard_items // shape[0])
    about = {
        "tokenizer": coder.facts(),
        "data": {"fingerprint": data.fingerprint, "split": data.split, "shape": list(shape[2:])},
        "latents": {"shape": list(coder.shape), "copies": 1 + flip, "dtype": dtype},
        "class_names": list(data.classes),
        "shard_items": per_shard * shape[0],
        "statistics_items": statistics_items,
        "shards": -(-data.num_batches // per_shard),
    }
    errors.pick("dtype of latents", dtype, stored.DTYPES)
    multihost.on_main(lambda: _claim(folder, about))
    if not _read(folder).get("complete"):
        if jax.local_device_count() > 1:
            coder = coder.on(meshes.make_mesh(devices=jax.local_devices()))
        for first, last in _missing(folder, about["shards"]):
            _write_shards(coder, data, folder, (first, last), per_shard, flip, dtype)
        multihost.wait("latents written")
        multihost.on_main(lambda: _finish(folder, about))
    multihost.wait("statistics written")
    return stored.LatentFolder(folder)


def _read(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / stored.ABOUT).read_text())


def _claim(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Makes the folder the place of this work."""
    if (folder / stored.ABOUT).is_file():
        before = _read(folder)
        changed = [key for key in about if before.get(key) != about[key]]
        if changed:
            lines = "; ".join(f"{key}: {before.get(key)} -> {about[key]}" for key in changed)
            raise ValueError(f"{folder} holds latents made in another way ({lines}); choose a new folder.")
        return
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty and holds no {stored.ABOUT}; choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, about)


def _write(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    partial = folder / f"{stored.ABOUT}.partial"
    partial.write_text(json.dumps(about, indent=2) + "\n")
    os.replace(partial, folder / stored.ABOUT)


def _missing(folder: pathlib.Path, count: int) -> list[tuple[int, int]]:
    """This process's shards that are not there: runs ``[first, last)`` of numbers in a row."""
    own = range(
        jax.process_index() * count // jax.process_count(), (jax.process_index() + 1) * count // jax.process_count()
    )
    runs: list[tuple[int, int]] = []
    for number in own:
        if stored.shard(folder, number).exists():
            continue
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _write_shards(coder: Coder, data: Pipeline, folder, numbers: tuple[int, int], per_shard: int, flip, dtype) -> None:
    first, last = numbers
    start, stop = first * per_shard, min(last * per_shard, data.num_batches)
    with data.batches(start=start) as batches:
        shown = tqdm.tqdm(range(start, stop), initial=start, total=data.num_batches, unit="batch", disable=None)
        held: list[tuple[np.ndarray, np.ndarray]] = []
        for number, batch in zip(shown, batches, strict=False):
            held.append(_encoded(coder, batch, number, flip))
            if len(held) == per_shard or number + 1 == stop:
                labels, latents = (np.concatenate(parts) for parts in zip(*held, strict=True))
                stored.write_shard(stored.shard(folder, number // per_shard), labels, latents, dtype)
                held = []


def _encoded(coder: Coder, batch: Mapping[str, Any], number: int, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """(labels ``(n,)``, latents ``(n, copies, h, w, C)``) of the items of a batch that could be read."""
    pictures, valid = batch["pixels"][:, 0], np.asarray(batch["valid"], bool)
    numbers = np.arange(len(pictures), dtype=np.uint32) + np.uint32(number * len(pictures))
    made = [coder.encode(pictures, 2 * numbers)]
    if flip:
        made.append(coder.encode(np.ascontiguousarray(pictures[:, :, ::-1]), 2 * numbers + 1))
    latents = np.stack([np.asarray(part)[valid] for part in made], axis=1)
    labels = np.asarray(batch.get("label", np.full(len(pictures), stored.NO_LABEL)))[valid]
    return labels, latents


def _finish(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    made = about["latents"]
    paths = [stored.shard(folder, number) for number in range(about["shards"])]
    shards = stored.Shards(paths, made["shape"], made["copies"], made["dtype"])
    stored.Statistics.of(shards, about["statistics_items"]).save(folder)
    classes = len(about["class_names"]) or int(shards.labels.max(initial=stored.NO_LABEL)) + 1
    _write(folder, {**about, "items": len(shards), "classes": classes, "complete": True})
