"""Curves through the points of a study, the picture of them, and the table."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..train.config import write_atomically

# Of a score: whether less is better, and so a power law is what to expect.
POWER, LINE = "power", "line"


def fit(flops: Sequence[float], values: Sequence[float], kind: str) -> dict[str, float] | None:
    """A law through the points: ``value = a * flops ** b`` (``power``), or ``a + b * log10(flops)`` (``line``).

    Least squares, of logarithms where it is a power.

    Returns:
      ``{"a", "b", "r2", "points"}``, ``b`` with its standard error ``b_error`` where there are more than two points;
      ``None`` where there is nothing to fit: fewer than two different abscissae, or values a power cannot have.
    """
    x, y = np.log10(np.asarray(flops, np.float64)), np.asarray(values, np.float64)
    if len(set(np.round(x, 9))) < 2 or (kind == POWER and np.any(y <= 0)):
        return None
    y = np.log10(y) if kind == POWER else y
    slope, start = np.polyfit(x, y, 1)
    rest = float(((y - start - slope * x) ** 2).sum())
    spread = float(((y - y.mean()) ** 2).sum())
    law = {"a": float(10**start if kind == POWER else start), "b": float(slope), "points": len(x)}
    law["r2"] = 1 - rest / spread if spread > 0 else 1.0
    if len(x) > 2:
        law["b_error"] = float(math.sqrt(rest / (len(x) - 2) / ((x - x.mean()) ** 2).sum()))
    return law


def at(law: Mapping[str, float], flops: np.ndarray, kind: str) -> np.ndarray:
    """The law's values."""
    if kind == POWER:
        return law["a"] * np.asarray(flops) ** law["b"]
    return law["a"] + law["b"] * np.log10(flops)


def curves(records: Iterable[Mapping[str, Any]], config: Mapping) -> dict[str, dict[str, Any]]:
    """By score, by curve: ``{"points": [(flops, value, name)], "law": ...}``; failed points are left out.

    Args:
      records: of `study.gather`.
      config: of the study: ``curves``, the axis whose values are curves of their own, and ``scores``.
    """
    found: dict[str, dict[str, Any]] = {}
    for score, about in config["scores"].items():
        of_score = found[score] = {}
        for record in records:
            value = record["scores"].get(score)
            if value is None or record["failed"] or not record["flops"]:
                continue
            curve = of_score.setdefault(record["values"][config["curves"]], {"points": []})
            curve["points"].append((record["flops"], value, record["name"]))
        for curve in of_score.values():
            curve["points"].sort()
            curve["law"] = fit(*zip(*((x, y) for x, y, _ in curve["points"]), strict=True), about["law"])
    return found


def table(records: Sequence[Mapping[str, Any]], config: Mapping) -> str:
    """Markdown: mean and spread (of seeds) of every score, one row per combination of the other axes."""
    names = list(config["axes"])
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record["values"][axis] for axis in names), []).append(record)
    head = [*names, "TFLOP", "seeds", *config["scores"]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for values, members in groups.items():
        good = [record for record in members if not record["failed"]]
        flops = f"{good[0]['flops'] / 1e12:.3g}" if good and good[0]["flops"] else "-"
        cells = [_spread([r["scores"].get(score) for r in good]) for score in config["scores"]]
        lost = f" ({len(members) - len(good)} failed)" if len(good) < len(members) else ""
        lines.append("| " + " | ".join([*values, flops, f"{len(good)}{lost}", *cells]) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "not computed"
    mean = f"{np.mean(there):.4g}"
    return mean if len(there) == 1 else f"{mean} +- {np.std(there, ddof=1):.2g}"


def laws(found: Mapping[str, Mapping[str, Any]], config: Mapping) -> str:
    """Markdown: the law of every score and curve."""
    lines = [f"| score | {config['curves']} | law | exponent or slope per decade | R2 |", "|---|---|---|---|---|"]
    for score, of_score in found.items():
        kind = config["scores"][score]["law"]
        for curve, about in of_score.items():
            law = about["law"]
            if law is None:
                lines.append(f"| {score} | {curve} | none: needs two compute points | - | - |")
                continue
            error = f" +- {law['b_error']:.2g}" if "b_error" in law else ""
            text = f"{law['a']:.3g} C^{law['b']:.3g}" if kind == POWER else f"{law['a']:.3g} + {law['b']:.3g} log10 C"
            lines.append(f"| {score} | {curve} | {text} | {law['b']:.3g}{error} | {law['r2']:.2f} |")
    return "\n".join(lines)


def picture(found: Mapping[str, Mapping[str, Any]], config: Mapping) -> bytes:
    """PNG: a panel for every score, against the operations of pre-training; points are runs, lines the laws."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    colours = {name: f"C{number}" for number, name in enumerate(config["axes"][config["curves"]])}
    shown = {score: of_score for score, of_score in found.items() if of_score}
    columns = min(3, max(len(shown), 1))
    rows = max(-(-len(shown) // columns), 1)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for panel, (score, of_score) in zip(panels, shown.items(), strict=False):
        about = config["scores"][score]
        for curve, values in of_score.items():
            x, y = (np.asarray([point[i] for point in values["points"]]) for i in (0, 1))
            panel.scatter(x, y, s=22, color=colours[curve], label=curve, alpha=0.8)
            if values["law"] is not None:
                line = np.geomspace(x.min(), x.max(), 50)
                panel.plot(line, at(values["law"], line, about["law"]), color=colours[curve])
        panel.set_xscale("log")
        logarithmic = [panel.xaxis]
        if about["law"] == POWER and all(y > 0 for c in of_score.values() for _, y, _ in c["points"]):
            panel.set_yscale("log")
            logarithmic.append(panel.yaxis)
        for axis in logarithmic:  # less than a decade needs more than its powers of ten
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(10, 10)))
            axis.set_minor_formatter(NullFormatter())
        panel.set_title(f"{score} ({'less' if about['less_is_better'] else 'more'} is better)", fontsize=10)
        panel.set_xlabel("operations of pre-training", fontsize=9)
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def write(records: Sequence[Mapping[str, Any]], config: Mapping, folder: str | pathlib.Path) -> dict[str, Any]:
    """Writes results.json, scaling.png, scaling.md and report.html into the folder; returns the curves."""
    folder = pathlib.Path(folder).expanduser()
    found = curves(records, config)
    image, text, of_laws = picture(found, config), table(records, config), laws(found, config)
    (folder / "scaling.png").write_bytes(image)
    failed = [record for record in records if record["failed"]]
    lost = "\n".join(f"* {record['name']}: {last_line(record['failed'])}" for record in failed)
    lost = f"\n\nPoints without a verdict:\n\n{lost}" if failed else ""
    write_atomically(folder / "scaling.md", f"{text}\n\n{of_laws}{lost}\n")
    write_atomically(folder / "results.json", json.dumps({"points": list(records), "curves": found}, indent=2) + "\n")
    encoded = base64.b64encode(image).decode()
    body = f'<img src="data:image/png;base64,{encoded}" style="max-width:100%"><pre>{html.escape(text)}\n\n'
    body += f"{html.escape(of_laws)}{html.escape(lost)}</pre>"
    write_atomically(
        folder / "report.html",
        f"<!doctype html><meta charset=utf-8><title>Scaling study</title><body style='font-family:sans-serif'>{body}",
    )
    return found


def last_line(text: str) -> str:
    """What an error says in the end."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
