"""The plots of the report, as PNG bytes. Drawn on figures of their own: no window, no global state of matplotlib."""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .codebook import CodeHistogram
from .collect import BASELINES
from .latents import Space

_COLOURS = {"tokenizer": "#1f6feb", "bicubic": "#8c959f", "jpeg": "#d4700a", "webp": "#1a7f37", "h264": "#8250df"}
_CURVES = 6


def _axes(title: str, x: str, y: str):
    figure = Figure(figsize=(5.2, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def psnr_histogram(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes | None:
    """PSNR of the items of every stream; ``None`` when it was not computed."""
    values = {name: [row["psnr"] for row in items if "psnr" in row] for name, items in rows.items()}
    values = {name: found for name, found in values.items() if found}
    if not values:
        return None
    figure, axes = _axes("PSNR of the items", "dB", "items")
    everything = np.concatenate(list(values.values()))
    low, high = everything.min(), everything.max()
    bins = np.linspace(low - 0.5, high + 0.5, min(30, 5 + len(everything)))
    axes.hist(list(values.values()), bins=bins, label=list(values), stacked=True, rwidth=0.92, edgecolor="white")
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def code_usage(histograms: Mapping[str, CodeHistogram]) -> bytes | None:
    """How often the codes occur, from the most frequent one down; ``None`` without a codebook."""
    if not histograms:
        return None
    figure, axes = _axes("Codebook usage", "rank of the code", "share of the tokens")
    for name, histogram in histograms.items():
        shares = np.sort(histogram.counts)[::-1] / max(histogram.tokens, 1)
        axes.plot(np.arange(1, len(shares) + 1), shares, drawstyle="steps-post", label=f"{name}: {len(shares)} codes")
    size = max(histogram.size for histogram in histograms.values())
    axes.axhline(1 / size, color="#8c959f", linewidth=1, linestyle="--", label=f"all {size} codes alike")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def spectra(spaces: Mapping[str, Space]) -> bytes | None:
    """Power of latents over spatial frequency beside that of the pixels; ``None`` where there is no grid."""
    pairs = {name: (space.latents, space.pixels) for name, space in spaces.items() if space.latents is not None}
    if not pairs:
        return None
    figure, axes = _axes("Spectrum", "cycles per latent", "power, mean 1")
    for number, (name, (latents, pixels)) in enumerate(pairs.items()):
        for what, spectrum, line in (("latents", latents, "-"), ("pixels", pixels, ":")):
            frequency, power = spectrum.curve()
            label = f"{name}: {what}, slope {spectrum.slope():.1f}"
            axes.plot(frequency, np.maximum(power, 1e-12), line, color=f"C{number}", label=label, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.tick_params(which="both", labelsize=7)
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def rate_distortion(name: str, rows: Sequence[Mapping[str, float]]) -> bytes | None:
    """PSNR over bits per pixel of one stream's items, tokenizer and baselines; ``None`` without baselines."""
    rows = [row for row in rows if "psnr" in row and "bicubic_psnr" in row]
    if not rows:
        return None
    figure, axes = _axes(f"Rate and distortion: {name}", "bits per pixel", "PSNR, dB")
    points = {"tokenizer": ([_rate(row) for row in rows], [row["psnr"] for row in rows])}
    for label in BASELINES:
        found = [row for row in rows if f"{label}_psnr" in row]
        if found:
            points[label] = ([r[f"{label}_bits_per_pixel"] for r in found], [r[f"{label}_psnr"] for r in found])
    for label, (rates, decibels) in points.items():
        front = 3 if label == "tokenizer" else 2
        axes.scatter(rates, decibels, s=10, alpha=0.3, color=_COLOURS[label], linewidths=0)
        style = {"s": 60, "color": _COLOURS[label], "edgecolors": "white", "zorder": front}
        axes.scatter(np.mean(rates), np.mean(decibels), label=BASELINES.get(label, label), **style)
    everything = [rate for rates, _ in points.values() for rate in rates]
    if 0 < 20 * min(everything) < max(everything):
        axes.set_xscale("log")
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def _rate(row: Mapping[str, float]) -> float:
    return row["tokens"] * row["bits_per_token"] / (row["frames"] * row["height"] * row["width"])


def loss_curve(path: pathlib.Path) -> bytes | None:
    """Losses of a run from its ``metrics.jsonl`` (one object with ``step`` per line); ``None`` when it holds none."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            if "loss" in name.lower() and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((entry["step"], value))
    if not curves:
        return None
    figure, axes = _axes("Training", "step", "loss")
    # The total first, then the longest curves.
    order = sorted(curves, key=lambda name: ("total" not in name and name.split("/")[-1] != "loss", -len(curves[name])))
    for name in order[:_CURVES]:
        steps, values = np.array(curves[name]).T
        axes.plot(steps, values, linewidth=1.2, label=name)
    if all(value > 0 for name in order[:_CURVES] for _, value in curves[name]):
        axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)
