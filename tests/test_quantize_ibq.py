"""IBQ: official losses and gradients, for z and for the whole table, in bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Case, cases, relative_l2

from tokenizers.quantize.ibq import IBQ, mixture

# Values: order of float32 sums. Gradients: the entropies multiply rounding of the logits by 100.
TOLERANCE, GRADIENT = 1e-5, 1e-4
KEY = jax.random.key(0)


@pytest.mark.parametrize("name", cases("lfq_losses", "ibq_.*"))
def test_losses_and_gradients_are_the_official_ones(name):
    case = Case("lfq_losses", name)
    config, expected = case.meta["config"], case.outputs
    table, z = case.weights()["embedding.weight"], case.input("z")
    vq = IBQ(config["n_e"], config["e_dim"], entropy="smoothed" if config.get("use_entropy_loss") else None)
    w = refweights.uniform("w", z.shape)

    def terms(table, z):
        encoding = vq.apply({"params": {"codebook": table}}, z, train=True)
        losses = encoding.losses
        found = {
            "quant_loss": losses["index_propagation"] + losses["commitment"] + config["beta"] * losses["codebook"],
            "sum_of_quantized_times_w": jnp.sum(encoding.latents * w),
        }
        if "entropy_sample" in losses:
            sample, average = losses["entropy_sample"], losses["entropy_codebook"]
            found |= {"sample_entropy": sample, "avg_entropy": average, "entropy_loss": sample - average}
        return found, encoding

    values, encoding = jax.jit(terms)(table, z)
    np.testing.assert_array_equal(encoding.indices.ravel(), expected["indices"])
    assert relative_l2(encoding.latents, expected["quantized"]) < TOLERANCE
    for key, value in values.items():
        # Entropies see rounding of the logits 100 times larger; observed 1.4e-5.
        rtol = 10 * TOLERANCE if "entropy" in key else TOLERANCE
        np.testing.assert_allclose(value, expected[key], rtol=rtol, atol=1e-6, err_msg=key)
        of_table, of_z = jax.jit(jax.grad(lambda t, z, key=key: terms(t, z)[0][key], argnums=(0, 1)))(table, z)
        # The two entropies of a single token cancel in entropy_loss: its gradient is as exact as its parts are.
        scale = key if key != "entropy_loss" else "sample_entropy"
        largest = np.abs(expected[f"grad_z_of_{scale}"]).max() + 1e-7
        np.testing.assert_allclose(of_z, expected[f"grad_z_of_{key}"], atol=GRADIENT * largest, err_msg=key)
        stored = f"grad_embedding_of_{key}"
        if stored in expected:
            np.testing.assert_allclose(of_table, expected[stored], atol=GRADIENT * np.abs(expected[stored]).max())
        else:
            rows, top = expected[f"{stored}.top4_rows"], expected[f"{stored}.top4_values"]
            largest = np.abs(expected[f"grad_embedding_of_{scale}.top4_values"]).max()
            np.testing.assert_allclose(of_table[rows], top, atol=GRADIENT * largest, err_msg=key)
    encoding = vq.apply({"params": {"codebook": table}}, z)
    np.testing.assert_array_equal(encoding.indices.ravel(), expected["indices"])


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 100))
def test_every_index_survives_the_round_trip(seed):
    vq = IBQ(37, 5)
    variables = vq.init(jax.random.key(seed), jnp.zeros((1, 5)))
    indices = jnp.arange(37)
    codes = vq.apply(variables, indices, method="indices_to_codes")
    np.testing.assert_array_equal(vq.apply(variables, codes, method="codes_to_indices"), indices)


def test_chunks_do_not_change_the_mixture():
    z, table = refweights.uniform("ibq/z", (3, 7, 6)), refweights.uniform("ibq/table", (50, 6))

    def value(z, table, size):
        return jnp.sum(jnp.square(mixture(z, table, size)))

    whole = jax.value_and_grad(value, argnums=(0, 1))(z, table, 21)
    parts = jax.value_and_grad(value, argnums=(0, 1))(z, table, 4)  # the last chunk is padded
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    p = jax.nn.softmax(z @ table.T)
    np.testing.assert_allclose(mixture(z, table, 4), p @ table, atol=1e-6)


def test_a_large_codebook_trains_in_bounded_memory():
    vq = IBQ(2**16, 8)
    z = jax.ShapeDtypeStruct((8192, 8), jnp.float32)
    table = jax.ShapeDtypeStruct((2**16, 8), jnp.float32)

    def loss(table, z):
        encoding = vq.apply({"params": {"codebook": table}}, z, train=True)
        return sum(encoding.losses.values()) + jnp.sum(encoding.latents)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(table, z).compile()
    # Positions x codes are 2 GiB, and several such arrays would be alive; a chunk of 256 is 64 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 2**30


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'smoothed'"):
        IBQ(8, 4, entropy="smooth")
    with pytest.raises(ValueError, match="does not make 5 channels"):
        IBQ(8, 4).input_channels(5)
    with pytest.raises(ValueError, match="codes of 4 channels"):
        IBQ(8, 4).init(KEY, jnp.zeros((2, 5)))
