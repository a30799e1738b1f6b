"""Evaluates a tokenizer on batches: one loop for images and clips, one device or many, one process or many."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..errors import pick, unknown
from ..parallel import mesh as meshes
from ..parallel import multihost
from ..pixels import cropped
from . import baselines, codebook, features, latents, pixel_metrics, reading, report
from .captioned import Captions
from .collect import Stream, comparison, summarize
from .pictures import Sample
from .protocols import PROTOCOLS, Protocol
from .understanding import Setup

METRICS = (
    "psnr",
    "ssim",
    "ms_ssim",
    "lpips",
    "rfid",
    "inception_score",
    "fvd",
    "codebook",
    "bits",
    "latents",
    *latents.METRICS,
    "throughput",
)
ACCEPTED = (*METRICS, *reading.METRICS)
CODECS = ("jpeg", "webp", "h264")
_BASELINE_COLUMNS = ("psnr", "ssim", "bits_per_pixel", "over_budget")
_NAME_BYTES = 120  # of a path, whose end says most
_SSIM_SIDE = 11  # pixels that the wider of the two windows needs


def evaluate(
    tokenizer: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    out_dir: str | pathlib.Path | None = None,
    protocol: str | Protocol = "tokenbench",
    metrics: Iterable[str] = METRICS,
    mesh: Mesh | None = None,
    weights: Mapping[str, str] | None = None,
    baseline_items: int | None = 64,
    preview_items: int = 8,
    understanding: Setup | None = None,
    captions: Captions | None = None,
    training_log: str | pathlib.Path | None = None,
    title: str = "Tokenizer evaluation",
) -> dict[str, Any]:
    """Encodes, decodes and scores every valid item once.

    Args:
      tokenizer: ``api.Tokenizer`` or anything with its ``spec``, ``encode``, ``decode`` and ``shard``; it compiles its
        own methods, once per shape.
      batches: ``{"pixels": uint8 (B, T, H, W, 3) or (B, H, W, 3), "valid": bool (B,), "stream": name}``; a picture is
        one frame. ``valid`` may be absent, and is False for rows that only fill a batch; ``name`` (one text per row)
        goes into ``items.csv``; ``label`` (integers, -1 for none) and ``caption`` are for understanding. With several
        processes each brings its contiguous part of every global batch, all of one size, and all bring the same number
        of batches.
      out_dir: folder for ``metrics.json``, ``items.csv``, ``preview.png``, ``reconstruction.mp4`` and ``report.html``;
        ``None`` writes nothing.
      protocol: name in `PROTOCOLS`, or a `Protocol`.
      metrics: of `METRICS`, and of `reading.METRICS` for understanding.
      mesh: devices to spread batches (and, through ``tokenizer.shard``, parameters) over.
      weights: files of the frozen networks, keys ``lpips``, ``inception``, ``i3d``; others are looked for in
        ``$TOKENIZERS_WEIGHTS``.
      baseline_items: how many of the first items of every stream the baselines code; ``None`` for all, 0 for none.
      preview_items: items per stream that are shown.
      understanding: names of the classes, data to learn from, and how.
      captions: what a decoder that reads captions is given.
      training_log: a run's ``metrics.jsonl``, for its loss curve.
      title: heading of the report.

    Returns:
      ``{"protocol", "tokenizer", "streams": {name: {metric: value}}, "overall", "baselines": {name: [row]}, "notes"}``.
      A metric that lacks something is the text ``not computed: needs ...``.
    """
    if isinstance(protocol, str):
        protocol = pick("protocol", protocol, dict(PROTOCOLS))
    metrics = tuple(metrics)
    for name in metrics:
        if name not in ACCEPTED:
            raise unknown("metric", name, ACCEPTED)
    if mesh is None and jax.process_count() > 1:
        raise ValueError(f"an evaluation over {jax.process_count()} processes needs a mesh.")
    setup = understanding or Setup()
    loop = _Loop(tokenizer, protocol, metrics, mesh, weights or {}, baseline_items, preview_items, setup, captions)
    for batch in batches:
        loop.add(batch)
    results = loop.results()
    if out_dir is not None and multihost.is_main():
        samples = {name: loop.samples(name) for name in loop.streams}
        report.write(pathlib.Path(out_dir), results, loop.streams, samples, training_log, title)
    return results


class _Loop:
    """The state of one evaluation: streams, compiled functions, pictures kept for the report."""

    def __init__(self, tokenizer, protocol, metrics, mesh, weights, baseline_items, preview_items, setup, captions):
        self._tokenizer = tokenizer if mesh is None else tokenizer.shard(mesh)
        self._protocol, self._metrics, self._mesh = protocol, metrics, mesh
        self._networks = features.Networks(protocol, metrics, weights, mesh)
        self._reader, self._setup = reading.Reader(self._tokenizer, metrics, setup), setup
        self._captions, self._baseline_items, self._preview_items = captions, baseline_items, preview_items
        self._warm: set[tuple] = set()
        self._seen: dict[str, int] = {}
        self._kept: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
        self._grids: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._rows: dict[tuple[str, int], dict[str, float]] = {}
        self._read: dict[str, reading.Read] = {}
        self.streams: dict[str, Stream] = {}

    def add(self, batch: Mapping[str, Any]) -> None:
        pixels, valid = _checked(batch)
        name = batch.get("stream", "images" if pixels.shape[1] == 1 else "clips")
        stream = self.streams.setdefault(name, Stream())
        # Position in the data, the same however many processes share it.
        first = self._seen.get(name, 0)
        self._seen[name] = first + len(pixels) * jax.process_count()
        items = np.arange(len(pixels), dtype=np.int32) + first + jax.process_index() * len(pixels)
        names = reading.texts_as_bytes(batch.get("name", [""] * len(pixels)), _NAME_BYTES, end=True)
        given = self._reader.given(batch)
        texts = [] if self._captions is None else [self._captions.ids(batch)]
        pixels, valid, items, names, *rest = self._fill(pixels, valid, items, names, *texts, *given.values())
        texts, rest = [self._captions(self._place(ids)) for ids in rest[: len(texts)]], rest[len(texts) :]

        shape = pixels.shape[1:4]
        stream.shapes.add(tuple(map(int, shape)))
        reference = self._place(pixels)
        encoding, reconstruction = self._reconstruct(stream, reference, *texts)
        table, moments = self._measure(stream, reference, reconstruction, encoding)
        table |= {"item": self._place(items), "valid": self._place(valid), "name": self._place(names)}
        arrays = {"table": table, "latents": moments, "features": self._features(stream, reference, reconstruction)}
        looked = latents.look(self._tokenizer, self._metrics, reference, encoding, table["valid"])
        arrays["space"], per_item, reasons = looked
        table |= per_item
        stream.reasons |= reasons
        if encoding.indices is not None:
            arrays["indices"] = encoding.indices
        if len(self._kept.setdefault(name, [])) < self._preview_items:
            arrays["pictures"] = (reference, reconstruction)
        given = {key: self._place(array) for key, array in zip(given, rest, strict=True)}
        arrays["read"] = given | self._reader(_as_pictures(reference), encoding.latents, "label" in given)
        tokens = encoding.latents[..., 0] if encoding.indices is None else encoding.indices
        self._grids[shape] = tuple(tokens.shape[1:])

        self._store(name, shape, multihost.gather(arrays))
        self._add_baselines(name, first, pixels, valid, items)

    def _fill(self, pixels, valid, *others):
        # Rows that make the batch divisible by the devices; never counted.
        parts = 1 if self._mesh is None else max(1, meshes.batch_parts(self._mesh) // jax.process_count())
        missing = -len(pixels) % parts
        if not missing:
            return pixels, valid, *others
        rows = np.r_[np.arange(len(pixels)), np.zeros(missing, int)]
        return pixels[rows], np.r_[valid, np.zeros(missing, bool)], *(array[rows] for array in others)

    def _place(self, array: np.ndarray) -> jax.Array:
        return jnp.asarray(array) if self._mesh is None else meshes.global_batch(self._mesh, array)

    def _reconstruct(self, stream: Stream, reference: jax.Array, *text: jax.Array):
        # One frame goes in as a picture: the tokenizer decides what that is to it.
        taken = _as_pictures(reference)
        frames = reference.shape[0] * reference.shape[1]
        if reference.shape not in self._warm and "throughput" in self._metrics:
            self._warm.add(reference.shape)
            jax.block_until_ready(self._tokenizer.decode(self._tokenizer.encode(taken).latents, *text))
        encoding = _timed(stream.seconds["encode"], frames, lambda: self._tokenizer.encode(taken))
        decoded = _timed(stream.seconds["decode"], frames, lambda: self._tokenizer.decode(encoding.latents, *text))
        # What was padded to fit the compression is cut off again.
        decoded = cropped(self._tokenizer.spec, decoded, tuple(taken.shape))
        return encoding, decoded[:, None] if decoded.ndim == 4 else decoded

    def _measure(self, stream: Stream, reference, reconstruction, encoding):
        names = [name for name in ("psnr", "ssim", "ms_ssim") if name in self._metrics]
        side = min(reference.shape[2:4])
        for name, least in (("ssim", _SSIM_SIDE), ("ms_ssim", pixel_metrics.ms_ssim_smallest_side())):
            if name in names and side < least:
                names.remove(name)
                height, width = reference.shape[2:4]
                stream.reasons[name] = f"at least {least} pixels on the shorter side, got {height}x{width}"
        with self._context():
            return _scores(self._protocol, tuple(names), reference, reconstruction, encoding.latents)

    def _features(self, stream: Stream, reference, reconstruction) -> dict[str, jax.Array]:
        with self._context():
            found, reasons = self._networks(reference, reconstruction)
        stream.reasons |= reasons
        return found

    def _learn_from(self, name: str, batches) -> reading.Read | None:
        """What is read of training data of a stream, if something learns from it."""
        if batches is None or not self._reader.learns or "label" not in self._read[name]:
            return None
        found = reading.Read()
        for batch in batches(name):
            pixels, valid = _checked(batch)
            given = self._reader.given(batch)
            pixels, valid, *rest = self._fill(pixels, valid, *given.values())
            reference = self._place(pixels)
            encoding = self._tokenizer.encode(_as_pictures(reference))
            arrays = {key: self._place(array) for key, array in zip(("valid", *given), (valid, *rest), strict=True)}
            read = self._reader(_as_pictures(reference), encoding.latents, "label" in given)
            arrays = multihost.gather(arrays | read)
            counted = arrays.pop("valid").astype(bool)
            found.add({key: array[counted] for key, array in arrays.items()})
        return found

    def _context(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _store(self, name: str, shape: tuple[int, ...], found: Mapping[str, Any]) -> None:
        stream, spec, tokens = self.streams[name], self._tokenizer.spec, int(np.prod(self._grids[shape]))
        table, extracted = found["table"], found["features"]
        valid, items, names = table.pop("valid").astype(bool), table.pop("item"), table.pop("name")
        if "lpips" in extracted:
            table["lpips"] = extracted["lpips"]
        same = {"frames": shape[0], "height": shape[1], "width": shape[2], "tokens": tokens}
        same["bits_per_token"] = codebook.bits_of_token(spec.codebook_size, spec.latent_channels)
        for row in np.flatnonzero(valid):
            item = int(items[row])
            numbers = {key: float(values[row]) for key, values in table.items()}
            self._rows[name, item] = {"item": item, "name": reading.bytes_as_text(names[row])} | same | numbers
            stream.rows.append(self._rows[name, item])
            if "pictures" in found:
                reference, reconstruction = (pictures[row] for pictures in found["pictures"])
                self._kept[name].append((item, reference, _to_uint8(reconstruction)))
        self._read.setdefault(name, reading.Read()).add({key: rows[valid] for key, rows in found["read"].items()})
        if "indices" in found:
            stream.add_codes(found["indices"][valid], spec.codebook_size)
        stream.space.add(found["space"], valid)
        stream.add_latents(tokens, {key: value[valid] for key, value in found["latents"].items()})
        for key, pair in (("inception", stream.inception), ("i3d", stream.i3d)):
            if key in extracted:
                first, second = (values[valid] for values in extracted[key])
                pair.add(first.reshape(-1, first.shape[-1]), second.reshape(-1, second.shape[-1]))
        if "logits" in extracted:
            logits = extracted["logits"][valid]
            stream.logits.append(logits.reshape(-1, logits.shape[-1]))

    def _add_baselines(self, name: str, first: int, pixels, valid: np.ndarray, items: np.ndarray) -> None:
        limit = np.inf if self._baseline_items is None else self._baseline_items
        if first >= limit:  # the same on every process: gathering takes all of them
            return
        chosen = np.flatnonzero(valid & (items < limit))
        labels = ("bicubic", *_codecs(pixels.shape[1]))
        columns = {label: np.zeros((len(pixels), len(_BASELINE_COLUMNS)), np.float32) for label in labels}
        for row in chosen:
            for label, coded in self._code(pixels[row]).items():
                columns[label][row] = self._score_baseline(pixels[row], coded)
        coded_here = np.isin(np.arange(len(pixels)), chosen)
        found = multihost.gather({"item": items, "coded": coded_here, "columns": columns})
        for index in np.flatnonzero(found["coded"]):
            row = self._rows[name, int(found["item"][index])]
            for label in labels:
                values = zip(_BASELINE_COLUMNS, found["columns"][label][index], strict=True)
                row |= {f"{label}_{key}": float(value) for key, value in values}

    def _code(self, pixels: np.ndarray) -> dict[str, baselines.Baseline]:
        spec = self._tokenizer.spec
        bits = codebook.bits_of_token(spec.codebook_size, spec.latent_channels)
        grid = self._grids[pixels.shape[:3]]
        sequence = spec.tokens_per_item is not None
        coded = {"bicubic": baselines.bicubic(pixels, grid, bits, spec.first_frame_alone, sequence)}
        for label in _codecs(len(pixels)):
            coded[label] = baselines.codec(label, pixels, float(np.prod(grid)) * bits)
        return coded

    def _score_baseline(self, reference: np.ndarray, coded: baselines.Baseline) -> tuple[float, ...]:
        names = tuple(name for name in ("psnr", "ssim") if name == "psnr" or min(reference.shape[1:3]) >= _SSIM_SIDE)
        scores = _level_scores(self._protocol, names, reference[None], coded.pixels[None])
        values = [float(scores[name][0]) if name in scores else np.nan for name in ("psnr", "ssim")]
        return (*values, coded.bits / float(np.prod(reference.shape[:3])), float(coded.over_budget))

    def samples(self, name: str) -> list[Sample]:
        """Pictures of a stream's first items, with what the baselines make of them."""
        kept = sorted(self._kept[name], key=lambda entry: entry[0])[: self._preview_items]
        with_baselines = self._baseline_items != 0
        return [
            Sample(name, self._rows[name, item], reference, restored, self._code(reference) if with_baselines else {})
            for item, reference, restored in kept
        ]

    def results(self) -> dict[str, Any]:
        for stream in self.streams.values():
            stream.rows.sort(key=lambda row: row["item"])
        spec = self._tokenizer.spec
        understood = {name: self._understood(name) for name in self.streams}
        streams = {name: summarize(s, self._protocol, self._metrics) for name, s in self.streams.items()}
        everything = functools.reduce(Stream.merge, self.streams.values()) if self.streams else Stream()
        overall = summarize(everything, self._protocol, self._metrics)
        for name, found in understood.items():
            streams[name] |= found
            overall |= found if len(streams) == 1 else {}
        return {
            "protocol": {"name": self._protocol.name, "source": self._protocol.source, "note": self._protocol.note},
            "tokenizer": {
                "name": getattr(self._tokenizer, "name", type(self._tokenizer).__name__),
                "compression": list(spec.compression),
                "codebook_size": spec.codebook_size,
                "latent_channels": spec.latent_channels,
            },
            "streams": streams,
            "overall": overall,
            "baselines": {name: comparison(stream) for name, stream in self.streams.items()},
            "notes": self._notes(),
            "devices": f"{1 if self._mesh is None else self._mesh.size} x {jax.devices()[0].device_kind}",
        }

    def _understood(self, name: str) -> dict[str, Any]:
        if not self._reader.metrics:
            return {}
        train, augmented = (self._learn_from(name, data) for data in (self._setup.training, self._setup.augmented))
        return reading.score(self._reader, self._setup, self._read[name], train, augmented, self._mesh)

    def _notes(self) -> list[str]:
        notes = []
        for name, stream in self.streams.items():
            for shape in sorted(stream.shapes):
                found = self._protocol.departures(shape)
                if found:
                    what = f"not comparable with published {self._protocol.name} numbers"
                    notes.append(f"{name}: {what}: {', '.join(found)}.")
        return notes


