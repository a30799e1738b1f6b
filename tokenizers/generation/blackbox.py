"""From a tokenizer to a verdict: latents, a generator trained on them under a fixed budget, samples, scores, report."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from ..data.latents import LatentFolder
from ..data.pipeline import Pipeline
from ..evaluate import session
from ..generators.flow import Flow
from ..generators.generator import Generator
from ..parallel import mesh as meshes
from ..parallel import multihost
from ..train import config as configs
from ..train import loop, matching, preview
from . import judge, report, sampling
from .latents import Coder, extract
from .scores import Collected, Spaces

GRID = 8  # samples along each side of the picture of them


def patch_of(shape: tuple[int, int, int], tokens: int) -> int:
    """The smallest patch that leaves a generator at most that many tokens of latents ``(h, w, C)``.

    So that every tokenizer gives it the same number of them, where that is possible: 16 x 16 latents with patch 1 and
    32 x 32 with patch 2 are 256. A patch has equal sides, which divide both of the map's: a row of tokens that have no
    grid is taken as it is.
    """
    common = math.gcd(*shape[:2])
    patches = [patch for patch in range(1, common + 1) if common % patch == 0]
    return next((patch for patch in patches if shape[0] * shape[1] // patch**2 <= tokens), patches[-1])


def evaluate_checkpoint(
    checkpoint: str | pathlib.Path, config: Mapping[str, Any], out: str | pathlib.Path | None = None
) -> dict[str, Any] | None:
    """Runs the chain, or goes on where it stopped, and says where the report is.

    Args:
      checkpoint: a run of train.py, a folder of `Tokenizer.save`, or an official weight file.
      config: as in ``configs/generation_blackbox.py``.
      out: folder for everything; default ``generation`` in a run, ``generation_<name>`` beside anything else.

    Returns:
      ``{"tokenizer", "budget", "generator", "data", "scores": {set of pictures: {score: value}}, "notes", ...}``;
      ``None`` when the training of the generator was asked to stop.
    """
    config = configs.to_dict(config)
    tokenizer, folder = session.opened(pathlib.Path(checkpoint).expanduser(), config, out, "generation")
    results = judged(tokenizer, config, folder)
    if results is not None and multihost.is_main():
        print(report.format_table(results), flush=True)
        print(f"report: {(folder / 'report.html').resolve()}", flush=True)
    return results


def judged(tokenizer: Any, config: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any] | None:
    """The verdict on a tokenizer, under a plain config; see `evaluate_checkpoint`."""
    clock = _Clock()
    mesh = meshes.from_config(config["mesh"])
    coder = Coder(tokenizer, _size(config["data"]), config["latents"]["posterior"], config["budget"]["seed"])
    kept = {key: config["latents"][key] for key in ("flip", "dtype", "shard_items", "statistics_items")}
    once = Pipeline(config["data"], seed=0, split="once")
    latents = extract(coder, once, folder / "latents", **kept)
    if config["budget"]["guidance"] != 1 and not latents.classes:
        raise ValueError(f"config.budget.guidance={config['budget']['guidance']} needs classes, which the data lack.")
    clock("extracting latents")
    training = _training(config, latents)
    if not loop.run(training, folder / "generator"):
        return None
    clock("training the generator")
    real_judge = None
    if config["data"]["source"] == "shapes":
        real_judge = judge.train(config["data"], config["judge"], folder / "judge", config["budget"]["seed"])
    clock("training the classifier")
    spaces = Spaces(config["weights"], config["foundation"], real_judge, mesh)
    coder = coder.on(mesh)
    real, restored = _references(coder, config, spaces, mesh)
    held_out, missing = _held_out(config, spaces, mesh)
    clock("reference features")
    made, generated, pictures = _generated(coder, latents, config, spaces, mesh, folder)
    clock("sampling")
    budget = config["budget"]
    results = {
        "tokenizer": latents.about["tokenizer"],
        "data": latents.about["data"] | {"items": len(latents), "classes": latents.classes, "reference": real.count},
        "budget": budget,
        "generator": {
            "latents": list(latents.shape),
            "patch": made.module.patch,
            "tokens": math.prod(latents.shape[:2]) // made.module.patch**2,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(dict(made.variables))),
            "training_flops": _operations(folder / "generator" / "metrics.jsonl"),
        },
        "scores": {
            "generated": generated.compared(real, spaces.missing),
            "reconstructed": restored.compared(real, spaces.missing),
            "held out": held_out.compared(real, spaces.missing) if missing is None else missing,
        },
        "judge_accuracy": None if real_judge is None else real_judge.accuracy,
        "seconds": clock.seconds,
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
    }
    results["notes"] = _notes(results)
    if multihost.is_main():
        report.write(folder, results, pictures, folder / "generator" / "metrics.jsonl")
    return results


class _Clock:
    """Seconds of each part."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self._began = round(now - self._began, 1), now


def _size(data: Mapping[str, Any]) -> tuple[int, int]:
    sizes = {tuple(size) for stream in data["streams"].values() for size in stream["resolutions"]}
    if len(sizes) != 1 or len(data["streams"]) != 1:
        raise ValueError(f"latents are made of one stream of pictures of one size; config.data has {sorted(sizes)}.")
    return sizes.pop()


