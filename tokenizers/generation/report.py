"""What a verdict leaves behind: ``metrics.json``, ``samples.png``, and a page that shows them."""

from __future__ import annotations

import html
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from ..evaluate import plots
from ..evaluate.collect import is_number
from ..evaluate.report import STYLE, image, jsonable

# score -> (heading, format)
HEADINGS = {
    "gfid": ("gFID (Inception)", "{:.3f}"),
    "inception_score": ("Inception score", "{:.2f}"),
    "fd_foundation": ("Frechet distance, foundation network", "{:.3f}"),
    "fd_judge": ("Frechet distance, our classifier", "{:.4g}"),
    "class_consistency": ("class consistency, our classifier", "{:.1%}"),
    "fd_pixels": ("Frechet distance, pixel statistics", "{:.4g}"),
}
_ROWS = {
    "generated": "by the generator that was trained on the latents",
    "reconstructed": "real ones, encoded and decoded: what no generator of these latents is expected to beat",
    "held out": "real ones that are not among the reference: what a perfect generator would score",
}
_CELL = 128  # largest side of a sample in the grid


def grid(pictures: np.ndarray, columns: int) -> Image.Image:
    """uint8 ``(N, H, W, 3)`` in rows; small ones are enlarged by whole factors, large ones made smaller."""
    height, width = pictures.shape[1:3]
    scale = _CELL / max(height, width)
    scale = max(1, int(scale)) if scale >= 1 else scale
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (size[0] + 2) - 2, rows * (size[1] + 2) - 2), (255, 255, 255))
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(Image.fromarray(picture).resize(size, method), (column * (size[0] + 2), row * (size[1] + 2)))
    return sheet


def shown(key: str, value: Any) -> str:
    """A score for people."""
    if value is None:
        return "-"
    return HEADINGS[key][1].format(value) if is_number(value) else str(value)


def format_table(results: Mapping[str, Any]) -> str:
    """The scores as text for a terminal."""
    scores = results["scores"]
    names = [heading for heading, _ in HEADINGS.values()]
    width = max(map(len, names))
    lines = ["  ".join(["".ljust(width), *(name.rjust(14) for name in scores)])]
    for key, (heading, _) in HEADINGS.items():
        values = [found.get(key) for found in scores.values()]
        texts = [value for value in values if isinstance(value, str)]
        if texts and not any(is_number(value) for value in values):
            lines.append(f"{heading.ljust(width)}  {texts[0]}")
        else:
            cells = ["-" if isinstance(value, str) else shown(key, value) for value in values]
            lines.append("  ".join([heading.ljust(width), *(cell.rjust(14) for cell in cells)]))
    return "\n".join([*lines, *(f"note: {note}" for note in results["notes"])]) + "\n"


def write(folder: pathlib.Path, results: Mapping[str, Any], samples: Image.Image, training_log: pathlib.Path) -> None:
    """Writes all files of a report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(jsonable(results), indent=2, allow_nan=False) + "\n")
    samples.save(folder / "samples.png")
    curve = plots.loss_curve(training_log)
    (folder / "report.html").write_text(_page(results, samples, curve), encoding="utf-8")


def _page(results: Mapping[str, Any], samples: Image.Image, curve: bytes | None) -> str:
    tokenizer, made, scores = results["tokenizer"], results["generator"], results["scores"]
    title = f"Generation with {tokenizer['name']}"
    cards = [
        f"<div class='card'><b>{shown(key, value)}</b><span>{html.escape(HEADINGS[key][0])}</span></div>"
        for key, value in scores["generated"].items()
        if key in HEADINGS and is_number(value)
    ]
    latents = "x".join(map(str, made["latents"]))
    facts = (
        f"Latents {latents} of {results['data']['items']} pictures; a generator of {made['parameters'] / 1e6:.1f} M "
        f"parameters with {made['tokens']} tokens, trained for {made['training_flops']:.3g} operations. "
        f"{results['devices']}."
    )
    heads = "".join(f"<th>{name}</th>" for name in scores)
    body = []
    for key, (heading, _) in HEADINGS.items():
        cells = []
        for found in scores.values():
            value = found.get(key)
            missing = " class=missing" if isinstance(value, str) else ""
            cells.append(f"<td{missing}>{html.escape(shown(key, value))}</td>")
        body.append(f"<tr><td>{html.escape(heading)}</td>{''.join(cells)}</tr>")
    buffer = io.BytesIO()
    samples.save(buffer, "PNG")
    parts = [
        f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p class='sub'>{html.escape(facts)}</p>",
        f"<div class='cards'>{''.join(cards)}</div>",
        f"<table><tr><th></th>{heads}</tr>{''.join(body)}</table>",
        *(f"<p class='note'>{name}: {what}.</p>" for name, what in _ROWS.items()),
        f"<h2>Samples</h2><p class='note'>The first ones, not chosen; sample i is of class i modulo "
        f"{results['data']['classes'] or 1}.</p><div class='scroll'>{image(buffer.getvalue(), 'samples')}</div>",
        f"<h2>Training of the generator</h2>{image(curve, 'loss')}" if curve else "",
        f"<h2>Budget</h2><table>{''.join(_rows(results['budget']))}</table>",
        f"<h2>Seconds</h2><table>{''.join(_rows(results['seconds']))}</table>",
        *(f"<p class='note'>{html.escape(note)}</p>" for note in results["notes"]),
    ]
    if results["judge_accuracy"] is not None:
        parts.append(
            f"<p class='note'>Our classifier recognizes {results['judge_accuracy']:.1%} of held-out real pictures.</p>"
        )
    return "".join(parts) + "</html>\n"


def _rows(values: Mapping[str, Any]):
    for key, value in values.items():
        yield f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>"