def _codecs(frames: int) -> tuple[str, ...]:
    clip = frames > 1 and baselines.h264_available()
    return tuple(name for name in CODECS if name != "h264" or clip)


def _checked(batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``(B, T, H, W, C)`` of a batch, and whether each row counts."""
    pixels = np.asarray(batch["pixels"])
    if pixels.dtype != np.uint8 or pixels.ndim not in (4, 5):
        raise ValueError(
            f"batches hold uint8 pixels (B, T, H, W, C) or (B, H, W, C), got {pixels.dtype} {pixels.shape}."
        )
    valid = np.asarray(batch.get("valid", np.ones(len(pixels), bool)), bool)
    return pixels if pixels.ndim == 5 else pixels[:, None], valid


def _as_pictures(clips: jax.Array) -> jax.Array:
    return clips[:, 0] if clips.shape[1] == 1 else clips


def _timed(total: list[float], frames: int, call):
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    total[0] += frames
    total[1] += time.perf_counter() - start
    return result


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.floor((np.clip(pixels, -1, 1) + 1) * 127.5 + 0.5).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(protocol: Protocol, names: tuple[str, ...], reference, reconstruction, codes):
    table = _pixel_scores(protocol, names, reference, reconstruction)
    flat = jnp.asarray(codes, jnp.float32).reshape(codes.shape[0], -1, codes.shape[-1])
    mean = flat.mean(axis=1)
    moments = {"mean": mean, "scatter": jnp.square(flat - mean[:, None]).sum(axis=1)}
    return table, moments | {"low": flat.min(axis=1), "high": flat.max(axis=1)}


def _pixel_scores(protocol: Protocol, names: tuple[str, ...], reference, reconstruction) -> dict[str, jax.Array]:
    return _compare(protocol, names, *protocol.prepare(reference, reconstruction))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _level_scores(protocol: Protocol, names: tuple[str, ...], reference, levels) -> dict[str, jax.Array]:
    # Both are 8-bit already: no protocol rounds them again.
    scale = protocol.data_range / 255
    return _compare(protocol, names, reference.astype(jnp.float32) * scale, levels.astype(jnp.float32) * scale)


def _compare(protocol: Protocol, names: tuple[str, ...], first, second) -> dict[str, jax.Array]:
    functions = {
        "psnr": protocol.psnr,
        "ssim": protocol.ssim,
        "ms_ssim": functools.partial(pixel_metrics.ms_ssim, data_range=protocol.data_range),
    }
    return {name: functions[name](first, second) for name in names}
