"""What a run says of itself at its start, and leaves in its folder."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..parallel import platform, rules
from .build import placements
from .config import write_atomically
from .step import Trainable


def compile_message(compiled, flops: float, what: str, seconds: float) -> str:
    """One line about a compiled step: time, floating-point operations of all devices, memory of one."""
    memory = compiled.memory_analysis()
    text = f"compiled the step for {what} in {seconds:.1f} s: {flops / 1e9:.2f} GFLOP per step"
    if memory is not None:
        total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        text += f", {total / 2**20:.0f} MiB per device"
    return text


def write_summary(folder: pathlib.Path, config: Mapping, parts: Trainable, mesh: Mesh, data, say: Callable) -> None:
    """Says what is about to be trained, and leaves the folder explaining itself."""
    describe, readme = _KINDS.get(config["recipe"], (_tokenizer, _README_TOKENIZER))
    shapes = jax.eval_shape(parts.initialize).params["model"]
    lines = [
        *describe(config["model"]["name"], parts, shapes),
        f"compute {jnp.dtype(platform.compute_dtype(config['precision'])).name} on {mesh.size} x "
        f"{mesh.devices.flat[0].device_kind}, mesh {dict(mesh.shape)}",
    ]
    lines += [*parts.summary(), data.summary()]
    if mesh.size > 1:
        placed = {"params": {"model": shapes}}
        split = rules.describe(placed, mesh, placements(config), config["mesh"]["smallest"])
        lines.append(f"split parameters:\n{split}")
    text = "\n".join(lines)
    say(text)
    write_atomically(folder / "summary.txt", text + "\n")
    write_atomically(folder / "README.txt", (_README + readme).format(folder=folder))


def _tokenizer(name: str, parts: Trainable, shapes: Mapping[str, Any]) -> list[str]:
    spec = parts.model.spec
    time, height, width = spec.compression
    codes = f"{spec.codebook_size} codes = {spec.bits_per_token:.3g} bits" if spec.codebook_size else "continuous"
    return [
        f"tokenizer {name}: {_count(shapes) / 1e6:.3f} M parameters, one token per {time}x{height}x{width} "
        f"(time, height, width) pixels, {spec.latent_channels} channels, {codes}",
        *(f"  {part}: {_count(tree) / 1e6:.3f} M" for part, tree in shapes.items()),
    ]


def _generator(name: str, parts: Trainable, shapes: Mapping[str, Any]) -> list[str]:
    model = parts.model
    tokens = math.prod(model.grid) // model.patch**2
    return [
        f"generator {name}: {_count(shapes) / 1e6:.3f} M parameters, {tokens} tokens of {model.patch}x{model.patch} "
        f"latents with {model.channels} channels, {model.classes} classes"
    ]


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


_README = """This folder is one training run.

config.json     every field of its config; the same command with the same --workdir goes on where it stopped
summary.txt     the model, the devices and the data
metrics.jsonl   one line per logged step: losses, learning rate, speed, skipped updates
checkpoints/    complete states of the run; the latest ones, and the best on held-out data if it is measured, are kept
tensorboard/    tensorboard --logdir {folder}
"""
_README_TOKENIZER = """pictures/       held-out input (top) and reconstruction (bottom) as training went on
evaluation/     report.html, metrics.json and per-item figures, written at the end or by eval.py

Use it:      import tokenizers; tok = tokenizers.load("{folder}")
Evaluate it: python eval.py --config=configs/eval_default.py --checkpoint={folder}
"""
_README_GENERATOR = """
Use it: from tokenizers.train import matching; made = matching.load("{folder}")
        made.sample(key, labels) are normalized latents; the folder of those it learned from knows their scale
"""
_KINDS = {"generator": (_generator, _README_GENERATOR)}
