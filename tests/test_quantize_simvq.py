"""SimVQ: official numbers, a table that never moves, round trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Case, cases, normal, relative_l2

from tokenizers.quantize.simvq import SimVQ

# float32 against float32 of another library: only the order of sums differs.
TOLERANCE = 1e-5
KEY = jax.random.key(0)


@pytest.mark.parametrize("name", cases("quantizers", "sim_vq.*"))
def test_codes_losses_and_gradients_are_the_official_ones(name):
    case = Case("quantizers", name)
    config, expected = case.meta["config"], case.outputs

    def last(value):
        return np.moveaxis(value, 1, -1) if config.get("channel_first") and value.ndim == 4 else value

    rotate = config.get("rotation_trick", True)
    vq = SimVQ(config["codebook_size"], config["dim"], estimator="rotation_trick" if rotate else "straight_through")
    kernel = case.weights()["code_transform.weight"].T
    table = {"codebook": {"table": jnp.asarray(case.input("codebook"))}}
    g = last(case.input("g"))
    weight, encoder = config.get("commitment_weight", 1.0), config.get("input_to_quantize_commit_loss_weight", 0.25)

    @jax.jit
    def gradients(kernel, x):
        def objective(kernel, x):
            encoding = vq.apply({"params": {"kernel": kernel}, **table}, x, train=True)
            loss = weight * (encoding.losses["codebook"] + encoder * encoding.losses["commitment"])
            return jnp.sum(encoding.latents * g) + loss, (encoding, loss)

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(kernel, x)

    for i in range(case.meta["steps"]):
        (of_kernel, of_x), (encoding, loss) = gradients(kernel, last(case.input(f"x{i}")))
        np.testing.assert_array_equal(encoding.indices, expected[f"s{i}_indices"])
        assert relative_l2(encoding.latents, last(expected[f"s{i}_quantized"])) < TOLERANCE
        np.testing.assert_allclose(loss, expected[f"s{i}_loss"], rtol=TOLERANCE)
        assert relative_l2(of_x, last(expected[f"s{i}_grad_x"])) < TOLERANCE
        assert relative_l2(of_kernel.T, expected[f"s{i}_grad__code_transform_weight"]) < TOLERANCE
    variables = {"params": {"kernel": kernel}, **table}
    encoding = vq.apply(variables, last(case.input("x0")))
    np.testing.assert_array_equal(encoding.indices, expected["eval_indices"])
    assert relative_l2(encoding.latents, last(expected["eval_quantized"])) < TOLERANCE
    codes = vq.apply(variables, encoding.indices, method="indices_to_codes")
    assert relative_l2(codes, last(expected["from_indices"])) < TOLERANCE


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 100))
def test_every_index_survives_the_round_trip(seed):
    vq = SimVQ(37, 5)
    variables = vq.init(jax.random.key(seed), jnp.zeros((1, 5)))
    indices = jnp.arange(37)
    codes = vq.apply(variables, indices, method="indices_to_codes")
    np.testing.assert_array_equal(vq.apply(variables, codes, method="codes_to_indices"), indices)


def test_training_moves_every_code_but_not_the_table():
    vq = SimVQ(64, 4)
    z = normal("simvq/z", (3, 4))  # far fewer vectors than codes
    variables = vq.init(KEY, z)

    def loss(params):
        encoding, new = vq.apply({**variables, "params": params}, z, train=True, mutable=["codebook"])
        return encoding.losses["codebook"], new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"])
    np.testing.assert_array_equal(new["codebook"]["table"], variables["codebook"]["table"])
    moved = {**variables, "params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)}
    change = vq.apply(moved, method="codebook") - vq.apply(variables, method="codebook")
    assert (jnp.abs(change).max(axis=1) > 0).all()


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'rotation_trick'"):
        SimVQ(8, 4, estimator="rotation")
    with pytest.raises(ValueError, match="does not make 5 channels"):
        SimVQ(8, 4).input_channels(5)
    with pytest.raises(ValueError, match="codes of 4 channels"):
        SimVQ(8, 4).init(KEY, jnp.zeros((2, 5)))
