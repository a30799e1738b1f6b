"""Numbers of a run that change with the step: weights of the bottleneck's loss terms, and fields of modules.

``config.schedules.loss.<term>`` replaces ``config.loss.bottleneck.<term>``. ``config.schedules.model.<field>`` replaces
a field of every module of the model that names it in its class attribute ``SCHEDULED``; while training, such a module
finds the number in the collection ``schedule`` (`quantize.scheduled`). Each entry is a ``base.schedule(...)``: a pure
function of the step, so nothing is added to checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from .. import errors, registry


def _cosine(config: Mapping) -> optax.Schedule:
    start, end, steps = config["start"], config["end"], config["steps"]
    return lambda t: end + (start - end) / 2 * (1 + jnp.cos(jnp.pi * jnp.clip(t / steps, 0.0, 1.0)))


def _linear(config: Mapping) -> optax.Schedule:
    start, end, steps = config["start"], config["end"], config["steps"]
    return lambda t: start + (end - start) * jnp.clip(t / steps, 0.0, 1.0)


def _exponential(config: Mapping) -> optax.Schedule:
    start, end, steps = config["start"], config["end"], config["steps"]
    if min(start, end) <= 0:
        raise ValueError(f"an exponential schedule runs between positive numbers, got start={start}, end={end}.")
    return lambda t: start * (end / start) ** jnp.clip(t / steps, 0.0, 1.0)


def _piecewise(config: Mapping) -> optax.Schedule:
    points = [tuple(point) for point in config["points"]]
    steps = [point[0] for point in points]
    if not points or any(len(point) != 2 for point in points) or steps != sorted(set(steps)):
        raise ValueError(f"a piecewise schedule needs points (step, value) in order of their steps, got {points}.")
    values = jnp.asarray([value for _, value in points], jnp.float32)
    return lambda t: jnp.interp(t, jnp.asarray(steps, jnp.float32), values)


# From ``start`` to ``end`` over ``steps`` steps and then constant, or straight lines between ``points``.
KINDS = {"cosine": _cosine, "linear": _linear, "exponential": _exponential, "piecewise": _piecewise}


def schedule(config: Mapping) -> optax.Schedule:
    """``step -> float32 value`` of one ``base.schedule``.

    Before its first step, ``begin``, it follows the straight lines between ``points``, or has its first value.

    Raises:
      ValueError: for an unknown kind, and for numbers that make no schedule.
    """
    if config["steps"] < 1 or config["begin"] < 0:
        raise ValueError(f"a schedule needs steps >= 1 and begin >= 0, got {config['steps']} and {config['begin']}.")
    run = errors.pick("kind of schedule", config["kind"], KINDS)(config)

    def value(step: jax.Array) -> jax.Array:
        return jnp.float32(run(jnp.maximum(jnp.float32(step) - config["begin"], 0.0)))

    if not config["points"] or config["kind"] == "piecewise":
        return value
    before = _piecewise(config)
    return lambda step: jnp.where(step < config["begin"], before(step), value(step))


@dataclasses.dataclass(frozen=True)
class Schedules:
    """All schedules of a run.

    Attributes:
      loss: by term of the bottleneck.
      model: by path of the module's variables and its field.
    """

    loss: Mapping[str, optax.Schedule] = dataclasses.field(default_factory=dict)
    model: Mapping[tuple[str, ...], optax.Schedule] = dataclasses.field(default_factory=dict)

    def weights(self, step: jax.Array) -> dict[str, jax.Array]:
        """Weights of loss terms at a step, for those that have a schedule."""
        return {name: value(step) for name, value in self.loss.items()}

    def variables(self, step: jax.Array) -> dict[str, Any]:
        """The collection that scheduled modules read, or nothing."""
        tree: dict[str, Any] = {}
        for (*path, field), value in self.model.items():
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[field] = value(step)
        return {"schedule": tree} if tree else {}

    def metrics(self, step: jax.Array) -> dict[str, jax.Array]:
        """What to log: the value of every schedule."""
        fields = {path[-1]: value for path, value in self.model.items()}
        return {f"schedule/{name}": value(step) for name, value in (fields | dict(self.loss)).items()}


def build(config: Mapping, model: nn.Module, weights: Mapping[str, float]) -> Schedules:
    """The schedules of ``config.schedules``.

    Args:
      config: ``{"loss": {term: schedule}, "model": {field: schedule}}``.
      model: whose modules have the fields.
      weights: ``config.loss.bottleneck``, which must have the terms.

    Raises:
      ValueError: for a term without a weight, and for a field that no module of the model declares.
    """
    for term in config["loss"]:
        if term not in weights:
            raise errors.unknown("scheduled loss term (config.loss.bottleneck has no such weight)", term, weights)
    loss = {term: schedule(entry) for term, entry in config["loss"].items()}
    if not config["model"]:
        return Schedules(loss)
    places = _scheduled_fields(model)
    fields = sorted({place[-1] for place in places})
    for field in config["model"]:
        if field not in fields:
            raise errors.unknown("field of the model that may follow a schedule", field, fields)
    entries = {field: schedule(entry) for field, entry in config["model"].items()}
    return Schedules(loss, {place: entries[place[-1]] for place in places if place[-1] in entries})


def _scheduled_fields(model: nn.Module) -> list[tuple[str, ...]]:
    """Path of the variables, and the field, for every field of every module in use that may follow a schedule."""
    found = {}

    def visit(call, args, kwargs, context):
        if context.module.scope is not None:
            for field in getattr(type(context.module), "SCHEDULED", ()):
                found[(*context.module.path, field)] = None
        return call(*args, **kwargs)

    with nn.intercept_methods(visit):
        registry.abstract_variables(model)
    return list(found)
