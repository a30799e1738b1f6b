"""Position encodings: definitions, interpolation to other grids, relative rotary products."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizers.nn import posemb


def test_sines_and_cosines_of_a_line():
    y = posemb.sincos_1d([0, 3], 4, theta=100.0)
    np.testing.assert_allclose(y[0], [0, 0, 1, 1])
    np.testing.assert_allclose(y[1], [np.sin(3), np.sin(0.3), np.cos(3), np.cos(0.3)], rtol=1e-6)
    np.testing.assert_array_equal(posemb.sincos_1d(3, 4, cos_first=True), np.roll(posemb.sincos_1d(3, 4), 2))
    with pytest.raises(ValueError, match="dim must be even; got 3"):
        posemb.sincos_1d([0], 3)


def test_grids_concatenate_their_axes():
    y = posemb.sincos((2, 3, 4), 12)
    chex.assert_shape(y, (2, 3, 4, 12))
    np.testing.assert_array_equal(y[1, 2, 3, 4:8], posemb.sincos_1d(2, 4))
    mae = posemb.sincos((3, 4), 8, axis_order=(1, 0))
    np.testing.assert_array_equal(mae[1, 2, :4], posemb.sincos_1d(2, 4))
    np.testing.assert_array_equal(mae[1, 2, 4:], posemb.sincos_1d(1, 4))
    unequal = posemb.sincos((2, 3, 4), 8, axis_dims=(4, 2, 2))
    np.testing.assert_array_equal(unequal[1, 0, 3, 6:], posemb.sincos_1d(3, 2))
    with pytest.raises(ValueError, match="must sum to dim 8"):
        posemb.sincos((2, 3, 4), 8)


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_interpolation_keeps_constants_ramps_and_its_own_grid(method):
    table = jnp.stack(jnp.meshgrid(jnp.arange(6.0), jnp.arange(8.0), indexing="ij"), -1)
    np.testing.assert_array_equal(posemb.interpolate_table(table, (6, 8), method=method), table)
    ones = posemb.interpolate_table(jnp.ones((6, 8, 3)), (9, 4), method=method)
    np.testing.assert_allclose(ones, 1, atol=1e-6)
    if method == "linear":  # the coefficient -0.75 does not reproduce ramps
        doubled = posemb.interpolate_table(table, (12, 16), method=method)
        np.testing.assert_allclose(doubled[1:-1, 3, 0], np.arange(1, 11) / 2 - 0.25, atol=1e-6)


def test_cubic_interpolation_weights():
    # At a quarter from the second sample: the cubic of Keys with a = -0.75 at distances 1.25, 0.25, 0.75, 1.75.
    weights = posemb.interpolate_table(jnp.eye(8), (16,))[5]
    np.testing.assert_allclose(weights[1:5], [-0.10546875, 0.87890625, 0.26171875, -0.03515625], atol=1e-6)


def test_a_learned_table_serves_other_grids():
    module = posemb.LearnedPositions(grid=(4, 4))
    x = jnp.zeros((2, 4, 4, 3))
    variables = module.init(jax.random.key(0), x)
    table = variables["params"]["embedding"]
    np.testing.assert_array_equal(module.apply(variables, x)[1], table)
    larger = module.apply(variables, jnp.zeros((2, 6, 8, 3), jnp.bfloat16))
    assert larger.dtype == jnp.bfloat16
    expected = posemb.interpolate_table(table, (6, 8))
    np.testing.assert_allclose(larger[0].astype(jnp.float32), expected, atol=1e-3)
    with pytest.raises(ValueError, match="Did you mean 'cubic'"):
        posemb.interpolate_table(table, (6, 8), method="bicubic")


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_products_depend_on_the_distance_only(interleaved):
    query, key = jax.random.normal(jax.random.key(0), (2, 8))
    angles = posemb.rotary_angles(np.arange(12), 8)

    def turned(vector):
        tokens = jnp.broadcast_to(vector, (12, 1, 8))
        return posemb.apply_rotary(tokens, angles, interleaved=interleaved)[:, 0]

    products = turned(query) @ turned(key).T
    np.testing.assert_allclose(products[2, 0], products[11, 9], atol=1e-5)
    np.testing.assert_allclose(products[0, 3], products[7, 10], atol=1e-5)
    np.testing.assert_allclose(jnp.diagonal(products), query @ key, atol=1e-5)
    assert abs(products[2, 0] - products[0, 2]) > 1e-2


def test_rotary_pairs_are_turned_as_complex_numbers():
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 3, 10)))
    angles = posemb.rotary_angles(np.arange(5) - 2.5, 8, theta=50.0)
    factor = np.exp(1j * np.float64(angles))[:, None]
    halves = (x[..., :4] + 1j * x[..., 4:8]) * factor
    expected = np.concatenate([halves.real, halves.imag, x[..., 8:]], -1)
    np.testing.assert_allclose(posemb.apply_rotary(jnp.asarray(x), angles), expected, atol=1e-5)
    pairs = (x[..., 0:8:2] + 1j * x[..., 1:8:2]) * factor
    expected = np.concatenate([np.stack([pairs.real, pairs.imag], -1).reshape(2, 5, 3, 8), x[..., 8:]], -1)
    np.testing.assert_allclose(posemb.apply_rotary(jnp.asarray(x), angles, interleaved=True), expected, atol=1e-5)
    with pytest.raises(ValueError, match="do not fit"):
        posemb.apply_rotary(jnp.zeros((1, 4, 1, 8)), angles)


def test_axial_angles_turn_channels_of_their_own():
    angles = posemb.axial_rotary_angles((2, 3, 4), (4, 2, 2)).reshape(2, 3, 4, 4)
    np.testing.assert_array_equal(angles[1, 2, 3, :2], posemb.rotary_angles([1], 4)[0])
    np.testing.assert_array_equal(angles[1, 2, 3, 2:], [2, 3])
    shifted = posemb.axial_rotary_angles((2, 2), (2, 2), positions=([-1, 1], [0.5, 1.5]))
    np.testing.assert_array_equal(shifted, [[-1, 0.5], [-1, 1.5], [1, 0.5], [1, 1.5]])


def test_heads_may_turn_differently():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    angles = jax.random.normal(jax.random.key(1), (5, 3, 4))
    together = posemb.apply_rotary(x, angles, interleaved=True)
    for head in range(3):
        alone = posemb.apply_rotary(x[:, :, head : head + 1], angles[:, head], interleaved=True)
        np.testing.assert_array_equal(together[:, :, head : head + 1], alone)
    with pytest.raises(ValueError, match="do not fit"):
        posemb.apply_rotary(x, angles[:, :2])
