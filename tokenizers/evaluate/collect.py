"""What is kept of every batch of a stream, and the numbers that are made of it at the end. NumPy, on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from . import codebook, distances
from .codebook import CodeHistogram, LatentStatistics
from .distances import GaussianStatistics
from .latents import Space
from .protocols import Protocol

Value = float | int | str | list | dict


def not_computed(needs: str) -> str:
    """What a metric that could not be computed is reported as."""
    return f"not computed: needs {needs}"


def is_number(value: object) -> bool:
    """Whether a reported value is a number, and not a reason or a table."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclasses.dataclass
class FeaturePair:
    """Gaussian statistics of the features of the references and of the reconstructions."""

    reference: GaussianStatistics | None = None
    reconstruction: GaussianStatistics | None = None

    def add(self, reference: np.ndarray, reconstruction: np.ndarray) -> None:
        """Adds feature rows ``(N, D)`` of both."""
        self.reference = _merged(self.reference, GaussianStatistics.of(reference))
        self.reconstruction = _merged(self.reconstruction, GaussianStatistics.of(reconstruction))

    def merge(self, other: FeaturePair) -> FeaturePair:
        """Both together."""
        return FeaturePair(_merged(self.reference, other.reference), _merged(self.reconstruction, other.reconstruction))

    @property
    def count(self) -> int:
        """Number of rows of each."""
        return 0 if self.reference is None else self.reference.count

    def distance(self, root: str) -> Value:
        """Frechet distance, or why there is none."""
        if self.count < 2:
            return not_computed(f"at least 2 samples, got {self.count}")
        return distances.frechet_distance(self.reference, self.reconstruction, root)


def _merged(first, second):
    if first is None or second is None:
        return second if first is None else first
    return first.merge(second)


class Stream:
    """Everything collected of one stream (images, clips, ...).

    Attributes:
      rows: one dictionary of numbers per item.
      shapes: the (T, H, W) that occurred.
      codes: histogram of the tokens, ``None`` for continuous tokenizers.
      latents: moments of the latents.
      space: their spectrum, covariance and a sample of them.
      inception, i3d: feature statistics.
      logits: Inception logits of the reconstructions, one array per batch.
      reasons: metric -> why it was not computed.
      seconds: stage -> [frames, seconds] measured after warm-up.
    """

    def __init__(self):
        self.rows: list[dict[str, float]] = []
        self.shapes: set[tuple[int, int, int]] = set()
        self.codes: CodeHistogram | None = None
        self.latents: LatentStatistics | None = None
        self.space = Space()
        self.inception, self.i3d = FeaturePair(), FeaturePair()
        self.logits: list[np.ndarray] = []
        self.reasons: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {"encode": [0, 0.0], "decode": [0, 0.0]}

    def add_codes(self, indices: np.ndarray, size: int) -> None:
        """Counts the tokens of a batch (any shape)."""
        self.codes = _merged(self.codes, CodeHistogram.of(indices, size))

    def add_latents(self, positions: int, moments: Mapping[str, np.ndarray]) -> None:
        """Adds per-item moments over ``positions`` vectors each: mean, scatter, low, high, all ``(n, D)``."""
        if not len(moments["mean"]):
            return
        items = {key: np.asarray(value, np.float64) for key, value in moments.items()}
        mean = items["mean"].mean(axis=0)
        scatter = items["scatter"].sum(axis=0) + positions * np.square(items["mean"] - mean).sum(axis=0)
        count = positions * len(items["mean"])
        batch = LatentStatistics(count, mean, scatter, items["low"].min(axis=0), items["high"].max(axis=0))
        self.latents = _merged(self.latents, batch)

    def merge(self, other: Stream) -> Stream:
        """Both streams as one, for the overall numbers."""
        both = Stream()
        both.rows = self.rows + other.rows
        both.shapes = self.shapes | other.shapes
        both.codes, both.latents = _merged(self.codes, other.codes), _merged(self.latents, other.latents)
        both.space = self.space.merge(other.space)
        both.inception, both.i3d = self.inception.merge(other.inception), self.i3d.merge(other.i3d)
        both.logits = self.logits + other.logits
        both.reasons = self.reasons | other.reasons
        for stage, (frames, seconds) in self.seconds.items():
            more_frames, more_seconds = other.seconds[stage]
            both.seconds[stage] = [frames + more_frames, seconds + more_seconds]
        return both


PER_ITEM = ("psnr", "ssim", "ms_ssim", "lpips")


def summarize(stream: Stream, protocol: Protocol, metrics: tuple[str, ...]) -> dict[str, Value]:
    """The numbers of a stream: metric -> value, or a text that says what it needs."""
    frames = sum(int(row["frames"]) for row in stream.rows)
    result: dict[str, Value] = {"items": len(stream.rows), "frames": frames}
    result["shapes"] = ["x".join(map(str, shape)) for shape in sorted(stream.shapes)]
    for name in PER_ITEM:
        if name in metrics:
            result[name] = _item_mean(stream, name, protocol.weighting)
    if "rfid" in metrics:
        root = "eigenvalues" if protocol.fid == "torch-fidelity" else "sqrtm"
        result["rfid"] = _frechet(stream, "rfid", stream.inception, root)
    if "inception_score" in metrics:
        result["inception_score"] = _score(stream)
    if "fvd" in metrics:
        root = "eigenvalues" if protocol.fvd == "styleganv" else "symmetric"
        result["fvd"] = _frechet(stream, "fvd", stream.i3d, root)
        result["fvd_clips"] = stream.i3d.count
    if "bits" in metrics:
        result |= _bits(stream)
    if "codebook" in metrics:
        result |= _codebook(stream)
    if "latents" in metrics:
        result["latents"] = stream.latents.summary() if stream.latents else not_computed("at least one item")
    result |= _space(stream, metrics, protocol.weighting)
    if "throughput" in metrics:
        for stage, (count, seconds) in stream.seconds.items():
            result[f"{stage}_frames_per_second"] = count / seconds if seconds else not_computed("at least one batch")
    return result


