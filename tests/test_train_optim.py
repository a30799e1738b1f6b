"""Schedules, clipping, weight decay, frozen parameters and the moving average."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from tokenizers.train import optim


def make(steps=10, **fields):
    return optim.make(base.optimizer(**fields), steps)


def updated(transformation, params, grads, steps=1):
    state = transformation.init(params)
    for _ in range(steps):
        updates, state = transformation.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_schedules_reach_their_values():
    warm = {"lr": 1.0, "warmup": 3}
    values = lambda steps, **fields: [float(make(steps, **fields)[1](k)) for k in range(steps + 1)]  # noqa: E731
    # Warm-up starts above 0, so that the first step is not lost, and reaches lr when it ends.
    np.testing.assert_allclose(values(5, **warm), [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(values(7, schedule="linear", end=0.2, **warm)[3:], [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    cosine = values(7, schedule="cosine", end=0.1, **warm)
    np.testing.assert_allclose([cosine[3], cosine[5], cosine[7]], [1, 0.55, 0.1], rtol=1e-6)
    np.testing.assert_allclose(values(4, lr=1.0, schedule="cosine")[-1], 0.0, atol=1e-7)


def test_gradients_are_clipped_by_their_global_norm():
    params, grads = {"a": jnp.zeros(2), "b": jnp.zeros(1)}, {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    # With eps far above the gradient Adam's first step is lr * g / eps: proportional to what the clipping left.
    moved = updated(make(lr=1.0, clip=1.0, eps=1e3)[0], params, grads)
    np.testing.assert_allclose(moved["a"], [-0.6e-3, 0], rtol=1e-2)
    np.testing.assert_allclose(moved["b"], [-0.8e-3], rtol=1e-2)
    free = updated(make(lr=1.0, clip=0.0, eps=1e3)[0], params, grads)
    np.testing.assert_allclose(free["b"], [-4e-3], rtol=1e-2)


@pytest.mark.parametrize("limit", [0.5, 50.0])
def test_the_norm_and_its_clipping_are_those_of_optax(limit):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"kernel": (3, 3, 4, 5), "bias": (5,), "logit_scale": ()}
    grads = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    chex.assert_trees_all_close(optim.global_norm(grads), optax.tree.norm(grads), rtol=1e-6)
    ours, theirs = optim.make(base.optimizer(clip=limit, eps=1e3), 1)[0], optax.clip_by_global_norm(limit)
    unclipped = optim.make(base.optimizer(clip=0.0, eps=1e3), 1)[0]
    expected = theirs.update(grads, theirs.init(grads))[0]
    zeros = jax.tree.map(jnp.zeros_like, grads)
    chex.assert_trees_all_close(updated(ours, zeros, grads), updated(unclipped, zeros, expected), rtol=1e-5)


OPTIMIZERS = {
    "adam": ({"name": "adam"}, lambda rate, b: optax.adam(rate, **b)),
    "adamw": (
        {"name": "adamw", "weight_decay": 0.1, "decay": "all"},
        lambda rate, b: optax.adamw(rate, weight_decay=0.1, **b),
    ),
}


def wild(seed, shape=(4, 5)):
    """Values of very different sizes."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"kernel": jax.random.normal(keys[0], shape) * 10 ** (4 * jax.random.normal(keys[1], shape) - 4)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_those_of_optax_bit_for_bit(name):
    fields, theirs = OPTIMIZERS[name]
    betas = {"b1": 0.5, "b2": 0.9, "eps": 1e-6}
    ours, rate = make(**fields, **betas, lr=1e-2, warmup=3, clip=0.0)
    theirs, params = theirs(rate, betas), wild(0)
    state, expected, expected_state = ours.init(params), params, theirs.init(params)
    step = jax.jit(lambda grads, state, params: optim.descend(ours, grads, state, params, jnp.bool_(True)))

    @jax.jit
    def reference(grads, state, params):
        updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(1, 6):
        params, state = step(wild(number), state, params)
        expected, expected_state = reference(wild(number), expected_state, expected)
        chex.assert_trees_all_equal(params, expected)
        chex.assert_trees_all_equal(jax.tree.leaves(state), jax.tree.leaves(expected_state))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_does_not_count_leaves_parameters_moments_and_counters(name):
    optimizer, _ = make(**OPTIMIZERS[name][0], lr=1e-2, warmup=3, frozen=("bias",))
    params = wild(0) | {"bias": jnp.ones(5)}
    grads = wild(1) | {"bias": jnp.ones(5)}
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
    first = optimizer.init(params)
    chex.assert_trees_all_equal(optim.descend(optimizer, bad, first, params, jnp.bool_(False)), (params, first))
    after = optim.descend(optimizer, grads, first, params, jnp.bool_(True))
    assert np.any(after[0]["kernel"] != params["kernel"])
    held = optim.descend(optimizer, bad, after[1], after[0], jnp.bool_(False))
    chex.assert_trees_all_equal(held, after)


