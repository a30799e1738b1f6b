"""From a checkpoint and a config to a report: what eval.py does, and train.py at the end of a run."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from .. import loading
from ..data.pipeline import Pipeline
from ..parallel import mesh as meshes
from ..parallel import multihost, platform
from . import captioned, report
from .run import evaluate
from .understanding import TEMPLATES, Setup


def evaluate_checkpoint(
    checkpoint: str | pathlib.Path, config: Mapping[str, Any], out: str | pathlib.Path | None = None
) -> dict[str, Any]:
    """Loads a tokenizer, evaluates it, writes the report, prints the table and says where the report is.

    Args:
      checkpoint: a run of train.py, a folder of `Tokenizer.save`, or an official weight file.
      config: as in ``configs/eval_default.py``.
      out: folder of the report; default ``evaluation`` in the run, ``evaluation_<name>`` beside anything else.

    Returns:
      What `run.evaluate` returns.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else config
    source = pathlib.Path(checkpoint).expanduser()
    tokenizer, folder = opened(source, config, out, "evaluation")
    data = _data(source, config)
    with data.batches() as batches:
        results = evaluate(
            tokenizer,
            batches,
            out_dir=folder,
            protocol=config["protocol"],
            metrics=config["metrics"],
            mesh=meshes.from_config(config["mesh"]),
            weights={key: path for key, path in config["weights"].items() if path},
            baseline_items=None if config["baseline_items"] < 0 else config["baseline_items"],
            preview_items=config["preview_items"],
            understanding=_understanding(source, config, data.classes),
            captions=captioned.of(tokenizer.module, _captions(source, config), data.classes),
            training_log=source / "metrics.jsonl" if (source / "metrics.jsonl").is_file() else None,
            title=f"Evaluation of {source.name}",
        )
    if multihost.is_main():
        print(report.format_table(results), flush=True)
        print(f"report: {(folder / 'report.html').resolve()}", flush=True)
    return results


def _captions(source: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.captions``, with the network of the run where it names none."""
    given = dict(config["captions"])
    if given["network"] is None and loading.is_run(source):
        given |= _run_config(source).get("captions", {})
    return given


def opened(
    source: pathlib.Path, config: Mapping[str, Any], out: str | pathlib.Path | None, what: str
) -> tuple[loading.Tokenizer, pathlib.Path]:
    """The tokenizer that a config of eval.py and its checkpoint name, and the folder for what is found out of it.

    Args:
      source: a run, a saved or published folder, or a weight file.
      config: its fields ``model step precision distributed compilation_cache``.
      out: the folder; ``None`` is ``what`` in a run, and ``what_<name>`` beside anything else.
      what: name of the folder.
    """
    multihost.initialize(config["distributed"])
    platform.enable_compilation_cache(config["compilation_cache"])
    fields = dict(config["model"])
    name = fields.pop("name") or None
    step = None if config["step"] < 0 else config["step"]
    tokenizer = loading.load(source, model=name, step=step, **fields)
    beside = source.parent / f"{what}_{source.stem if source.is_file() else source.name}"
    default = source / what if loading.is_run(source) else beside
    return tokenizer.cast(platform.compute_dtype(config["precision"])), pathlib.Path(out or default).expanduser()


def _run_config(run: pathlib.Path) -> dict[str, Any]:
    return json.loads((run / loading.RUN_CONFIG).read_text())


def _data(source: pathlib.Path, config: Mapping[str, Any]) -> Pipeline:
    """All of the config's own data (or what its ``held_out`` says), or the held-out split of the run."""
    data, seed, _ = _described(source, config)
    return _pipeline(data, seed, "held_out")


def _pipeline(data: Mapping[str, Any], seed: int, split: str) -> Pipeline:
    return Pipeline(data, seed=seed, split=split, process_index=jax.process_index(), process_count=jax.process_count())


def _described(source: pathlib.Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], int, bool]:
    """(data config, its seed, whether it has items besides the held-out ones)."""
    data = config["data"]
    if data["source"] or data["path"]:
        separate = bool(data["held_out"]) or not data["path"]
        return {**data, "held_out": data["held_out"] or data["path"]}, 0, separate
    if not loading.is_run(source):
        raise ValueError(
            f"{source} is not a run of train.py, so it has no held-out data of its own: "
            "set --config.data.path=<folder> or --config.data.source=embedded."
        )
    run = _run_config(source)
    return {**run["data"], "labels": data["labels"] or run["data"].get("labels", False)}, run["seed"], True


# An area of at least 8%, as the usual random crops of ImageNet's; larger pictures have room for it.
_AUGMENTED = {"crop": "random", "zoom": (1.0, 3.5), "flip": True}


def _understanding(source: pathlib.Path, config: Mapping[str, Any], classes: tuple[str, ...]) -> Setup:
    given = dict(config["understanding"])
    names, place, limit, views = (given.pop(key) for key in ("class_names", "training", "training_items", "views"))
    tested = classes
    if names:
        classes = tuple(line for line in pathlib.Path(names).expanduser().read_text().splitlines() if line)
    data, seed, separate = _described(source, config)
    if place:
        data = {**data, "source": "", "path": place, "sources": {}, "held_out": ""}
    plain = {**data, "crop": "center", "zoom": (1.0, 1.0), "flip": False}

    def pipelines(stream: str, changed: Mapping[str, Any]) -> tuple[Pipeline, Pipeline]:
        own = {**changed, "streams": {stream: data["streams"][stream]}}
        once, shuffled = (_pipeline(own, seed, split) for split in ("once", "train"))
        if tested and once.classes and tested != once.classes:
            raise ValueError(
                f"labels mean other classes in the data to learn from ({len(once.classes)} classes, {once.classes[:3]}"
                f"...) than in the evaluated data ({len(tested)} classes, {tested[:3]}...)."
            )
        return once, shuffled

    def taken(pipeline: Pipeline, items: int | None) -> Iterator[dict[str, Any]]:
        size = pipeline.shapes[0][1][0]
        with pipeline.batches() as batches:
            yield from itertools.islice(batches, items and -(-items // size))

    def training(stream: str) -> Iterator[dict[str, Any]]:
        once, shuffled = pipelines(stream, plain)
        # Some of them, of all classes: folders come in order.
        return taken(shuffled, limit) if 0 < limit < _items(once) else taken(once, None)

    def augmented(stream: str) -> Iterator[dict[str, Any]]:
        once, shuffled = pipelines(stream, {**data, **_AUGMENTED})
        return taken(shuffled, views * min(limit or _items(once), _items(once)))

    given["epochs"] /= max(1, views)  # an epoch of the classifier is one view of each picture
    templates = tuple(given.pop("templates")) or TEMPLATES
    given = {key: tuple(value) if isinstance(value, (tuple, list)) else value for key, value in given.items()}
    learns = separate or bool(place)
    return Setup(classes, templates, training if learns else None, augmented if learns and views else None, **given)


def _items(pipeline: Pipeline) -> int:
    """At least as many as there are, by less than a batch."""
    return pipeline.num_batches * pipeline.shapes[0][1][0]
