"""Optimizers and schedules, as optax transformations, from a ConfigDict."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import errors
from ..parallel.rules import path_name


def schedule(config: Mapping, steps: int) -> optax.Schedule:
    """Learning rate over the run: linear warm-up, then ``constant``, ``steps``, or ``cosine`` or ``linear`` to an end.

    Args:
      config: ``lr``, ``warmup`` (steps), ``warmup_from`` (fraction of ``lr`` at the first step; ``None`` is one step of
        the way), ``schedule``, ``flat`` (steps behind the warm-up before the fall of cosine and linear), ``end``
        (fraction of ``lr`` reached at the last step), ``drops`` (steps at which it falls to a tenth, for ``steps``).
        ``cosine_all`` is half a cosine over the whole run whose beginning the warm-up, from 0, takes the place of
        (timm's ``CosineLRScheduler`` as it is by default).
      steps: length of the run.
    """
    lr, warmup, end, flat = config["lr"], config["warmup"], config["end"], config["flat"]
    if (config["schedule"] == "steps") != bool(config["drops"]):
        raise ValueError(f"drops={tuple(config['drops'])} go with schedule='steps', not {config['schedule']!r}.")
    if config["schedule"] == "cosine_all":
        whole = optax.cosine_decay_schedule(lr, max(steps, 1), alpha=end)
        # After the run as well, where a warm-up as long as the run has ended.
        return lambda step: jnp.where(step < warmup, lr * step / max(warmup, 1), whole(step))
    rest = max(steps - warmup - flat, 1)
    kinds = {
        "constant": optax.constant_schedule(lr),
        "steps": optax.piecewise_constant_schedule(lr, {int(step) - warmup: 0.1 for step in config["drops"]}),
        "cosine": optax.cosine_decay_schedule(lr, rest, alpha=end),
        "linear": optax.linear_schedule(lr, lr * end, rest),
    }
    after = errors.pick("learning-rate schedule", config["schedule"], kinds | {"cosine_all": None})
    if flat and config["schedule"] in ("cosine", "linear"):
        after = optax.join_schedules([optax.constant_schedule(lr), after], [flat])
    if not warmup:
        return after
    start = lr / (warmup + 1) if config["warmup_from"] is None else lr * config["warmup_from"]
    return optax.join_schedules([optax.linear_schedule(start, lr, warmup), after], [warmup])


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, bit for bit; ``update(..., finite=)`` leaves the moments as they are if that is false.

    What is chosen after the update, by a ``where`` between new and old state, is written twice: parameters are read off
    the new moments before these are known to count. On a CPU that took a quarter of the memory of VTP-L's step.
    """

    def update(grads, state, params=None, *, finite: jax.Array | bool = True, **_):
        del params
        count = jnp.where(finite, optax.safe_increment(state.count), state.count)
        mu = held(finite, optax.tree.update_moment(grads, state.mu, b1, 1), state.mu)
        nu = held(finite, optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2), state.nu)
        steps = optax.safe_increment(state.count)  # never 0, which would divide by 0
        mean, square = (optax.tree.bias_correction(m, b, steps) for m, b in ((mu, b1), (nu, b2)))
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def _adam(config, rate):
    adam = _scale_by_adam(config["b1"], config["b2"], config["eps"])
    return optax.chain(adam, optax.scale_by_learning_rate(rate))


def _adamw(config, rate):
    adam = _scale_by_adam(config["b1"], config["b2"], config["eps"])
    decay = optax.add_decayed_weights(config["weight_decay"], _decayed(config["decay"], tuple(config["undecayed"])))
    return optax.chain(adam, decay, optax.scale_by_learning_rate(rate))


OPTIMIZERS = {"adam": _adam, "adamw": _adamw}


def _kernels(params: Any) -> Any:
    """Matrices and convolution kernels, not biases, norms and embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: path_name(path).endswith("kernel"), params)


def _everything(params: Any) -> Any:
    return jax.tree.map(lambda leaf: True, params)


DECAYED = {"kernels": _kernels, "all": _everything}


def _decayed(kind: str, except_for: tuple[str, ...]) -> Callable[[Any], Any]:
    """``params -> tree of bools``: which of them decay."""
    chosen = errors.pick("set of parameters that weight decay acts on", kind, DECAYED)

    def mask(params: Any) -> Any:
        matched = _matches(params, except_for, "undecayed")
        return jax.tree.map(lambda decays, match: decays and not match, chosen(params), matched)

    return mask


def make(config: Mapping, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer: clip the global norm, step, leave parameters that match ``frozen`` alone.

    Args:
      config: ``name`` (adam, adamw), the fields of `schedule`, ``b1``, ``b2``, ``eps``, ``weight_decay``,
        ``decay`` (what that acts on: kernels, all) but for ``undecayed`` (regular expressions over parameter paths),
        ``clip`` (largest global gradient norm; 0 = no clipping), ``frozen`` (likewise expressions).
      steps: length of the run.
    """
    make_step = errors.pick("optimizer", config["name"], OPTIMIZERS)
    if config["weight_decay"] and config["name"] != "adamw":
        raise ValueError(f"weight_decay={config['weight_decay']} needs optimizer 'adamw', not {config['name']!r}.")
    for name in ("lr", "clip", "weight_decay", "warmup", "flat", "end"):
        if config[name] < 0:
            raise ValueError(f"optimizer.{name}={config[name]} must be at least 0.")
    rate = schedule(config, steps)
    parts = [_clip(config["clip"])] if config["clip"] else []
    chain = optax.chain(*parts, make_step(config, rate))
    frozen = tuple(config["frozen"])
    if frozen:
        chain = optax.partition({"train": chain, "freeze": optax.set_to_zero()}, lambda params: _labels(params, frozen))
    return chain, rate