def _training(config: Mapping[str, Any], latents: LatentFolder) -> dict[str, Any]:
    """The training config, with what the budget and the latents decide."""
    training, budget = dict(config["training"]), config["budget"]
    training["steps"], training["seed"] = budget["steps"], budget["seed"]
    patch = patch_of(latents.shape, budget["tokens"])
    training["model"] = dict(training["model"]) | {"size": budget["size"], "patch": patch}
    training["data"] = dict(training["data"]) | {
        "path": str(latents.path.resolve()),
        "batch_size": budget["batch_size"],
        "flip": latents.copies > 1,
    }
    training["mesh"] = dict(training["mesh"]) | dict(config["mesh"])
    return training | {key: config[key] for key in ("distributed", "compilation_cache")}


def _pictures(config: Mapping[str, Any], split: str, limit: int, mesh) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """(pictures on the devices, whether they count, labels) of ``limit`` items at most, spread evenly over the data."""
    index, count = meshes.batch_share(mesh)
    data = Pipeline(config["data"], seed=0, split=split, process_index=index, process_count=count)
    (_, shape), *_ = data.shapes
    left = limit or data.num_batches * shape[0]
    stride = max(1, data.num_batches * shape[0] // left)
    with data.batches(stride=stride) as batches:
        for batch in batches:
            labels = batch.get("label", np.full(len(batch["valid"]), -1))
            rows = multihost.gather(
                {
                    key: meshes.global_batch(mesh, np.asarray(x))
                    for key, x in (("valid", batch["valid"]), ("label", labels))
                }
            )
            valid = rows["valid"] & (np.cumsum(rows["valid"]) <= left)
            left -= int(valid.sum())
            yield meshes.global_batch(mesh, np.ascontiguousarray(batch["pixels"][:, 0])), valid, rows["label"]
            if left <= 0:
                return


def _references(coder: Coder, config: Mapping[str, Any], spaces: Spaces, mesh) -> tuple[Collected, Collected]:
    """Real pictures of the training set, and what the tokenizer alone makes of the same ones."""
    real, restored = Collected(), Collected()
    first = 0
    for pictures, valid, labels in _pictures(config, "once", config["reference_items"], mesh):
        real.add(spaces(pictures), valid, labels)
        numbers = np.arange(first, first + len(valid), dtype=np.uint32)
        first += len(valid)
        restored.add(spaces(coder.decode(coder.encode(pictures, sampling.placed(mesh, numbers)))), valid, labels)
    return real, restored


def _held_out(config: Mapping[str, Any], spaces: Spaces, mesh) -> tuple[Collected, dict[str, Any] | None]:
    """Real pictures that are not in the training set: what a perfect generator would score."""
    found = Collected()
    if not preview.has_held_out(config["data"]):
        return found, {"pictures": 0}
    for pictures, valid, labels in _pictures(config, "held_out", config["budget"]["samples"], mesh):
        found.add(spaces(pictures), valid, labels)
    return found, None


def _generated(
    coder: Coder, latents: LatentFolder, config: Mapping[str, Any], spaces: Spaces, mesh, folder: pathlib.Path
) -> tuple[Generator, Collected, Image.Image]:
    """(the generator, statistics of its samples, a picture of the first of them)."""
    budget = config["budget"]
    made = matching.load(folder / "generator", budget["steps"])  # not one that has learned for longer
    made = Generator(made.module, jax.device_put(jax.device_get(made.variables), meshes.replicated(mesh)), made.name)
    flow = dict(config["training"]["flow"])
    flow.pop("uniform_from")
    found, shown = Collected(), []
    batches = sampling.samples(
        made,
        coder,
        latents.statistics,
        count=budget["samples"],
        classes=latents.classes,
        batch_size=config["sample_batch_size"],
        mesh=mesh,
        seed=budget["seed"],
        matching=Flow(**flow),
        **{key: budget[key] for key in ("points", "shift", "sampler", "guidance", "guidance_start", "guided_channels")},
    )
    with contextlib.closing(batches):
        for pictures, numbers, labels in batches:
            found.add(spaces(pictures), numbers < budget["samples"], labels)
            if len(shown) < GRID**2:
                shown += list(multihost.gather(pictures)[numbers < budget["samples"]])
    return made, found, report.grid(np.stack(shown[: GRID**2]), GRID)


def _operations(log: pathlib.Path) -> float | None:
    """Floating-point operations of a whole run."""
    if not log.is_file():  # another process writes it
        return None
    return json.loads(log.read_text().splitlines()[-1])["flops"]


def _notes(results: Mapping[str, Any]) -> list[str]:
    made, budget = results["generator"], results["budget"]
    notes = []
    if made["tokens"] != budget["tokens"]:
        notes.append(
            f"the generator has {made['tokens']} tokens, not the budget's {budget['tokens']}: no patch divides latents "
            f"of {made['latents'][0]} x {made['latents'][1]} into that many. Compare it with care."
        )
    fewest = min(results["data"]["reference"], budget["samples"])
    if fewest < 10_000:
        notes.append(
            f"distances between {results['data']['reference']} real and {budget['samples']} generated pictures are "
            "biased upwards: compare them under this budget only."
        )
    if results["tokenizer"]["decoded"] != "as they are":
        notes.append("sampled vectors became the nearest codes of the tokenizer before they were decoded.")
    elif results["tokenizer"]["codebook_size"]:
        notes.append("sampled vectors were decoded as they are, although the tokenizer has codes.")
    return notes
