"""Pixel losses: their values, float32 arithmetic, and gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers.losses import reconstruction
from tokenizers.losses.reconstruction import PIXEL_ERROR, RECONSTRUCTION, negative_log_likelihood


def pair(shape=(2, 4, 6, 3), seed=0):
    draw = np.random.default_rng(seed)
    return draw.uniform(-1, 1, shape).astype(np.float32), draw.uniform(-1, 1, shape).astype(np.float32)


FORMULAS = {
    "l1": lambda d: np.mean(np.abs(d)),
    "l1_imagenet": lambda d: np.mean(np.abs(d) / (2 * np.array([0.229, 0.224, 0.225]))),
    "l2": lambda d: np.mean(d**2),
    "charbonnier": lambda d: np.mean(np.sqrt(d**2 + 1e-6)),
    "smooth_l1": lambda d: np.mean(np.where(abs(d) < 0.05, d**2 / 0.1, abs(d) - 0.025)),
}


@pytest.mark.parametrize("name", RECONSTRUCTION)
def test_mean_losses_are_their_formulas(name):
    y, x = pair()
    expected = FORMULAS[name](y.astype(np.float64) - x)
    # A float32 mean of 144 numbers.
    np.testing.assert_allclose(RECONSTRUCTION[name](jnp.asarray(y), jnp.asarray(x)), expected, rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(PIXEL_ERROR[name](jnp.asarray(y), jnp.asarray(x))), expected, rtol=1e-6)


@pytest.mark.parametrize("name", RECONSTRUCTION)
def test_bfloat16_pixels_are_reduced_in_float32(name):
    # 0.5 and 2^-9 apart exactly in bfloat16; summing 2^16 of them in bfloat16 would stop growing early.
    y, x = jnp.full((1, 256, 256, 1), 0.50390625, jnp.bfloat16), jnp.full((1, 256, 256, 1), 0.5, jnp.bfloat16)
    loss = RECONSTRUCTION[name](y, x)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, FORMULAS[name](np.full(1, 0.00390625)), rtol=1e-6)


def test_charbonnier_is_smooth_at_zero_and_l1_far_away():
    slope = jax.grad(lambda d: reconstruction.charbonnier(d, jnp.zeros(1), eps=1e-2))
    np.testing.assert_allclose(slope(jnp.zeros(1)), 0.0)
    np.testing.assert_allclose(slope(jnp.ones(1)), 1.0, rtol=1e-4)  # 1 - eps^2 / 2
    np.testing.assert_allclose(slope(jnp.full(1, 1e-3)), 0.1, rtol=1e-2)  # d / eps, up to (d / eps)^2 / 2


@pytest.mark.parametrize("loss", [*RECONSTRUCTION.values(), *PIXEL_ERROR.values()])
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(ValueError, match=r"one shape, got \(2, 1, 4, 4, 3\) and \(2, 4, 4, 3\)"):
        loss(jnp.zeros((2, 1, 4, 4, 3)), jnp.zeros((2, 4, 4, 3)))


def test_likelihood_sums_an_item_and_averages_items():
    y, x = pair((3, 4, 5, 2))
    perceptual = np.array([0.5, 0.1, 0.2], np.float32)[:, None, None, None]
    error = reconstruction.absolute_error(jnp.asarray(y), jnp.asarray(x)) + perceptual
    expected = (np.abs(y.astype(np.float64) - x) + perceptual).reshape(3, -1).sum(1).mean()
    np.testing.assert_allclose(negative_log_likelihood(error), expected, rtol=1e-6)
    # Equal to the mean error times the number of values of an item, plus the same of the log-variance.
    np.testing.assert_allclose(
        negative_log_likelihood(error, 0.7), expected * np.exp(-0.7) + 0.7 * 4 * 5 * 2, rtol=1e-6
    )


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 2.0))
def test_likelihood_is_least_at_the_log_of_the_mean_error(scale):
    error = jnp.asarray(scale * np.abs(pair()[0]) + 1e-3)
    best = jnp.log(jnp.mean(error))
    slope = jax.grad(negative_log_likelihood, argnums=1)(error, best)
    # A difference of two sums of 72 values per item.
    np.testing.assert_allclose(slope, 0.0, atol=1e-4)


def test_likelihood_refuses_reduced_errors():
    with pytest.raises(ValueError, match=r"\(items, ...\), one per value, got shape \(2,\)"):
        negative_log_likelihood(jnp.zeros(2))


def test_losses_are_the_same_over_a_sharded_batch():
    y, x = pair((8, 4, 4, 3))
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    for loss in RECONSTRUCTION.values():
        chex.assert_trees_all_close(
            jax.jit(loss)(jax.device_put(y, sharding), jax.device_put(x, sharding)), loss(y, x), rtol=1e-6
        )
