"""What an evaluation leaves behind: ``metrics.json``, ``items.csv``, a preview, a clip, and a page that shows them."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .collect import Stream, is_number
from .pictures import Sample, preview_grid, side_by_side, write_mp4

# metric -> (heading, format)
HEADINGS = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "ms_ssim": ("MS-SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "rfid": ("rFID", "{:.3f}"),
    "inception_score": ("Inception score", "{:.2f}"),
    "fvd": ("FVD", "{:.2f}"),
    "bits_per_token": ("bits per token", "{:.4g}"),
    "bits_per_pixel": ("bits per pixel", "{:.4g}"),
    "bits_per_pixel_entropy_coded": ("bits per pixel, entropy coded", "{:.4g}"),
    "codebook_usage": ("codebook usage, of all codes", "{:.3%}"),
    # So many tokens cannot use more codes than they are; the shares differ only for a large codebook and few tokens.
    "codebook_usage_of_reachable": ("codebook usage, of min(codes, tokens)", "{:.1%}"),
    "codebook_entropy": ("codebook entropy, bits", "{:.3f}"),
    "codebook_perplexity": ("codebook perplexity", "{:.1f}"),
    "latents_slope": ("slope of the latents' spectrum", "{:.2f}"),
    "pixels_slope": ("slope of the pixels' spectrum, at that size", "{:.2f}"),
    "latents_high_share": ("power in the highest octave, latents", "{:.1%}"),
    "pixels_high_share": ("power in the highest octave, pixels", "{:.1%}"),
    "effective_rank": ("effective rank of the channels", "{:.2f}"),
    "uniformity": ("uniformity of latents", "{:.3f}"),
    "uniformity_of_even": ("uniformity of an even sphere", "{:.3f}"),
    "scale_psnr": ("PSNR of half-size latents", "{:.2f} dB"),
    "zero_shot_top1": ("zero-shot accuracy", "{:.2%}"),
    "zero_shot_top5": ("zero-shot accuracy, top 5", "{:.2%}"),
    "linear_probe": ("linear probe of features", "{:.2%}"),
    "linear_probe_latents": ("linear probe of pooled latents", "{:.2%}"),
    "knn": ("nearest neighbours of features", "{:.2%}"),
    "knn_latents": ("nearest neighbours of pooled latents", "{:.2%}"),
    "image_to_text_r1": ("texts of pictures, recall at 1", "{:.2%}"),
    "image_to_text_r5": ("texts of pictures, recall at 5", "{:.2%}"),
    "image_to_text_r10": ("texts of pictures, recall at 10", "{:.2%}"),
    "text_to_image_r1": ("pictures of texts, recall at 1", "{:.2%}"),
    "text_to_image_r5": ("pictures of texts, recall at 5", "{:.2%}"),
    "text_to_image_r10": ("pictures of texts, recall at 10", "{:.2%}"),
    "encode_frames_per_second": ("encoded frames per second", "{:.4g}"),
    "decode_frames_per_second": ("decoded frames per second", "{:.4g}"),
}
_COMPARED = ("psnr", "ssim", "bits_per_pixel", "codebook_usage_of_reachable")


def write(
    folder: pathlib.Path,
    results: Mapping[str, Any],
    streams: Mapping[str, Stream],
    samples: Mapping[str, Sequence[Sample]],
    training_log: str | pathlib.Path | None = None,
    title: str = "Tokenizer evaluation",
) -> None:
    """Writes all files of a report into ``folder``.

    Args:
      folder: made when absent; files of the same names are replaced.
      results: what `run.evaluate` returns.
      streams: per-item rows and histograms.
      samples: stream -> items to show.
      training_log: a run's ``metrics.jsonl``.
      title: heading of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(jsonable(results), indent=2, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n")
    _write_csv(folder / "items.csv", streams)
    shown = [sample for group in samples.values() for sample in group]
    if shown:
        preview_grid(shown).save(folder / "preview.png")
    clips = _clips(samples)
    if clips is not None:
        write_mp4(folder / "reconstruction.mp4", clips)
    plots = _plots(streams, training_log)
    page = _page(title, results, bool(shown) and folder / "preview.png", clips is not None, plots)
    (folder / "report.html").write_text(page, encoding="utf-8")


def format_table(results: Mapping[str, Any]) -> str:
    """The comparison with the baselines and the other metrics as text for a terminal."""
    lines = []
    for name in results["streams"]:
        rows = results["baselines"].get(name) or [{"name": "tokenizer", **results["streams"][name]}]
        header = [name, "items", *(HEADINGS[key][0] for key in _COMPARED), ""]
        body = [
            [row["name"], str(row["items"]), *(_shown(key, row.get(key)) for key in _COMPARED), row.get("note", "")]
            for row in rows
        ]
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        for line in [header, ["-" * width for width in widths[:-1]] + [""], *body]:
            cells = [
                line[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)),
            ]
            lines.append("  ".join([*cells, line[-1]]).rstrip())
        lines.append("")
        for key, (heading, _) in HEADINGS.items():
            if key in results["streams"][name] and key not in _COMPARED:
                lines.append(f"  {heading}: {_shown(key, results['streams'][name][key])}")
        lines.append("")
    return "\n".join([*lines, *(f"note: {note}" for note in results.get("notes", ()))]).rstrip() + "\n"


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "-"
    return HEADINGS[key][1].format(value) if is_number(value) else str(value)