def test_weight_decay_acts_on_kernels_or_on_all():
    params = {"conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved = updated(make(name="adamw", lr=0.1, weight_decay=0.5)[0], params, zeros)
    np.testing.assert_allclose(moved["conv"]["kernel"], 0.95 * np.ones((2, 2)), rtol=1e-6)
    chex.assert_trees_all_equal((moved["conv"]["bias"], moved["norm"]), (params["conv"]["bias"], params["norm"]))
    moved = updated(make(name="adamw", lr=0.1, weight_decay=0.5, decay="all")[0], params, zeros)
    np.testing.assert_allclose(moved["norm"]["scale"], 0.95 * np.ones(2), rtol=1e-6)
    with pytest.raises(ValueError, match="weight decay acts on 'al'. Did you mean 'all'"):
        make(name="adamw", decay="al")


def test_frozen_parameters_stay_and_the_rest_moves():
    params = {"model": {"encoder": {"kernel": jnp.ones(2)}, "decoder": {"kernel": jnp.ones(2)}}}
    moved = updated(make(lr=0.1, frozen=("encoder",))[0], params, jax.tree.map(jnp.ones_like, params), steps=3)
    chex.assert_trees_all_equal(moved["model"]["encoder"], params["model"]["encoder"])
    assert np.all(moved["model"]["decoder"]["kernel"] < 0.8)
    with pytest.raises(ValueError, match=r"frozen pattern 'encodr' matches no parameter, e.g. \['model/decoder"):
        make(frozen=("encodr",))[0].init(params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamm"}, "unknown optimizer 'adamm'. Did you mean 'adam'"),
        ({"schedule": "cosin"}, "unknown learning-rate schedule 'cosin'. Did you mean 'cosine'"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 needs optimizer 'adamw', not 'adam'"),
        ({"lr": -1.0}, "optimizer.lr=-1.0 must be at least 0"),
        ({"clip": -1.0}, "optimizer.clip=-1.0 must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_moving_average_follows_its_formula():
    params, ema = {"a": jnp.array([2.0])}, {"a": jnp.array([1.0])}
    step = jnp.int32(0)
    np.testing.assert_allclose(optim.ema_update(ema, params, 0.9, step, warmup=False)["a"], [1.1], rtol=1e-6)
    # Warm-up: (1 + 1) / (10 + 1) at the first step, the decay itself once that is smaller.
    first = optim.ema_update(ema, params, 0.9, step, warmup=True)["a"]
    np.testing.assert_allclose(first, [2 / 11 + 2 * 9 / 11], rtol=1e-6)
    held = optim.ema_update(ema, params, 0.9, step, warmup=False, finite=jnp.bool_(False))
    chex.assert_trees_all_equal(held, ema)
    late = optim.ema_update(ema, params, 0.9, jnp.int32(1000), warmup=True)["a"]
    np.testing.assert_allclose(late, [1.1], rtol=1e-5)
