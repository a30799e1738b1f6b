"""The recipe of a generator of latents: flow matching, as LightningDiT is trained (https://arxiv.org/abs/2501.01423)."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..data.latents import LatentFolder
from ..generators import generator
from ..generators.flow import Flow
from ..parallel import platform
from ..parallel.constrain import whole
from . import checkpoint, optim
from .objective import Metrics
from .state import TrainState, new_state
from .step import mean_over_micro_batches, micro_batches


def resolve(config: Mapping) -> Mapping:
    """The config with the shape and classes of its latents in ``config.model``; other ones there are refused."""
    folder = LatentFolder(config["data"]["path"])
    given = dict(config["model"])
    for name, value in {"grid": list(folder.shape[:2]), "channels": folder.shape[2], "classes": folder.classes}.items():
        if given.setdefault(name, value) != value:
            raise ValueError(f"config.model.{name}={given[name]}, but the latents in {folder.path} have {value}.")
    return dict(config) | {"model": given}


def build(config: Mapping) -> Matching:
    """The recipe of a resolved config."""
    settings = dict(config["flow"])
    uniform_from = settings.pop("uniform_from")
    optimizer, rate = optim.make(config["optimizer"], config["steps"])
    return Matching(
        model=_module(config["model"], dtype=platform.compute_dtype(config["precision"])),
        flow=Flow(**settings),
        optimizer=optimizer,
        learning_rate=rate,
        seed=config["seed"],
        ema_decay=config["ema_decay"],
        ema_warmup=config["ema_warmup"],
        accumulate=config["accumulate"],
        uniform_from=uniform_from,
    )


def _module(fields: Mapping, **more: Any) -> nn.Module:
    fields = dict(fields)
    return generator.build(fields.pop("name"), **fields, **more)


def weights(config: Mapping) -> Mapping[str, Any]:
    """Variables of ``config.init_from``: another run, or an official weight file."""
    source = pathlib.Path(config["init_from"]).expanduser()
    if source.is_dir():
        return load(source).variables
    fields = dict(config["model"])
    return generator.load(source, fields.pop("name"), **fields).variables


def load(run: str | pathlib.Path, step: int | None = None) -> generator.Generator:
    """The generator of a run: the average of its weights, in float32; ``step`` is by default the latest."""
    fields = checkpoint.read_config(run)["model"]
    module = _module(fields)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), generator.shapes(module)["params"]
    )
    found = checkpoint.load_weights(run, {"ema": target}, step)
    return generator.Generator(module, {"params": found["ema"]}, fields["name"])


@dataclasses.dataclass(frozen=True)
class Matching:
    """A network that predicts velocities of latents, given their class.

    Attributes:
      model: ``(latents, times, labels, train) -> prediction``, with rng stream ``dropout``.
      flow: what it predicts, and which times it sees.
      optimizer, learning_rate: of all its parameters.
      seed: of weights, noise, times and hidden labels.
      ema_decay, ema_warmup: of the average of its parameters.
      accumulate: micro-batches per step.
      uniform_from: step from which times are drawn uniformly; ``None`` is never.
    """

    model: nn.Module
    flow: Flow
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    seed: int
    ema_decay: float
    ema_warmup: bool
    accumulate: int = 1
    uniform_from: int | None = None

    @property
    def networks(self) -> Mapping[str, Any]:
        return {}

    @property
    def program(self) -> Any:
        return self.flow

    def initialize(self) -> TrainState:
        params = {"model": self.model.init(jax.random.key(self.seed), *self.model.example())["params"]}
        ema = jax.tree.map(jnp.copy, params["model"])
        return new_state(params, {}, ema, self.optimizer.init(params), None)

    def at(self, step: int) -> Matching:
        """Two programs at most: times are drawn otherwise from some step on."""
        if self.uniform_from is None or step < self.uniform_from:
            return self
        return dataclasses.replace(self, flow=dataclasses.replace(self.flow, time_std=None))

    def settled(self, state: TrainState) -> TrainState:
        return state

    def summary(self) -> list[str]:
        return []

    def told(self) -> list[str]:
        return ["uniform times"] if self.flow.time_std is None else []

    def check(self, shape: tuple[int, ...]) -> None:
        wanted = (*self.model.grid, self.model.channels)
        if shape[1:] != wanted:
            raise ValueError(f"the generator is one of latents {wanted}, the data have {shape[1:]}.")

    def frames(self, inputs: Mapping[str, jax.Array]) -> int:
        return len(inputs["label"])

    def inputs_of(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "latents": jax.ShapeDtypeStruct(shape, jnp.float32),
            "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32),
        }

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"latents": batch["latents"], "label": batch["label"]}

    def update(
        self, state: TrainState, networks: Mapping[str, Any], inputs: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """``inputs`` are float32 ``latents (B, h, w, C)``, normalized, and int32 ``label (B,)``."""
        noise_key, time_key, dropout_key = jax.random.split(key, 3)
        arrays = {
            "data": inputs["latents"],
            "label": inputs["label"],
            "noise": jax.random.normal(noise_key, inputs["latents"].shape),
            "t": self.flow.draw_times(time_key, len(inputs["label"])),
        }
        grads, metrics = self.gradients(state.params, arrays, dropout_key)
        metrics["grad_norm/generator"] = optim.global_norm(grads)
        finite = optim.finite(metrics)
        params, optimizer = optim.descend(self.optimizer, grads, state.optimizer, state.params, finite)
        ema = optim.ema_update(state.ema, params["model"], self.ema_decay, state.step, self.ema_warmup, finite)
        return state.replace(params=params, ema=ema, optimizer=optimizer), metrics

    def gradients(self, params: Any, arrays: Mapping[str, jax.Array], key: jax.Array) -> tuple[Any, Metrics]:
        """Gradients and metrics, means over the micro-batches."""

        def part(carry, inputs):
            arrays, number = inputs
            loss = jax.value_and_grad(self._loss, has_aux=True)
            (_, metrics), grads = loss(params, arrays, jax.random.fold_in(key, number))
            return carry, (grads, metrics)

        return mean_over_micro_batches(part, (), micro_batches(arrays, self.accumulate))[1]

    def _loss(self, params: Any, arrays: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Metrics]:
        x, _ = self.flow.mix(arrays["data"], arrays["noise"], arrays["t"])
        predicted = self.model.apply(
            {"params": whole(params["model"])}, x, arrays["t"], arrays["label"], train=True, rngs={"dropout": key}
        )
        parts = self.flow.losses(predicted, arrays["data"], arrays["noise"], arrays["t"])
        means = {name: values.mean() for name, values in parts.items()}
        total = sum(means.values())
        return total, {f"loss/{name}": value for name, value in means.items()} | {"loss/generator": total}
