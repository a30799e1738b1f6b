"""One training step of any recipe, as one pure function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import pixels
from ..parallel import platform
from . import optim
from .objective import Metrics
from .state import TrainState


class Trainable(Protocol):
    """What the loop asks of a recipe: all that a step needs to know and that never changes during a run.

    Attributes:
      model: the network.
      seed: of the run.
      accumulate: micro-batches per step.
      learning_rate: of the optimizer, by its updates.
      networks: variables of frozen networks by name; an argument of the jitted step, not constants in it.
      program: hashable; recipes of two steps that differ in it are different programs.
    """

    model: nn.Module
    seed: int
    accumulate: int
    learning_rate: optax.Schedule

    @property
    def networks(self) -> Mapping[str, Any]: ...

    @property
    def program(self) -> Any: ...

    def initialize(self) -> TrainState:
        """The state before the first step; runs under jit."""

    def settled(self, state: TrainState) -> TrainState:
        """The first state after its parameters came from elsewhere: what follows from them, anew."""

    def summary(self) -> list[str]:
        """Lines for the start of the run."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses global batches of a shape that the network does not take, with a ``ValueError``."""

    def frames(self, inputs: Mapping[str, jax.Array]) -> int:
        """How many pictures a batch stands for, frames of clips counted one by one."""

    def told(self) -> list[str]:
        """What to say of this program, beside the shapes of its inputs."""

    def at(self, step: int) -> Trainable:
        """The recipe of the program for that step."""

    def inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Of a batch of this process, the arrays that a step reads; the first axis is that of the batch."""

    def inputs_of(self, shape: tuple[int, ...]) -> Mapping[str, jax.ShapeDtypeStruct]:
        """`inputs` of a global batch of that shape."""

    def update(
        self, state: TrainState, networks: Mapping[str, Any], inputs: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """The state after one step, but for its counters, and metrics.

        Of these, ``loss/...`` and ``grad_norm/...`` must be finite for the step to count (`optim.finite`); if they are
        not, all is to stay as it was (`optim.descend`, `optim.held`).
        """


class OfPixels:
    """What recipes of tokenizers have in common: batches of pixels ``(B, T, H, W, C)``."""

    def check(self, shape: tuple[int, ...]) -> None:
        seen = shape if self.model.spec.video else (shape[0] * shape[1], *shape[2:])
        pixels.fitted(self.model.spec, getattr(self.model, "input_size", None), seen, strict=True)

    def frames(self, inputs: Mapping[str, jax.Array]) -> int:
        return math.prod(inputs["pixels"].shape[:2])

    # For pictures of held-out items (`preview`): what it needs of a batch, the networks that it reads, and what the
    # decoder is given beside latents.
    reads: tuple[str, ...] = ()

    def shown(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"pixels": np.ascontiguousarray(batch["pixels"])}

    def text(self, networks: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {}


def make_step(recipe: Trainable) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
    """``step(state, networks, inputs) -> (state, metrics)``.

    A step whose loss or gradient is not finite changes nothing but the counters.
    """

    def step(state: TrainState, networks, inputs):
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        new, metrics = recipe.update(state, networks, inputs, key)
        finite = optim.finite(metrics)
        new = new.replace(
            step=state.step + 1,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics |= {
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
            "learning_rate": recipe.learning_rate(state.step - state.skipped),  # the optimizer counts its updates
        }
        return new, metrics

    return step


def micro_batches(batch: Mapping[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """(B, ...) -> (parts, B / parts, ...): micro-batch i takes every parts-th item, so that each stays spread out."""

    def split(array: jax.Array) -> jax.Array:
        if array.shape[0] % parts:
            raise ValueError(f"a batch of {array.shape[0]} cannot be accumulated in {parts} equal parts.")
        return jnp.moveaxis(array.reshape(-1, parts, *array.shape[1:]), 1, 0)

    return {name: split(array) for name, array in batch.items()}


def mean_over_micro_batches(
    body: Callable[[Any, tuple[Any, Any]], tuple[Any, Any]], carry: Any, micro: Mapping[str, jax.Array]
) -> tuple[Any, Any]:
    """Runs ``body(carry, (micro-batch, its number))`` over all, in order.

    Returns:
      The last carry, and the mean of the outputs.
    """
    first, count = jax.tree.map(lambda array: array[0], micro), len(jax.tree.leaves(micro)[0])
    if count == 1:
        return body(carry, (first, 0))

    def accumulate(state, inputs):
        carry, total = state
        carry, outputs = body(carry, inputs)
        return (carry, jax.tree.map(jnp.add, total, outputs)), None

    shapes = jax.eval_shape(body, carry, (first, 0))[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (carry, total), _ = platform.scan(accumulate, (carry, zeros), (micro, jnp.arange(count)))
    return carry, jax.tree.map(lambda leaf: leaf / count, total)