def _space(stream: Stream, metrics: tuple[str, ...], weighting: str) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for key, value in stream.space.summary(metrics).items():
        needs = stream.reasons.get("spectrum") if key.endswith(("slope", "share")) else ""
        if needs or value is None:
            found[key] = not_computed(needs or "at least two vectors of latents")
        else:
            found[key] = value if np.isfinite(value) else not_computed("pictures and latents that vary")
    if "scale_equivariance" in metrics:
        found["scale_psnr"] = _item_mean(stream, "scale_psnr", weighting)
    return found


def _lacking(stream: Stream, name: str) -> str:
    return not_computed(stream.reasons.get(name, "at least one item"))


def _item_mean(stream: Stream, name: str, weighting: str) -> Value:
    rows = [row for row in stream.rows if name in row]
    # A mean over the items that happened to be large enough would be another metric.
    if len(rows) < len(stream.rows) or not rows:
        return _lacking(stream, name)
    weights = [row["frames"] if weighting == "frame" else 1.0 for row in rows]
    return float(np.average([row[name] for row in rows], weights=weights))


def _frechet(stream: Stream, name: str, pair: FeaturePair, root: str) -> Value:
    return pair.distance(root) if pair.count else _lacking(stream, name)


def _score(stream: Stream) -> Value:
    if not stream.logits:
        return _lacking(stream, "inception_score")
    # One split, as TiTok reports it: ten splits of a small set would measure the set's size.
    return distances.inception_score(np.concatenate(stream.logits), splits=1, shuffle_seed=None)[0]


def _bits(stream: Stream) -> dict[str, Value]:
    if not stream.rows:
        return {"bits_per_pixel": not_computed("at least one item")}
    pixels = sum(row["frames"] * row["height"] * row["width"] for row in stream.rows)
    tokens = sum(row["tokens"] for row in stream.rows)
    per_token = stream.rows[0]["bits_per_token"]
    found: dict[str, Value] = {
        "tokens": int(tokens),
        "bits_per_token": per_token,
        "bits_per_pixel": codebook.bits_per_pixel(tokens, per_token, 1, 1, pixels),
    }
    if stream.codes is None:
        found["bits_note"] = "continuous latents, counted as 16 bits a channel"
    else:
        found["bits_per_pixel_entropy_coded"] = tokens * stream.codes.entropy() / pixels
    return found


def _codebook(stream: Stream) -> dict[str, Value]:
    names = ("codebook_usage", "codebook_usage_of_reachable", "codebook_entropy", "codebook_perplexity")
    if stream.codes is None:
        needs = "a codebook; the latents are continuous" if stream.rows else "at least one item"
        return dict.fromkeys(names, not_computed(needs))
    codes = stream.codes
    return dict(zip(names, (codes.usage, codes.reachable_usage, codes.entropy(), codes.perplexity()), strict=True))


BASELINES = {"bicubic": "bicubic", "jpeg": "JPEG", "webp": "WebP", "h264": "H.264"}


def comparison(stream: Stream) -> list[dict[str, Value]]:
    """One row for the tokenizer and one per baseline, all over the same items: those that the baselines coded.

    Columns: ``name``, ``items``, ``psnr``, ``ssim``, ``bits_per_pixel``, ``codebook_usage_of_reachable`` (of the
    tokenizer), ``note``.
    """
    labels = [label for label in BASELINES if any(f"{label}_psnr" in row for row in stream.rows)]
    coded = [row for row in stream.rows if not labels or f"{labels[0]}_psnr" in row]
    if not coded:
        return []
    rates = [row["tokens"] * row["bits_per_token"] / _area(row) for row in coded]
    first: dict[str, Value] = {"name": "tokenizer", "items": len(coded)}
    first |= {key: float(np.mean([row[key] for row in coded])) for key in ("psnr", "ssim") if key in coded[0]}
    first["bits_per_pixel"] = float(np.average(rates, weights=[_area(row) for row in coded]))
    if stream.codes is not None:
        first["codebook_usage_of_reachable"] = stream.codes.reachable_usage
    found = [first]
    for label in labels:
        rows = [row for row in coded if f"{label}_psnr" in row]  # pictures have no H.264 row
        line: dict[str, Value] = {"name": BASELINES[label], "items": len(rows)}
        for key in ("psnr", "ssim"):
            values = [row[f"{label}_{key}"] for row in rows]
            if np.isfinite(values).all():
                line[key] = float(np.mean(values))
        rates = [row[f"{label}_bits_per_pixel"] for row in rows]
        line["bits_per_pixel"] = float(np.average(rates, weights=[_area(row) for row in rows]))
        over = sum(row[f"{label}_over_budget"] > 0 for row in rows)
        if over:
            line["note"] = f"over the budget even at the lowest quality ({over} of {len(rows)} items)"
        found.append(line)
    return found


def _area(row: dict[str, float]) -> float:
    return row["frames"] * row["height"] * row["width"]
