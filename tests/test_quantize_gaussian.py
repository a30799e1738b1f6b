"""Diagonal Gaussian bottleneck: official KL and gradients, samples while training, the mean otherwise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import Case, cases, relative_l2
from refweights import uniform

from tokenizers.quantize.gaussian import (
    DiagonalGaussian,
    kl_to_standard_normal,
    reparameterize,
    split_posterior,
)


@pytest.mark.parametrize("name", cases("vidtok", "kl_math"))
def test_samples_kl_and_gradients_are_those_of_vidtok(name):
    case = Case("vidtok", name)
    for key in case.meta["inputs"]:
        suffix = key.removeprefix("x")
        x = case.input(key) * np.float32(case.meta["inputs"][key]["post"].removeprefix("*") or 1)
        shape = case.outputs[f"z{suffix}"].shape
        noise = uniform(f"{case.meta['noise']['seed_name']}/0", shape) * np.float32(3**0.5)
        upstream = uniform(case.meta["upstream"]["seed_name"], shape)

        @jax.jit
        def objective(x, noise=noise, upstream=upstream):
            mean, logvar = split_posterior(x)
            z, kl = reparameterize(mean, logvar, noise), kl_to_standard_normal(mean, logvar)
            return jnp.sum(z * upstream) + 0.01 * kl, (z, kl)

        (_, (z, kl)), grad = jax.value_and_grad(objective, has_aux=True)(x)
        assert relative_l2(z, case.outputs[f"z{suffix}"]) < 1e-5
        assert relative_l2(kl, case.outputs[f"kl_loss{suffix}"]) < 1e-5
        assert relative_l2(grad, case.outputs[f"dz{suffix}"]) < 1e-5
        encoding = DiagonalGaussian().apply({}, x)
        assert relative_l2(encoding.losses["kl"], case.outputs[f"kl_loss{suffix}"]) < 1e-5


def test_training_samples_the_posterior_and_evaluation_returns_its_mean():
    mean, logvar = np.full((1, 40000, 1), 0.5, np.float32), np.full((1, 40000, 1), np.log(4.0), np.float32)
    z = np.concatenate([mean, logvar], axis=-1)
    encoding = jax.jit(lambda z, k: DiagonalGaussian().apply({}, z, train=True, rngs={"bottleneck": k}))(
        z, jax.random.key(0)
    )
    # Standard deviation of the sample mean 0.01, of the sample deviation 0.007.
    np.testing.assert_allclose(encoding.latents.mean(), 0.5, atol=0.04)
    np.testing.assert_allclose(encoding.latents.std(), 2.0, atol=0.03)
    evaluation = DiagonalGaussian().apply({}, z)
    np.testing.assert_array_equal(evaluation.latents, mean)
    np.testing.assert_array_equal(evaluation.mean, mean)
    np.testing.assert_array_equal(evaluation.logvar, logvar)
    assert evaluation.indices is None
    assert DiagonalGaussian().codebook_size is None
    assert DiagonalGaussian().input_channels(1) == z.shape[-1]


def test_kl_is_a_sum_over_an_item_and_a_mean_over_the_batch():
    z = uniform("gaussian/kl", (2, 3, 4, 6))
    one = DiagonalGaussian().apply({}, z[:1]).losses["kl"]
    two = DiagonalGaussian().apply({}, z[1:]).losses["kl"]
    np.testing.assert_allclose(DiagonalGaussian().apply({}, z).losses["kl"], (one + two) / 2, rtol=1e-6)
    twice = np.concatenate([z, z], axis=1)
    np.testing.assert_allclose(DiagonalGaussian().apply({}, twice).losses["kl"], one + two, rtol=1e-6)
    assert DiagonalGaussian().apply({}, np.zeros((2, 5, 8))).losses["kl"] == 0


def test_extreme_log_variances_stay_finite_and_have_no_gradient():
    z = np.asarray([[0.0, 0.0, 1e4, -1e4]], np.float32)
    grad = jax.grad(lambda z: DiagonalGaussian().apply({}, z).losses["kl"])(z)
    np.testing.assert_array_equal(grad[:, 2:], 0)
    chex.assert_tree_all_finite(DiagonalGaussian().apply({}, z, train=True, rngs={"bottleneck": jax.random.key(0)}))


def test_a_sample_on_eight_devices_equals_one_device():
    z = uniform("gaussian/sharded", (8, 4, 6))
    sample = jax.jit(lambda z: DiagonalGaussian().apply({}, z, train=True, rngs={"bottleneck": jax.random.key(0)}))
    expected = sample(jnp.asarray(z))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        actual = sample(jax.device_put(z, NamedSharding(mesh, PartitionSpec("data"))))
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)  # the sum of the KL in another order


def test_bfloat16_input_is_computed_in_float32():
    z = jnp.asarray(uniform("gaussian/bf16", (2, 5, 8)), jnp.bfloat16)
    narrow, wide = DiagonalGaussian().apply({}, z), DiagonalGaussian().apply({}, z.astype(jnp.float32))
    assert narrow.latents.dtype == jnp.float32
    chex.assert_trees_all_equal(narrow, wide)


def test_an_odd_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"even number of channels .* got shape \(2, 5\)"):
        DiagonalGaussian().apply({}, jnp.zeros((2, 5)))
