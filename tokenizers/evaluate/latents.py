"""Latents worth generating: what can be said of them without training a generator.

Their spectrum beside that of the pixels, how many channels they really use, how evenly they fill their sphere, and
whether a smaller grid of them is a smaller picture. None of these is a score of generation; they are where papers look
first when one tokenizer is harder to generate for than another with the same reconstructions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from ..parallel import platform
from ..pixels import cropped
from ..types import Encoding, Spec
from .distances import GaussianStatistics

Array = jax.Array

METRICS = ("spectrum", "uniformity", "effective_rank", "scale_equivariance")
BINS = 16  # of radial frequencies, up to half a cycle per latent
HIGH = 0.25  # cycles per latent: above it, one octave, are the high frequencies
SMALLEST = 4  # latents along a side
PER_ITEM, VECTORS = 16, 4096  # vectors for uniformity


# Spectrum ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Spectrum:
    """Power over spatial frequency of every channel, collected in any number of pieces.

    Power is that of the cosine transform (DCT-II, orthonormal), which has no jump where a Fourier transform joins the
    borders; as Skorokhodov et al. look at latents (https://arxiv.org/abs/2502.14831).

    Attributes:
      power: sums over coefficients of a ring of frequencies, ``(D, BINS)``.
      counts, frequencies: coefficients of each ring, and the sum of their frequencies, ``(BINS,)``.
      high, total: sums over the high ones and over all but the mean, ``(D,)``.
    """

    power: np.ndarray
    counts: np.ndarray
    frequencies: np.ndarray
    high: np.ndarray
    total: np.ndarray

    def merge(self, other: Spectrum) -> Spectrum:
        """Both together."""
        mine, theirs = (dataclasses.astuple(spectrum) for spectrum in (self, other))
        return Spectrum(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Frequencies in cycles per latent, and the mean power there, of channels with a mean power of 1."""
        filled = self.counts > 0
        sums = self.power.sum(axis=1)
        alive = sums > 0
        shares = self.power[alive][:, filled] / sums[alive][:, None]
        scale = self.counts.sum() / max(1, alive.sum())
        return (self.frequencies / np.maximum(self.counts, 1))[filled], shares.sum(0) * scale / self.counts[filled]

    def slope(self) -> float:
        """Of log power over log frequency: 0 for white noise, about -2 for photographs.

        Less steep than the pixels' means that latents hide detail which a generator must get right. Constant latents
        have none (nan).
        """
        frequency, power = self.curve()
        if not np.all(power > 0):
            return float("nan")
        return float(np.polyfit(np.log(frequency), np.log(power), 1)[0])

    def high_share(self) -> float:
        """Share of the highest octave in the power but the mean, in [0, 1], mean of channels; 0.8 for white noise."""
        alive = self.total > 0
        return float(np.mean(self.high[alive] / self.total[alive])) if alive.any() else float("nan")


def _spectrum(x: Array, valid: Array) -> dict[str, Array]:  # (n h w d), (n,)
    height, width = x.shape[1:3]
    power = jnp.square(jax.scipy.fft.dctn(x.astype(jnp.float32), axes=(1, 2), norm="ortho"))
    power = jnp.einsum("nhwd,n->dhw", power, valid, precision=jax.lax.Precision.HIGHEST)
    radius = np.hypot(*np.meshgrid(np.arange(height) / (2 * height), np.arange(width) / (2 * width), indexing="ij"))
    inside = (radius > 0) & (radius < 0.5)
    rings = np.minimum((radius * 2 * BINS).astype(int), BINS - 1)
    member = np.stack([inside & (rings == ring) for ring in range(BINS)]).astype(np.float32)
    items = valid.sum()
    return {
        "power": jnp.einsum("dhw,bhw->db", power, member, precision=jax.lax.Precision.HIGHEST),
        "counts": items * member.sum((1, 2)),
        "frequencies": items * (member * radius).sum((1, 2)),
        "high": (power * (radius > HIGH)).sum((1, 2)),
        "total": (power * (radius > 0)).sum((1, 2)),
    }


def _shrunk(pixels: Array, grid: tuple[int, int]) -> Array:
    """uint8 ``(n H W 3)`` averaged over the pixels of a latent, as a grid: what the latents have the size of."""
    x = pixels.astype(jnp.float32) / 127.5 - 1
    height, width = (-(-side // cells) for side, cells in zip(x.shape[1:3], grid, strict=True))
    fill = [cells * size - side for side, cells, size in zip(x.shape[1:3], grid, (height, width), strict=True)]
    x = jnp.pad(x, ((0, 0), (0, fill[0]), (0, fill[1]), (0, 0)), mode="edge")
    return x.reshape(len(x), grid[0], height, grid[1], width, -1).mean((2, 4))


# Channels ------------------------------------------------------------------------------------------------------------


def effective_rank(covariance: np.ndarray) -> float:
    """``exp(entropy of the shares of the singular values)``, in [1, D]; 0 where nothing varies.

    Roy and Vetterli, EUSIPCO 2007, of the covariance of the channels: D for white channels of one variance, less when
    few directions have most of the variance. More is not better by itself, but far less than D means channels that
    cost a generator as much as the others and carry little.
    """
    values = np.maximum(np.linalg.eigvalsh(covariance), 0)
    if values.sum() <= 0:
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def uniformity(vectors: np.ndarray) -> float:
    """``log mean exp(-2 |x - y|^2)`` over pairs of different vectors of length 1, in [-8, 0]; less is more even.

    Wang and Isola 2020 (https://arxiv.org/abs/2005.10242, t = 2). Channels are standardized before, as generators see
    them. 0 when all are the same; `even` is what an evenly filled sphere has.

    Args:
      vectors: ``(N, D)``.
    """
    x = np.asarray(vectors, np.float64)
    std = x.std(axis=0)
    x = (x - x.mean(axis=0)) * np.where(std > 1e-12, 1 / np.maximum(std, 1e-12), 0)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    squares = np.square(x).sum(axis=1)
    total = 0.0
    for start in range(0, len(x), 512):
        rows = slice(start, start + 512)
        distances = squares[rows, None] + squares - 2 * x[rows] @ x.T
        potential = np.exp(-2 * np.maximum(distances, 0))
        total += potential.sum() - np.trace(potential, offset=start)
    return float(np.log(total / (len(x) * (len(x) - 1))))


def even(channels: int) -> float:
    """`uniformity` of a sphere filled evenly, ``log E exp(4 cos - 4)``: -0.7 for one channel, towards -4 for many."""
    # E exp(k cos) is the normalizer of von Mises and Fisher's distribution: 0F1(D / 2, k^2 / 4).
    return float(np.log(scipy.special.hyp0f1(channels / 2, 4.0)) - 4)


# Scale ---------------------------------------------------------------------------------------------------------------


def scale_reason(encoding: Encoding, spec: Spec, module: Any) -> str:
    """Why there is no scale equivariance of such latents; "" if there is."""
    if encoding.indices is not None:
        return "latents before a codebook; codes cannot be averaged"
    if spec.tokens_per_item is not None or getattr(module, "input_size", None) is not None:
        return "a grid of latents, for pictures of any size"
    height, width = encoding.latents.shape[-3:-1]
    if height % 2 or width % 2 or min(height, width) < SMALLEST:
        return f"even grids of at least {SMALLEST}x{SMALLEST} latents, got {height}x{width}"
    return ""


@platform.jit
def halved(x: Array) -> Array:  # (... h w c) -> (... h/2 w/2 c)
    """Means of 2x2: what bilinear resampling to half the size does. An odd last row or column is left out."""
    height, width = (side // 2 for side in x.shape[-3:-1])
    x = x[..., : 2 * height, : 2 * width, :].astype(jnp.float32)
    return x.reshape(*x.shape[:-3], height, 2, width, 2, x.shape[-1]).mean((-4, -2))


@platform.jit
def scale_psnr(small: Array, decoded: Array) -> Array:
    """PSNR in dB of decoded halved latents against the halved picture, ``(B,)``; more is better.

    EQ-VAE's equivariance (https://arxiv.org/abs/2502.09509, equation 4) as a number: latents that mean the same at
    every scale give the small picture. The plain PSNR says what the tokenizer can do at best.

    Args:
      small: levels of the halved picture, 0 to 255, ``(B, T, H // 2, W // 2, 3)``.
      decoded: float [-1, 1] of that shape.
    """
    levels = (jnp.clip(decoded, -1, 1) + 1) * 127.5
    return 10 * jnp.log10(255.0**2 / jnp.maximum(jnp.square(levels - small).mean((1, 2, 3, 4)), 1e-8))


# Together ------------------------------------------------------------------------------------------------------------


class Space:
    """What is kept of the latents of a stream."""

    def __init__(self):
        self.latents: Spectrum | None = None
        self.pixels: Spectrum | None = None
        self.statistics: GaussianStatistics | None = None
        self.vectors: list[np.ndarray] = []

    def add(self, found: dict[str, Any], valid: np.ndarray) -> None:
        """Adds what `measure` has found in a batch."""
        if "count" in found:
            count, mean, scatter = (np.asarray(found[key], np.float64) for key in ("count", "mean", "scatter"))
            self.statistics = _merged(self.statistics, GaussianStatistics(int(count), mean, scatter))
        if "vectors" in found and sum(map(len, self.vectors)) < VECTORS:
            self.vectors.append(found["vectors"][valid].reshape(-1, found["vectors"].shape[-1]))
        for name in ("latents", "pixels"):
            if name in found:
                parts = {key: np.asarray(value, np.float64) for key, value in found[name].items()}
                setattr(self, name, _merged(getattr(self, name), Spectrum(**parts)))

    def merge(self, other: Space) -> Space:
        """Both together."""
        both = Space()
        for name in ("latents", "pixels", "statistics"):
            setattr(both, name, _merged(getattr(self, name), getattr(other, name)))
        both.vectors = self.vectors + other.vectors
        return both

    def summary(self, metrics: tuple[str, ...]) -> dict[str, float | None]:
        """The numbers of the wanted metrics; ``None`` where nothing was collected."""
        result: dict[str, float | None] = {}
        if "spectrum" in metrics:
            for name in ("latents", "pixels"):
                found = getattr(self, name)
                result[f"{name}_slope"] = None if found is None else found.slope()
                result[f"{name}_high_share"] = None if found is None else found.high_share()
        if "effective_rank" in metrics:
            enough = self.statistics is not None and self.statistics.count > 1
            result["effective_rank"] = effective_rank(self.statistics.covariance) if enough else None
        if "uniformity" in metrics:
            vectors = np.concatenate(self.vectors)[:VECTORS] if self.vectors else np.zeros((0, 1))
            result["uniformity"] = uniformity(vectors) if len(vectors) > 1 else None
            result["uniformity_of_even"] = even(vectors.shape[1]) if len(vectors) > 1 else None
        return result


def _merged(first, second):
    if first is None or second is None:
        return second if first is None else first
    return first.merge(second)


def look(
    tokenizer: Any, metrics: tuple[str, ...], reference: Array, encoding: Encoding, valid: Array
) -> tuple[dict[str, Any], dict[str, Array], dict[str, str]]:
    """What the wanted metrics need of a batch: (what `Space.add` reads, numbers per item, why others are missing).

    Args:
      tokenizer: decodes latents of half the size.
      metrics: names; those of other modules are none of this one's business.
      reference: uint8 ``(B, T, H, W, 3)``.
      encoding: of it.
      valid: whether each row counts, ``(B,)``.
    """
    wanted = tuple(name for name in METRICS if name in metrics)
    if not wanted:
        return {}, {}, {}
    reasons = {"spectrum": spectrum_reason(encoding.latents)}
    per_item = {}
    if "scale_equivariance" in wanted:
        reasons["scale_psnr"] = scale_reason(encoding, tokenizer.spec, getattr(tokenizer, "module", None))
        if not reasons["scale_psnr"]:
            small = halved(reference)
            decoded = tokenizer.decode(halved(encoding.latents))
            shape = small.shape if decoded.ndim == 5 else (small.shape[0], *small.shape[2:])
            decoded = cropped(tokenizer.spec, decoded, shape)
            per_item["scale_psnr"] = scale_psnr(small, decoded[:, None] if decoded.ndim == 4 else decoded)
    return _measure(wanted, reference, encoding.latents, valid), per_item, {k: v for k, v in reasons.items() if v}


def spectrum_reason(latents: Array) -> str:
    """Why latents ``(B, ..., D)`` have no spectrum; "" if they have."""
    if latents.ndim < 4 or min(latents.shape[-3:-1]) < SMALLEST:
        size = "x".join(map(str, latents.shape[1:-1]))
        return f"a grid of at least {SMALLEST}x{SMALLEST} latents, got {size}"
    return ""


def _measure(wanted: tuple[str, ...], reference: Array, latents: Array, valid: Array) -> dict[str, Any]:
    found: dict[str, Any] = {}
    latents, counted = latents.astype(jnp.float32), valid.astype(jnp.float32)
    flat = latents.reshape(len(latents), -1, latents.shape[-1])
    if "effective_rank" in wanted:
        count = counted.sum() * flat.shape[1]
        mean = jnp.einsum("bnd,b->d", flat, counted, precision=jax.lax.Precision.HIGHEST) / jnp.maximum(count, 1)
        centred = (flat - mean) * jnp.sqrt(counted)[:, None, None]
        scatter = jnp.einsum("bnd,bne->de", centred, centred, precision=jax.lax.Precision.HIGHEST)
        found |= {"count": count, "mean": mean, "scatter": scatter}
    if "uniformity" in wanted:
        places = min(PER_ITEM, flat.shape[1])
        found["vectors"] = flat[:, (2 * np.arange(places) + 1) * flat.shape[1] // (2 * places)]
    if "spectrum" in wanted and not spectrum_reason(latents):
        grid = latents.shape[-3:-1]
        pictures = reference.reshape(-1, *reference.shape[2:])
        maps = latents.reshape(-1, *latents.shape[-3:])
        found["latents"] = _spectrum(maps, jnp.repeat(counted, len(maps) // len(counted)))
        found["pixels"] = _spectrum(_shrunk(pictures, grid), jnp.repeat(counted, reference.shape[1]))
    return found


_measure = platform.jit(_measure, static_argnums=0)