def jsonable(value: Any) -> Any:
    """The same with texts for what JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    # JSON has no infinity; a text is better than a file that strict readers refuse.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(path: pathlib.Path, streams: Mapping[str, Stream]) -> None:
    rows = [{"stream": name} | row for name, stream in streams.items() for row in stream.rows]
    columns = list(dict.fromkeys(key for row in rows for key in row)) or ["stream", "item"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _clips(samples: Mapping[str, Sequence[Sample]]) -> np.ndarray | None:
    clips = [sample for group in samples.values() for sample in group if len(sample.reference) > 1]
    if not clips:
        return None
    videos = [side_by_side(sample) for sample in clips]
    # One file has one size: clips of other shapes stay in the preview.
    return np.concatenate([video for video in videos if video.shape[1:] == videos[0].shape[1:]])


def _plots(streams: Mapping[str, Stream], training_log: str | pathlib.Path | None) -> list[bytes]:
    from . import plots  # matplotlib takes a second to import, and only reports need it

    rows = {name: stream.rows for name, stream in streams.items()}
    codes = {name: stream.codes for name, stream in streams.items() if stream.codes is not None}
    found = [plots.rate_distortion(name, items) for name, items in rows.items()]
    spaces = {name: stream.space for name, stream in streams.items()}
    found += [plots.psnr_histogram(rows), plots.code_usage(codes), plots.spectra(spaces)]
    if training_log is not None:
        found.append(plots.loss_curve(pathlib.Path(training_log)))
    return [plot for plot in found if plot is not None]


STYLE = """
:root { color-scheme: light; --ink: #1c2026; --faint: #69707a; --line: #e3e6ea; --accent: #1f6feb; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1120px;
  margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
p.sub, .note { color: var(--faint); } .note { font-size: .88rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .7rem 1.1rem; min-width: 7.5rem; }
.card b { display: block; font-size: 1.35rem; } .card span { color: var(--faint); font-size: .82rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .38rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, td.text { text-align: left; } th { color: var(--faint); font-weight: 500; }
tr.ours td { color: var(--accent); font-weight: 600; }
td.missing { color: var(--faint); text-align: left; font-size: .88rem; }
img, video { max-width: 100%; border-radius: 6px; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); }
.scroll { overflow-x: auto; } .scroll img { max-width: none; }
"""


def _page(title: str, results: Mapping[str, Any], preview, has_clip: bool, plots: Sequence[bytes]) -> str:
    protocol, tokenizer = results["protocol"], results["tokenizer"]
    codebook = tokenizer["codebook_size"]
    kind = f"{codebook} codes" if codebook else f"{tokenizer['latent_channels']} continuous channels"
    compression = "x".join(map(str, tokenizer["compression"]))
    out = io.StringIO()
    out.write(f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>")
    out.write(f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>")
    facts = f"{tokenizer['name']}: {compression} compression (time, height, width), {kind}. {results['devices']}."
    out.write(f"<p class='sub'>{html.escape(facts)}</p>{_cards(results['overall'])}")
    for name, rows in results["baselines"].items():
        if rows:
            out.write(f"<h2>{html.escape(name)}: the same bits without a tokenizer</h2>{_comparison(rows)}")
    if any(results["baselines"].values()):
        out.write(
            "<p class='note'>Bicubic: one quantized colour per token on the same grid, the best split of its bits per "
            "item. JPEG and WebP: frame by frame; H.264: the clip as a whole; each at the highest quality that fits "
            "the tokenizer's bits. Headers and fixed tables of the codecs are not counted.</p>"
        )
    if preview:
        out.write(f"<h2>Side by side</h2><div class='scroll'>{image(preview.read_bytes(), 'preview')}</div>")
    if has_clip:
        out.write("<p><video controls loop muted src='reconstruction.mp4'></video></p>")
    if plots:
        out.write(f"<h2>Plots</h2><div class='plots'>{''.join(image(plot, 'plot') for plot in plots)}</div>")
    out.write(f"<h2>All metrics</h2>{_metrics(results)}")
    note = f"Protocol {protocol['name']} ({protocol['source']}). {protocol['note']}"
    for line in [note, *results["notes"]]:
        out.write(f"<p class='note'>{html.escape(line)}</p>")
    return out.getvalue() + "</html>\n"


def image(png: bytes, alternative: str) -> str:
    """An element of a page that holds the picture itself."""
    return f"<img alt='{alternative}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _cards(overall: Mapping[str, Any]) -> str:
    keys = ("psnr", "ssim", "lpips", "rfid", "fvd", "bits_per_pixel", "codebook_usage_of_reachable")
    cards = [
        f"<div class='card'><b>{_shown(key, overall[key])}</b><span>{HEADINGS[key][0]}</span></div>"
        for key in keys
        if is_number(overall.get(key))
    ]
    return f"<div class='cards'>{''.join(cards)}</div>"


def _comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = "".join(f"<th>{HEADINGS[key][0]}</th>" for key in _COMPARED)
    body = []
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{_shown(key, row.get(key))}</td>" for key in _COMPARED)
        note = html.escape(str(row.get("note", "")))
        style = " class='ours'" if index == 0 else ""
        body.append(
            f"<tr{style}><td>{row['name']}</td><td>{row['items']}</td>{cells}<td class='text note'>{note}</td></tr>"
        )
    return f"<table><tr><th></th><th>items</th>{heads}<th></th></tr>{''.join(body)}</table>"


def _metrics(results: Mapping[str, Any]) -> str:
    names = [*results["streams"], *(["overall"] if len(results["streams"]) > 1 else [])]
    columns = {name: results["overall"] if name == "overall" else results["streams"][name] for name in names}
    lines = [f"<tr><th></th>{''.join(f'<th>{html.escape(name)}</th>' for name in names)}</tr>"]
    for key, (heading, _) in {"items": ("items", ""), "frames": ("frames", ""), **HEADINGS}.items():
        if not any(key in column for column in columns.values()):
            continue
        cells = []
        for column in columns.values():
            value = column.get(key)
            missing = isinstance(value, str)
            text = str(value) if key in ("items", "frames") else _shown(key, value)
            cells.append(f"<td{' class=missing' if missing else ''}>{html.escape(text)}</td>")
        lines.append(f"<tr><td>{heading}</td>{''.join(cells)}</tr>")
    latents = {
        name: column["latents"] for name, column in columns.items() if isinstance(column.get("latents"), Mapping)
    }
    if latents:
        spread = "".join(
            f"<td>{x['mean']:.3g} / {x['std']:.3g} / {x['low']:.3g} / {x['high']:.3g}</td>" if x else "<td>-</td>"
            for x in (latents.get(name) for name in columns)
        )
        lines.append(f"<tr><td>latents: mean / std / lowest / highest</td>{spread}</tr>")
    return f"<table>{''.join(lines)}</table>"
