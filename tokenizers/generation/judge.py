"""A classifier of our own, trained on the real pictures: which class a sample shows, and features to compare sets by.

It is a measuring device for data that are drawn without end, such as ``shapes``, not a network anyone else has: its
numbers compare tokenizers under one config, and nothing else. It sees no tokenizer, so it is the same for all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from .. import pixels as pixel_values
from ..data.pipeline import Pipeline
from ..nn.conv import Conv2d
from ..parallel import multihost, platform
from ..types import Array


class Classifier(nn.Module):
    """Convolutions, all but the first of which halve the picture; the maximum over it; a linear layer.

    The maximum, since an object is somewhere: with the mean it learns several times slower.

    Attributes:
      classes: number of them.
      channels: of the convolutions.
    """

    classes: int
    channels: tuple[int, ...] = (32, 64, 128, 256)

    @nn.compact
    def __call__(self, pictures: Array) -> tuple[Array, Array]:  # uint8 (b h w 3) -> logits (b k), features (b d)
        x = pixel_values.to_float(pictures)
        for number, channels in enumerate(self.channels):
            x = nn.relu(Conv2d(channels, 3, strides=1 if number == 0 else 2, name=f"conv{number}")(x))
        features = x.max(axis=(1, 2))
        return nn.Dense(self.classes, name="logits")(features), features


@dataclasses.dataclass(frozen=True)
class Judge:
    """A trained `Classifier`.

    Attributes:
      module, variables: of the network.
      accuracy: on the held-out pictures.
    """

    module: Classifier
    variables: Mapping[str, Any]
    accuracy: float


def train(data: Mapping[str, Any], config: Mapping[str, Any], folder: pathlib.Path, seed: int = 0) -> Judge:
    """The judge of a data set: from ``folder``, where the same training has left it, or trained and left there.

    Args:
      data: a data config whose items have labels; its training items are seen at random, mirrored if it says so.
      config: ``channels``, ``steps``, ``batch_size``, ``lr``, ``held_out`` (items that the accuracy is of).
      folder: for ``judge.npz``.
      seed: of weights and order.
    """
    real = Pipeline(_with_batches(data, config["batch_size"]), seed=seed)
    facts = {"config": dict(config) | {"channels": list(config["channels"])}, "data": real.fingerprint, "seed": seed}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    module = Classifier(len(real.classes), tuple(config["channels"]))
    path = folder / "judge.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            if str(file["digest"]) == digest:
                flat = {name: jnp.asarray(file[name]) for name in file.files if name.startswith("params/")}
                return Judge(module, traverse_util.unflatten_dict(flat, sep="/"), float(file["accuracy"]))
    variables = _fit(module, real, config, seed)
    judge = Judge(module, variables, _accuracy(module, variables, data, config))
    if multihost.is_main():  # the others have trained the same
        flat = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, **flat, digest=np.asarray(digest), accuracy=np.asarray(judge.accuracy))
        os.replace(partial, path)
    return judge


def _with_batches(data: Mapping[str, Any], size: int) -> dict[str, Any]:
    streams = {name: dict(stream) | {"batch_size": size} for name, stream in data["streams"].items()}
    return dict(data) | {"streams": streams}


def _fit(module: Classifier, real: Pipeline, config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    (_, shape), *_ = real.shapes
    variables = jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, *shape[2:]), jnp.uint8))
    warmup = max(1, config["steps"] // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, config["lr"], warmup, max(config["steps"], warmup + 1))
    optimizer = optax.adamw(rate, weight_decay=1e-2)
    state = optimizer.init(variables)

    @platform.jit
    def step(variables, state, pictures, labels):
        def loss(variables):
            logits, _ = module.apply(variables, pictures)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(variables), state, variables)
        return optax.apply_updates(variables, updates), state

    with real.batches() as batches:
        for _, batch in zip(range(config["steps"]), batches, strict=False):
            variables, state = step(variables, state, batch["pixels"][:, 0], batch["label"])
    return variables


def _accuracy(module: Classifier, variables, data: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    predict = platform.jit(lambda variables, pictures: module.apply(variables, pictures)[0].argmax(axis=-1))
    right, seen = 0, 0
    with Pipeline(_with_batches(data, config["batch_size"]), split="held_out").batches() as batches:
        for batch in batches:
            guessed = np.asarray(predict(variables, batch["pixels"][:, 0]))
            right += int(((guessed == batch["label"]) & batch["valid"]).sum())
            seen += int(batch["valid"].sum())
            if seen >= config["held_out"]:
                break
    return right / max(seen, 1)
