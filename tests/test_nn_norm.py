"""Normalizations against numpy in float64, their statistics' axes, and their dtypes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizers.nn.norm import GroupNorm, LayerNorm, RMSNorm


def apply(module, variables, *args, **options):
    return jax.jit(functools.partial(module.apply, **options))(variables, *args)


def reference_group_norm(x, groups, epsilon, per_frame):
    x = np.asarray(x, np.float64)
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    axes = tuple(range(2 if per_frame else 1, x.ndim - 1)) + (x.ndim,)
    mean, variance = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm_is_that_of_float64(groups, per_frame):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4, 8)) * 3 + jnp.arange(8)
    module = GroupNorm(num_groups=groups, epsilon=1e-5, per_frame=per_frame)
    y = jax.jit(module.apply)(module.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(y, reference_group_norm(x, groups, 1e-5, per_frame), atol=2e-6)


def test_a_large_mean_costs_no_digits():
    x = jax.random.normal(jax.random.key(0), (1, 2, 32, 32, 32)) + 100
    module = GroupNorm(num_groups=8)
    y = apply(module, module.init(jax.random.key(0), x), x)
    # x itself is rounded to 4e-6 (half a unit at 100); E[x^2] - E[x]^2 in float32 would be wrong by 1e-1.
    np.testing.assert_allclose(y, reference_group_norm(x, 8, 1e-6, False), atol=2e-5)


@pytest.mark.parametrize(
    "module", [GroupNorm(num_groups=2, per_frame=True), LayerNorm(), RMSNorm()], ids=["group", "layer", "rms"]
)
def test_causal_norms_see_one_frame_only(module):
    x = jax.random.normal(jax.random.key(0), (1, 4, 3, 3, 4))
    variables = module.init(jax.random.key(0), x)
    y, changed = apply(module, variables, x), apply(module, variables, x.at[:, 2].add(x[:, 0] ** 2))
    keep = np.array([0, 1, 3])
    np.testing.assert_array_equal(changed[:, keep], y[:, keep])
    assert np.abs(changed[:, 2] - y[:, 2]).max() > 0.1


def test_group_norm_over_the_clip_sees_all_frames():
    x = jax.random.normal(jax.random.key(0), (1, 4, 3, 3, 4))
    module = GroupNorm(num_groups=2)
    variables = module.init(jax.random.key(0), x)
    assert np.abs(apply(module, variables, x.at[:, 3].add(9.0)) - apply(module, variables, x))[:, 0].max() > 0.1


def test_images_are_single_frames():
    clip = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 6))
    module = GroupNorm(num_groups=3, per_frame=True)
    variables = module.init(jax.random.key(0), clip)
    images = apply(module, variables, clip.reshape(6, 4, 4, 6)).reshape(clip.shape)
    chex.assert_trees_all_close(apply(module, variables, clip), images, atol=1e-6)


def test_layer_and_rms_norm_are_those_of_float64():
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 16))) + 3
    wide = x.astype(np.float64)
    layer = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    rms = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    for module, expected in ((LayerNorm(), layer), (RMSNorm(), rms)):
        np.testing.assert_allclose(apply(module, module.init(jax.random.key(0), x), x), expected, atol=2e-6)


@pytest.mark.parametrize("module", [GroupNorm(num_groups=2), LayerNorm(), RMSNorm(use_bias=True)])
def test_parameters_are_float32_and_statistics_too(module):
    x = jax.random.normal(jax.random.key(0), (1, 2, 8, 8, 4)) + 20
    params = module.init(jax.random.key(0), x.astype(jnp.bfloat16))["params"]
    chex.assert_trees_all_equal(params, {"scale": jnp.ones(4), "bias": jnp.zeros(4)})
    params = {"scale": jnp.arange(4.0), "bias": jnp.ones(4)}
    half = apply(module, {"params": params}, x.astype(jnp.bfloat16))
    exact = apply(module, {"params": params}, x.astype(jnp.bfloat16).astype(jnp.float32))
    assert half.dtype == jnp.bfloat16
    assert exact.dtype == jnp.float32
    # Only the result is rounded, to 8 bits.
    np.testing.assert_allclose(half.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="must divide the number of channels 6; got 4"):
        GroupNorm(num_groups=4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))


def test_height_sharding_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (4, 3, 8, 6, 8))
    module = GroupNorm(num_groups=2)
    variables = module.init(jax.random.key(0), x)
    expected = apply(module, variables, x)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, "context"))
    with jax.set_mesh(mesh):
        y = jax.jit(module.apply)(variables, jax.device_put(x, sharding))
    assert y.sharding.spec[2] == "context"
    np.testing.assert_allclose(y, expected, atol=2e-6)
