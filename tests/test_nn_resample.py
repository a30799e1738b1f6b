"""Resampling: definitions, round trips, causality and streaming of the time variants."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers.nn import resample


def normal(*shape):
    return jax.random.normal(jax.random.key(0), shape)


factors_2d_and_3d = st.lists(st.integers(1, 3), min_size=2, max_size=3).map(tuple)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(factors_2d_and_3d, st.sampled_from(resample.ORDERS))
def test_space_to_depth_round_trip(factors, order):
    x = np.random.default_rng(0).normal(size=(2, *(2 * f for f in factors), 3)).astype(np.float32)
    y = resample.space_to_depth(x, factors, order=order)
    chex.assert_shape(y, (2, *(2 for _ in factors), 3 * np.prod(factors)))
    np.testing.assert_array_equal(resample.depth_to_space(y, factors, order=order), x)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(factors_2d_and_3d)
def test_nearest_upsampling_repeats_and_pooling_undoes_it(factors):
    x = np.random.default_rng(0).normal(size=(2, *range(2, 2 + len(factors)), 3)).astype(np.float32)
    expected = x
    for axis, factor in enumerate(factors):
        expected = np.repeat(expected, factor, axis + 1)
    y = resample.upsample_nearest(x, factors)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(resample.average_pool(y, factors), x, rtol=1e-6)


def test_channel_orders_of_space_to_depth():
    x = np.arange(2 * 2 * 2).reshape(1, 2, 2, 2)  # [row, column, channel]
    np.testing.assert_array_equal(resample.space_to_depth(x, (2, 2)).ravel(), np.arange(8))
    outer = resample.space_to_depth(x, (2, 2), order="channel_outer").ravel()
    np.testing.assert_array_equal(outer, [0, 2, 4, 6, 1, 3, 5, 7])
    with pytest.raises(ValueError, match="Did you mean 'channel_outer'"):
        resample.space_to_depth(x, (2, 2), order="channel_oter")


def test_frames_are_resampled_as_images():
    clip = normal(2, 3, 4, 6, 2)
    for function in (resample.upsample_nearest, resample.average_pool, resample.space_to_depth):
        images = function(clip.reshape(6, 4, 6, 2), (2, 2))
        np.testing.assert_array_equal(function(clip, (2, 2)).reshape(images.shape), images)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="must be multiples of"):
        resample.average_pool(jnp.zeros((1, 3, 4, 2)), (2, 2))
    with pytest.raises(ValueError, match="channels divisible by 4; got 6"):
        resample.depth_to_space(jnp.zeros((1, 3, 4, 6)), (2, 2))


def test_causal_time_variants_keep_the_first_frame_apart():
    x = normal(1, 5, 4, 4, 3)
    blocks = resample.causal_space_to_depth(x, (2, 2, 2))
    chex.assert_shape(blocks, (1, 3, 2, 2, 24))
    np.testing.assert_array_equal(resample.causal_depth_to_space(blocks, (2, 2, 2)), x)
    pooled = resample.causal_average_pool_time(x, 2)
    np.testing.assert_array_equal(pooled[:, 0], x[:, 0])
    np.testing.assert_allclose(pooled[:, 1:], (x[:, 1::2] + x[:, 2::2]) / 2, atol=1e-6)
    up = resample.causal_upsample_time(pooled, 2)
    np.testing.assert_array_equal(up, pooled[:, np.array([0, 1, 1, 2, 2])])


def test_vqgan_downsampling_pads_below_and_right():
    x = normal(1, 4, 6, 2)
    module = resample.Downsample(3)
    variables = module.init(jax.random.key(0), x)
    kernel, bias = variables["params"]["conv"]["kernel"], variables["params"]["conv"]["bias"]
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    last = jnp.einsum("bijc,ijcd->bd", padded[:, 2:5, 4:7], kernel) + bias
    y = module.apply(variables, x)
    chex.assert_shape(y, (1, 2, 3, 3))
    np.testing.assert_allclose(y[:, 1, 2], last, atol=1e-5)
    symmetric = resample.Downsample(3, padding=1).apply(variables, x)
    first = jnp.einsum("bijc,ijcd->bd", jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))[:, :3, :3], kernel) + bias
    np.testing.assert_allclose(symmetric[:, 0, 0], first, atol=1e-5)


def test_upsample_is_repetition_then_convolution_in_the_compute_dtype():
    x = normal(1, 2, 3, 3, 2)
    module = resample.Upsample(4, dtype=jnp.bfloat16)
    y, variables = module.init_with_output(jax.random.key(0), x)
    chex.assert_shape(y, (1, 2, 6, 6, 4))
    assert y.dtype == jnp.bfloat16
    assert list(variables["params"]) == ["conv"]


CAUSAL = {
    "convolution down": (resample.CausalTimeDownsample(3), 5, 2),
    "convolution up": (resample.CausalTimeUpsample(3), 5, 1),
    "pool": (resample.CausalTimePool(2), 5, 2),
    "space to depth": (resample.CausalSpaceToDepth((2, 2, 2)), 5, 2),
    "depth to space": (resample.CausalDepthToSpace((2, 1, 2)), 5, 1),
}


@pytest.mark.parametrize(("module", "frames", "step"), CAUSAL.values(), ids=CAUSAL)
def test_time_variants_are_causal_and_stream(module, frames, step):
    x = normal(1, frames, 2, 2, 4)
    variables = module.init(jax.random.key(0), x)
    apply = jax.jit(module.apply, static_argnames="mutable")
    whole = apply(variables, x)
    changed = apply(variables, x.at[:, 1 + step :].add(1.0))
    kept = apply(variables, x[:, : 1 + step]).shape[1]
    np.testing.assert_allclose(changed[:, :kept], whole[:, :kept], atol=1e-6)
    assert np.abs(changed - whole)[:, kept:].max() > 0.1

    stream, outputs = {}, []
    for start, end in itertools.pairwise((0, 1, 1 + step, frames)):
        y, stream = apply({**variables, **stream}, x[:, start:end], mutable="stream")
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=1e-6)


def test_upsampling_keeps_the_height_sharded():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, "context"))
    x = normal(4, 3, 8, 6, 2)
    expected = resample.space_to_depth(resample.upsample_nearest(x, (1, 2, 2)), (1, 4, 2))
    with jax.set_mesh(mesh):
        function = jax.jit(lambda x: resample.space_to_depth(resample.upsample_nearest(x, (1, 2, 2)), (1, 4, 2)))
        y = function(jax.device_put(x, sharding))
    assert y.sharding.spec[2] == "context"
    np.testing.assert_array_equal(y, expected)
