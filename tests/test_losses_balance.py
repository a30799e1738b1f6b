"""The adaptive adversarial weight: equal to two backward passes, at the price of one, on any number of devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tokenizers.losses.balance import (
    BalanceState,
    adaptive_weight,
    balanced_pull,
    constant_weight,
    parameter,
    starting_at,
)

LAST = "decoder/conv_out/kernel"


def convolve(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def make_params(width):
    def kernel(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(np.prod(shape[:-1]))

    return {
        "encoder": {f"conv_{i}": {"kernel": kernel(i, 3, 3, 3 if i == 0 else width, width)} for i in range(3)},
        "decoder": {f"conv_{i}": {"kernel": kernel(10 + i, 3, 3, width, width)} for i in range(3)}
        | {"conv_out": {"kernel": kernel(20, 3, 3, width, 3)}},
    }


def model(params, x):
    """A small convolutional autoencoder: (reconstruction, weighted bottleneck loss)."""
    for layer in params["encoder"].values():
        x = jnp.tanh(convolve(x, layer["kernel"]))
    auxiliary = 0.3 * jnp.mean(jnp.square(x))
    for name in ("conv_0", "conv_1", "conv_2"):
        x = jnp.tanh(convolve(x, params["decoder"][name]["kernel"]))
    return jnp.tanh(convolve(x, params["decoder"]["conv_out"]["kernel"])), auxiliary


def losses(x, width):
    kernels = [jax.random.normal(jax.random.key(30), (4, 4, 3, width)), jnp.ones((4, 4, width, 1)) / width]

    def reconstruction(y):
        return jnp.mean(jnp.abs(y - x))

    def adversarial(y):
        return -jnp.mean(convolve(jnp.tanh(convolve(y, kernels[0], 2)), kernels[1], 2))

    return reconstruction, adversarial


def one_backward(params, x, balance, active=1.0):
    reconstruction, adversarial = losses(x, width=8)
    (y, auxiliary), pull = jax.vjp(lambda p: model(p, x), params)
    return balanced_pull(
        pull,
        balance,
        balance.init(y),
        reconstruction=jax.grad(reconstruction)(y),
        gan=jax.grad(adversarial)(y),
        last_layer=LAST,
        active=active,
        auxiliary=auxiliary,
    )


def two_backwards(params, x, weight, active=1.0):
    """The definition: gradients of both losses for all parameters, their ratio at the last layer, and the sum."""
    reconstruction, adversarial = losses(x, width=8)
    of_reconstruction = jax.grad(lambda p: reconstruction(model(p, x)[0]))(params)
    of_adversarial = jax.grad(lambda p: adversarial(model(p, x)[0]))(params)
    of_auxiliary = jax.grad(lambda p: model(p, x)[1])(params)
    norms = [jnp.linalg.norm(parameter(g, LAST)) for g in (of_reconstruction, of_adversarial)]
    chosen = jnp.clip(norms[0] / (norms[1] + 1e-4), 0, 1e4) * weight
    total = jax.tree.map(lambda r, g, a: r + chosen * active * g + a, of_reconstruction, of_adversarial, of_auxiliary)
    return total, chosen


def images(batch=2, size=16):
    return jax.random.uniform(jax.random.key(99), (batch, size, size, 3), minval=-1)


def test_one_backward_equals_two():
    params, x = make_params(8), images()
    single = jax.jit(lambda p, active: one_backward(p, x, adaptive_weight(0.8), active))
    double = jax.jit(lambda p, active: two_backwards(p, x, 0.8, active))
    for active in (0.0, 0.7, 1.0):
        gradients, state = single(params, active)
        expected, weight = double(params, active)
        assert weight > 1e-3
        np.testing.assert_allclose(state.weight, weight, rtol=1e-5)
        chex.assert_trees_all_close(gradients, expected, rtol=1e-5, atol=1e-7)


def test_it_costs_one_backward():
    """Compiled flops next to a plain backward of the same losses with a known weight."""
    x, width = images(size=32), 32
    reconstruction, adversarial = losses(x, 8)

    def plain(params):
        def total(p):
            y, auxiliary = model(p, x)
            return reconstruction(y) + 0.5 * adversarial(y) + auxiliary

        return jax.grad(total)(params)

    def flops(function):
        return jax.jit(function).lower(make_params(width)).compile().cost_analysis()["flops"]

    base = flops(plain)
    ratios = {
        "adaptive": flops(lambda p: one_backward(p, x, adaptive_weight())) / base,
        "constant": flops(lambda p: one_backward(p, x, constant_weight())) / base,
        "two": flops(lambda p: two_backwards(p, x, 1.0)) / base,
    }
    assert ratios["constant"] < 1.05, ratios
    assert ratios["adaptive"] < 1.25, ratios
    assert ratios["two"] > 1.45, ratios


def test_weight_is_that_of_the_whole_batch_on_eight_devices():
    params, x = make_params(8), images(batch=8)
    step = jax.jit(lambda p, x: one_backward(p, x, adaptive_weight(0.8)))
    expected = step(params, x)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    with jax.set_mesh(mesh):
        actual = step(params, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    # The mean over the batch is summed in another order.
    np.testing.assert_allclose(actual[1].weight, expected[1].weight, rtol=1e-5)
    chex.assert_trees_all_close(actual[0], expected[0], rtol=1e-4, atol=1e-6)


def test_weight_is_clipped_before_it_is_scaled():
    balance = adaptive_weight(0.5)
    c, g = jnp.ones(3), jnp.ones(3)
    tiny, large = jnp.full((2, 2), 1e-12), jnp.full((2, 2), 1e3)
    _, state = balance.update(c, balance.init(c), gan=g, last=(large, tiny))
    np.testing.assert_allclose(state.weight, 0.5e4)  # 2e3 / 1e-4 is beyond the clip
    _, state = balance.update(c, balance.init(c), gan=g, last=(jnp.zeros((2, 2)), large))
    np.testing.assert_allclose(state.weight, 0.0)
    wide = adaptive_weight(1.0, epsilon=1.0, maximum=1e8)
    _, state = wide.update(c, wide.init(c), gan=g, last=(large, jnp.zeros((2, 2))))
    np.testing.assert_allclose(state.weight, 2e3, rtol=1e-6)


def test_weight_is_kept_for_the_log_before_the_start():
    balance, schedule = adaptive_weight(), starting_at(10, factor=0.7)
    c, g, last = jnp.ones(3), jnp.full(3, 5.0), (jnp.full(4, 2.0), jnp.ones(4))
    before, state = balance.update(c, balance.init(c), gan=g, last=last, active=schedule(9))
    np.testing.assert_allclose(before, c)
    np.testing.assert_allclose(state.weight, 2.0, rtol=1e-4)  # epsilon next to a norm of 2
    after, _ = balance.update(c, state, gan=g, last=last, active=schedule(jnp.int32(10)))
    np.testing.assert_allclose(after, c + 2.0 * 0.7 * g, rtol=1e-4)


def test_constant_weight_has_the_same_interface():
    balance = constant_weight(0.1)
    c = {"y": jnp.ones(3)}
    updates, state = balance.update(c, balance.init(c), gan={"y": jnp.full(3, 2.0)}, last=(jnp.ones(1), jnp.ones(1)))
    np.testing.assert_allclose(updates["y"], np.full(3, 1.2), rtol=1e-6)
    assert isinstance(state, BalanceState)
    np.testing.assert_allclose(state.weight, 0.1)


def test_it_is_an_optax_transformation_that_chains():
    balance = optax.chain(adaptive_weight(), optax.scale(2.0))
    assert isinstance(balance, optax.GradientTransformationExtraArgs)
    c = jnp.ones(3)
    updates, _ = jax.jit(balance.update)(c, balance.init(c), gan=c, last=(jnp.ones(4), jnp.ones(4)), active=1.0)
    np.testing.assert_allclose(updates, np.full(3, 4.0), rtol=1e-4)


def test_wrong_last_layer_names_the_neighbours():
    params = make_params(2)
    with pytest.raises(ValueError, match="Did you mean 'decoder/conv_out'"):
        parameter(params, "decoder/conv_outt/kernel")
    with pytest.raises(ValueError, match="Accepted: decoder/conv_out/kernel"):
        parameter(params, "decoder/conv_out")
    with pytest.raises(ValueError, match="unknown parameter path 'decoder/conv_out/kernel/0'"):
        parameter(params, LAST + "/0")