def finite(metrics: Mapping[str, jax.Array]) -> jax.Array:
    """Whether a step counts: none of its losses and lengths of gradients is infinite or NaN."""
    watched = [value for name, value in metrics.items() if name.startswith(("loss/", "grad_norm/"))]
    return jnp.all(jnp.isfinite(jnp.stack(watched)))


def held(finite: jax.Array | bool, new: Any, old: Any) -> Any:
    """The new tree if the step counts, else the old one."""
    return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)


def descend(
    optimizer: optax.GradientTransformation, grads: Any, state: Any, params: Any, finite: jax.Array | bool = True
) -> tuple[Any, Any]:
    """(parameters, optimizer's state) after a step of it, or as they were if the step does not count."""
    updates, new = optax.with_extra_args_support(optimizer).update(grads, state, params, finite=finite)

    def kept(after, before):  # moments were held where they were made
        return after if isinstance(after, optax.ScaleByAdamState) else held(finite, after, before)

    new = jax.tree.map(kept, new, state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))
    return held(finite, optax.apply_updates(params, updates), params), new


def global_norm(tree: Any) -> jax.Array:
    """Length of all arrays of a tree as one vector, float32.

    `optax.tree.norm`, as products of arrays with themselves: on a CPU the sums of squares of a large model's gradients
    took a fifteenth of its step.
    """

    def squared(x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim))  # not flattened, which would gather what is split over devices
        return jax.lax.dot_general(x, x, ((axes, axes), ((), ())), jax.lax.Precision.HIGHEST, jnp.float32)

    return jnp.sqrt(sum((squared(leaf) for leaf in jax.tree.leaves(tree)), jnp.zeros(())))


def _clip(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by that norm, which the log wants too, so that it is computed once."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        norm = global_norm(updates)
        return jax.tree.map(lambda x: jnp.where(norm < limit, x, x / norm.astype(x.dtype) * limit), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def hold(params: Any, frozen: tuple[str, ...]) -> Any:
    """The same parameters, of which those that match ``frozen`` pass no gradient: nothing of it is computed."""
    if not frozen:
        return params
    held = _matches(params, frozen, "frozen")
    return jax.tree.map(lambda p, match: jax.lax.stop_gradient(p) if match else p, params, held)


def _labels(params: Any, frozen: tuple[str, ...]) -> Any:
    return jax.tree.map(lambda match: "freeze" if match else "train", _matches(params, frozen, "frozen"))


def _matches(params: Any, patterns: tuple[str, ...], field: str) -> Any:
    """Which parameters one of the patterns describes; each must describe some."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"optimizer.{field} pattern {pattern!r} matches no parameter, e.g. {names[:3]}.")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.search(pattern, path_name(path)) for pattern in patterns), params
    )


def ema_update(
    ema: Any, params: Any, decay: float, step: jax.Array, warmup: bool, finite: jax.Array | bool = True
) -> Any:
    """``ema = d ema + (1 - d) params``.

    Args:
      ema: running average, same tree as ``params``.
      params: parameters after the optimizer step.
      decay: d.
      step: steps done before this one.
      warmup: use ``min(d, (1 + n) / (10 + n))`` with n = step + 1, as LitEma does: short runs forget their start.
      finite: whether the step counts; if not, the average stays as it is.
    """
    count = (step + 1).astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + count) / (10 + count)) if warmup else jnp.float32(decay)
    # Written as a difference: the average of a parameter that stays as it is keeps every bit.
    return follow(ema, params, jnp.where(finite, 1 - rate, 0.0))


def follow(averages: Any, params: Any, rate: jax.Array) -> Any:
    """Averages that come nearer by a share ``rate`` of the way."""
    return jax.tree.map(lambda average, new: average + rate * (new - average), averages, params)
