"""The weight of the adversarial loss, chosen at the last layer, with one backward pass through the generator.

VQGAN (https://arxiv.org/abs/2012.09841, equation 7) scales the adversarial loss by
``lambda = |grad_L reconstruction| / (|grad_L adversarial| + eps)``, where ``L`` is the decoder's last kernel. Written
over parameter gradients that takes two backward passes. Written over cotangents of the reconstruction it takes one:
both losses depend on the parameters only through the reconstruction ``y``, so their gradients at the last kernel are
two cheap pulls, and one full pull of the balanced cotangent ``c_rec + lambda * c_gan`` gives the gradient of
everything::

    (y, auxiliary), pull = jax.vjp(model, params)
    c_rec, c_gan = jax.grad(reconstruction_loss)(y), jax.grad(generator_loss)(y)
    gradients, state = balanced_pull(
        pull, balance, state, reconstruction=c_rec, gan=c_gan, last_layer=spec.last_layer, active=schedule(step),
        auxiliary=auxiliary,
    )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..errors import unknown

Array = jax.Array
PyTree = Any


class BalanceState(NamedTuple):
    """The weight of the last step, before the schedule's factor, for the log; float32 scalar."""

    weight: Array


def adaptive_weight(
    weight: float = 1.0, *, epsilon: float = 1e-4, maximum: float = 1e4
) -> optax.GradientTransformationExtraArgs:
    """Adds the adversarial cotangent, weighted by the ratio of the two gradient norms at the last layer.

    ``lambda = weight * clip(|k_rec| / (|k_gan| + epsilon), 0, maximum)``: the clip comes before ``weight``.

    The transformation works on cotangents of the reconstruction, not on parameter gradients. Its ``update`` takes
    ``updates`` = the cotangent of the reconstruction loss, and as extra arguments ``gan``, the cotangent of the
    generator's adversarial loss (same tree); ``last = (k_rec, k_gan)``, the gradients of the two losses at the last
    layer; and ``active``, the factor of the schedule (see `starting_at`). It returns ``updates + lambda * active *
    gan``. The weight is computed, and kept in the state, also while ``active`` is 0. Place it before anything that
    accumulates steps.
    """

    def choose(last: tuple[PyTree, PyTree]) -> Array:
        reconstruction, gan = (optax.tree.norm(_as_float32(gradient)) for gradient in last)
        return weight * jnp.clip(reconstruction / (gan + epsilon), 0.0, maximum)

    return _balance(choose)


def constant_weight(weight: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """`adaptive_weight` with a fixed weight: the same arguments and state, and ``last`` is dead code under jit."""

    def choose(last: tuple[PyTree, PyTree]) -> Array:
        del last
        return jnp.asarray(weight, jnp.float32)

    return _balance(choose)


def starting_at(start: int, factor: float = 1.0) -> optax.Schedule:
    """The ``active`` schedule of VQGAN: 0 before step ``start``, ``factor`` from it on."""

    def schedule(step: Array | int) -> Array:
        return jnp.where(jnp.asarray(step) < start, 0.0, factor).astype(jnp.float32)

    return schedule


def balanced_pull(
    pull: Callable[[tuple[Array, Array]], tuple[PyTree]],
    balance: optax.GradientTransformationExtraArgs,
    state: BalanceState,
    *,
    reconstruction: Array,
    gan: Array,
    last_layer: str,
    active: Array | float,
    auxiliary: Array,
    reference: Array | None = None,
) -> tuple[PyTree, BalanceState]:
    """Gradient of ``reconstruction loss + lambda * active * adversarial loss + auxiliary`` for the parameters.

    Call it under `jax.jit`: the two pulls that feed the weight are read at one kernel, and the compiler drops the rest
    of them. Keep the last layer outside `jax.checkpoint`, which may recompute what it wraps for each pull.

    Args:
      pull: from ``jax.vjp(model, params)``, where ``model(params)`` returns ``(reconstruction, auxiliary)``: pixels,
        and the weighted sum of the losses that do not go through the pixels (commitment, KL, ...).
      balance: `adaptive_weight` or `constant_weight`.
      state: its state, from ``balance.init(reconstruction)``.
      reconstruction: cotangent of the reconstruction loss at the reconstruction (pixel, perceptual, ... terms
        together).
      gan: cotangent of the generator's adversarial loss there, same shape.
      last_layer: path of the kernel in ``params``, e.g. ``"decoder/conv_out/kernel"`` (`Spec.last_layer`).
      active: the schedule's factor of this step.
      auxiliary: the second output of ``model(params)``; only its shape and dtype are read.
      reference: cotangent, there too, of the loss whose gradient is compared with the adversarial one; ``None`` is
        ``reconstruction``.

    Returns:
      (gradients, the tree of ``params``; new state).
    """
    zero, one = jnp.zeros_like(auxiliary), jnp.ones_like(auxiliary)
    compared = (reconstruction if reference is None else reference, gan)
    at_last_layer = tuple(parameter(pull((cotangent, zero))[0], last_layer) for cotangent in compared)
    cotangent, state = balance.update(reconstruction, state, gan=gan, last=at_last_layer, active=active)
    (gradients,) = pull((cotangent, one))
    return gradients, state


def parameter(params: Mapping[str, Any], path: str) -> Array:
    """The leaf of nested dictionaries at a path such as ``"decoder/conv_out/kernel"``."""
    node: Any = params
    parents: list[str] = []
    for name in path.split("/"):
        if not isinstance(node, Mapping) or name not in node:
            here = node if isinstance(node, Mapping) else {}
            raise unknown("parameter path", path, ["/".join([*parents, str(key)]) for key in here])
        node = node[name]
        parents.append(name)
    if isinstance(node, Mapping):
        raise unknown("parameter path", path, [f"{path}/{key}" for key in node])
    return node


def _balance(choose: Callable[[tuple[PyTree, PyTree]], Array]) -> optax.GradientTransformationExtraArgs:
    def init(updates: PyTree) -> BalanceState:
        del updates
        return BalanceState(weight=jnp.zeros((), jnp.float32))

    def update(
        updates: PyTree,
        state: BalanceState,
        params: PyTree | None = None,
        *,
        gan: PyTree,
        last: tuple[PyTree, PyTree],
        active: Array | float = 1.0,
        **extra_args: Any,
    ) -> tuple[PyTree, BalanceState]:
        del state, params, extra_args
        chosen = choose(last)
        balanced = jax.tree.map(lambda c, g: c + (chosen * active * g).astype(c.dtype), updates, gan)
        return balanced, BalanceState(weight=chosen)

    return optax.GradientTransformationExtraArgs(init, update)


def _as_float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
