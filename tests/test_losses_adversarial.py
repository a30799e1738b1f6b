"""Adversarial losses and regularisers: reference values, signs of gradients, state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, cases

from tokenizers.losses.adversarial import (
    ADVERSARIAL,
    DISCRIMINATOR,
    GENERATOR,
    feature_matching,
    lecam_init,
    lecam_observe,
    lecam_penalty,
    lecam_update,
    r1_penalty,
)


def logits(seed, shape=(3, 4, 5, 1)):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("name", cases("magvit2", ".*stylegan3d_disc_and_gan_losses.*"))
def test_losses_agree_with_the_original_magvit_code(name):
    expected = Case("magvit2", name).outputs
    real, fake = jnp.asarray(expected["real_logit"]), jnp.asarray(expected["fake_logit"])
    tolerance = {"rtol": 1e-6}  # scalars of two logits
    pair = ADVERSARIAL["non_saturating"]
    np.testing.assert_allclose(pair.discriminator(real, fake), expected["d_loss_non_saturating"], **tolerance)
    np.testing.assert_allclose(pair.generator(fake), expected["g_loss_non_saturating"], **tolerance)
    # MAGVIT leaves VQGAN's factor 1/2 out.
    np.testing.assert_allclose(2 * DISCRIMINATOR["hinge"](real, fake), expected["d_loss_hinge"], **tolerance)
    penalty = lecam_penalty(lecam_init(0.1, -0.2), jnp.mean(real), jnp.mean(fake))
    np.testing.assert_allclose(penalty, expected["lecam(real,fake means; ema 0.1,-0.2)"], **tolerance)


def test_losses_are_their_formulas():
    real, fake = np.asarray(logits(0), np.float64), np.asarray(logits(1), np.float64)
    softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731
    expected = {
        "hinge": 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()),
        "vanilla": 0.5 * (softplus(-real).mean() + softplus(fake).mean()),
        "non_saturating": softplus(-real).mean() + softplus(fake).mean(),
    }
    assert set(expected) == set(DISCRIMINATOR) == set(ADVERSARIAL)
    for name, value in expected.items():
        np.testing.assert_allclose(DISCRIMINATOR[name](logits(0), logits(1)), value, rtol=1e-6)
    expected = {
        "hinge": -fake.mean(),
        "vanilla": -fake.mean(),
        "non_saturating": softplus(-fake).mean(),
        "non_saturating_item": softplus(-fake.reshape(3, -1).mean(1)).mean(),
    }
    assert set(expected) == set(GENERATOR)
    for name, value in expected.items():
        np.testing.assert_allclose(GENERATOR[name](logits(1)), value, rtol=1e-6)


@pytest.mark.parametrize("name", GENERATOR)
def test_generator_always_wants_higher_logits(name):
    assert (jax.grad(GENERATOR[name])(logits(0)) < 0).all()


@pytest.mark.parametrize("name", DISCRIMINATOR)
def test_discriminator_wants_real_up_and_fake_down(name):
    of_real, of_fake = jax.grad(DISCRIMINATOR[name], argnums=(0, 1))(logits(0), logits(1))
    assert (of_real <= 0).all()
    assert (of_fake >= 0).all()
    assert (of_real < 0).any()
    assert (of_fake > 0).any()


@pytest.mark.parametrize("name", GENERATOR)
def test_losses_of_large_bfloat16_logits_are_finite_float32(name):
    loss, slope = jax.value_and_grad(GENERATOR[name])(jnp.full((2, 3), -300.0, jnp.bfloat16))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 300.0)
    chex.assert_tree_all_finite(slope)


def test_lecam_moves_its_anchors_before_it_measures():
    real, fake = logits(0), logits(1)
    penalty, state = lecam_update(lecam_init(), real, fake, decay=0.9)
    np.testing.assert_allclose(state.real, 0.1 * np.mean(real), rtol=1e-5)
    np.testing.assert_allclose(state.fake, 0.1 * np.mean(fake), rtol=1e-5)
    real64, fake64 = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    expected = (np.maximum(real64 - 0.1 * fake64.mean(), 0) ** 2).mean()
    expected += (np.maximum(0.1 * real64.mean() - fake64, 0) ** 2).mean()
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)


def test_lecam_sends_no_gradient_through_its_anchors():
    real, fake = logits(0), logits(1)
    state = lecam_observe(lecam_init(), real, fake)
    of_update = jax.grad(lambda r, f: lecam_update(lecam_init(), r, f)[0], argnums=(0, 1))(real, fake)
    of_penalty = jax.grad(lambda r, f: lecam_penalty(state, r, f), argnums=(0, 1))(real, fake)
    chex.assert_trees_all_close(of_update, of_penalty, rtol=1e-6)


def test_lecam_anchors_converge_under_scan():
    real, fake = jnp.full((2, 3), 0.7), jnp.full((2, 3), -0.4)
    state, _ = jax.lax.scan(lambda s, _: (lecam_observe(s, real, fake, 0.9), None), lecam_init(), length=200)
    np.testing.assert_allclose(state, (0.7, -0.4), rtol=1e-4)


def test_r1_is_the_squared_slope_of_each_item():
    weight = jax.random.normal(jax.random.key(0), (4, 4, 3))
    real = jax.random.normal(jax.random.key(1), (5, 4, 4, 3))
    linear = lambda x: jnp.sum(weight * x, axis=(1, 2, 3))[:, None]  # noqa: E731
    np.testing.assert_allclose(r1_penalty(linear, real), jnp.sum(weight**2), rtol=1e-5)
    # Logits of several patches count through their sum: quadratic patches give 4 * mean |x|^2.
    patches = lambda x: jnp.square(x).reshape(5, -1)  # noqa: E731
    np.testing.assert_allclose(r1_penalty(patches, real), 4 * jnp.sum(real**2) / 5, rtol=1e-5)


def test_r1_trains_the_discriminator():
    real = jax.random.normal(jax.random.key(1), (5, 6))
    slope = jax.grad(lambda w: r1_penalty(lambda x: jnp.tanh(x @ w), real))
    w, step = jax.random.normal(jax.random.key(2), (6, 1)), 1e-2
    direction = jnp.ones_like(w)
    penalty = lambda w: r1_penalty(lambda x: jnp.tanh(x @ w), real)  # noqa: E731
    numeric = (penalty(w + step * direction) - penalty(w - step * direction)) / (2 * step)
    # Central differences in float32.
    np.testing.assert_allclose(jnp.sum(slope(w) * direction), numeric, rtol=1e-2)


def test_feature_matching_moves_the_fake_features_only():
    real, fake = (logits(0), logits(1, (3, 7))), (logits(2), logits(3, (3, 7)))
    expected = sum(np.mean(np.abs(np.asarray(f) - np.asarray(r))) for r, f in zip(real, fake, strict=True))
    np.testing.assert_allclose(feature_matching(real, fake), expected, rtol=1e-6)
    of_real, of_fake = jax.grad(feature_matching, argnums=(0, 1))(real, fake)
    chex.assert_trees_all_equal(of_real, jax.tree.map(jnp.zeros_like, real))
    assert all((np.abs(leaf) > 0).all() for leaf in of_fake)


def test_feature_matching_refuses_other_layers():
    with pytest.raises(ValueError, match="got 1 real and 2 fake"):
        feature_matching([logits(0)], [logits(0), logits(1)])
    with pytest.raises(ValueError, match="at least one"):
        feature_matching([], [])
    with pytest.raises(ValueError, match=r"one shape, got \(3, 4, 5, 1\) and \(3, 4, 1, 1\)"):
        feature_matching([logits(0)], [logits(0, (3, 4, 1, 1))])
