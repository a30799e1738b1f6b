"""KL, entropies and commitment: reference values, bounds and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Case, cases, relative_l2

from tokenizers.losses.divergence import batch_entropy, commitment, entropy, gaussian_kl, sample_entropy


@pytest.mark.parametrize("name", cases("vidtok", "kl_math.*"))
def test_kl_of_a_posterior_agrees_with_the_original(name):
    case = Case("vidtok", name)
    for key in case.meta["inputs"]:
        suffix = key.removeprefix("x_")
        moments = case.input(key) * np.float32(40 if suffix == "clamp" else 1)

        def loss(moments, upstream, noise):
            mean, logvar = jnp.split(moments, 2, axis=-1)
            logvar = jnp.clip(logvar, -30, 20)
            kl = gaussian_kl(mean, logvar)
            return jnp.sum((mean + jnp.exp(0.5 * logvar) * noise) * upstream) + 0.01 * kl, kl

        shape = case.outputs[f"z_{suffix}"].shape
        upstream = refweights.uniform(case.meta["upstream"]["seed_name"], shape)
        noise = refweights.uniform(case.meta["noise"]["seed_name"] + "/0", shape) * np.float32(np.sqrt(3))
        gradient, kl = jax.grad(loss, has_aux=True)(jnp.asarray(moments), upstream, noise)
        np.testing.assert_allclose(kl, case.outputs[f"kl_loss_{suffix}"], rtol=1e-5)  # a float32 sum
        assert relative_l2(gradient, case.outputs[f"dz_{suffix}"]) < 1e-4


def test_kl_is_zero_for_the_prior_only():
    zeros = jnp.zeros((3, 4, 2))
    np.testing.assert_allclose(gaussian_kl(zeros, zeros), 0.0)
    np.testing.assert_allclose(gaussian_kl(zeros + 2.0, zeros), 0.5 * 4 * 8, rtol=1e-6)  # mean^2 / 2 per value
    assert gaussian_kl(zeros, zeros + 0.1) > 0
    assert gaussian_kl(zeros, zeros - 0.1) > 0


def distributions(seed, positions=12, codes=7):
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(seed), (positions, codes)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_entropy_of_the_mean_bounds_the_mean_entropy(seed):
    p = distributions(seed)
    sample, batch = float(sample_entropy(p)), float(batch_entropy(p))
    # Concavity; the tolerance is float32 rounding.
    assert -1e-6 <= sample <= batch + 1e-5
    assert batch <= np.log(7) + 1e-5


def test_entropy_values_at_the_extremes():
    uniform, sure = jnp.full((5, 8), 1 / 8), jnp.eye(8)
    np.testing.assert_allclose(entropy(uniform), np.full(5, np.log(8)), rtol=1e-6)
    np.testing.assert_allclose(entropy(sure), np.zeros(8), atol=1e-7)
    np.testing.assert_allclose(batch_entropy(sure), np.log(8), rtol=1e-6)
    assert np.isfinite(jax.grad(sample_entropy)(sure)).all()


def test_batch_entropy_averages_over_all_leading_axes():
    p = distributions(3)
    np.testing.assert_allclose(batch_entropy(p.reshape(2, 3, 2, 7)), batch_entropy(p), rtol=1e-6)


def test_commitment_moves_the_latents_and_not_the_codes():
    z, codes = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[0.0, 4.0]])
    np.testing.assert_allclose(commitment(z, codes), 2.5)
    of_z, of_codes = jax.grad(commitment, argnums=(0, 1))(z, codes)
    np.testing.assert_allclose(of_z, [[1.0, -2.0]])
    np.testing.assert_allclose(of_codes, np.zeros((1, 2)))


@pytest.mark.parametrize("term", [gaussian_kl, commitment])
def test_shapes_that_would_broadcast_are_refused(term):
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(2, 1\)"):
        term(jnp.zeros((2, 3)), jnp.zeros((2, 1)))
