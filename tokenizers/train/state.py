"""Everything a training run carries from one step to the next, as one pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class AdversaryState:
    """The discriminator's side.

    Attributes:
      params: its parameters.
      statistics: its mutable collections (batch-norm statistics).
      ema: exponential moving average of ``params``, or ``None``.
      optimizer: optax state of its own optimizer.
      lecam: running means of its logits on real and reconstructed pixels.
      balance: state of the adaptive weight (the last lambda).
    """

    params: Any
    statistics: Any
    ema: Any
    optimizer: Any
    lecam: Any
    balance: Any


@struct.dataclass
class TrainState:
    """The whole run. No random key is stored: step k draws from ``fold_in(key(seed), k)``.

    Attributes:
      step: int32 scalar, steps done (a skipped update counts: its data is used up).
      params: ``{"model": ..., "objective": ...}``, float32.
      model_state: the model's mutable collections (codebook statistics).
      ema: exponential moving average of ``params["model"]``.
      optimizer: optax state.
      adversary: `AdversaryState`, or ``None`` without a discriminator.
      teacher: what a model distils itself from, or ``None``.
      skipped: int32 scalar, updates skipped because a loss or gradient was not finite.
      skipped_in_a_row: int32 scalar, how many of the latest steps were.
    """

    step: jax.Array
    params: Any
    model_state: Any
    ema: Any
    optimizer: Any
    adversary: AdversaryState | None
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    teacher: Any = None


def new_state(params, model_state, ema, optimizer, adversary) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, model_state, ema, optimizer, adversary, zero, zero)
