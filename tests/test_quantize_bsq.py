"""BSQ: official codes, losses and gradients, entropies of independent bits, round trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Case, cases, normal, relative_l2

from tokenizers.quantize.bsq import BSQ
from tokenizers.quantize.gradients import unit_norm

# float32 against float32 of another library; a temperature of 1/100 multiplies rounding of the logits.
TOLERANCE, GRADIENT = 1e-5, 1e-4


@pytest.mark.parametrize("name", cases("quantizers", "bsq_official_.*"))
def test_codes_losses_and_gradients_are_the_official_ones(name):
    case = Case("quantizers", name)
    config, expected = case.meta["config"], case.outputs
    z, g = case.input("z"), case.input("g")
    z = np.asarray(unit_norm(z)) if case.meta.get("normalize_input") else z
    bsq = BSQ(
        config["embed_dim"],
        entropy="analytical" if config.get("persample_entropy_compute") == "analytical" else "grouped",
        group_bits=config["group_size"],
        inverse_temperature=config["inv_temperature"],
        normalise=False,
    )

    def loss(z):
        encoding = bsq.apply({}, z, train=True)
        terms = encoding.losses
        entropies = config["gamma0"] * terms["entropy_sample"] - config["gamma"] * terms["entropy_codebook"]
        value = config["beta"] * terms["commitment"] + config["zeta"] * entropies / config["inv_temperature"]
        return value, encoding

    (value, encoding), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(z)
    np.testing.assert_array_equal(encoding.indices, expected["indices"])
    assert relative_l2(encoding.latents, expected["quantized"]) < TOLERANCE
    np.testing.assert_allclose(encoding.losses["entropy_codebook"], expected["codebook_entropy"], rtol=TOLERANCE)
    np.testing.assert_allclose(value, expected["loss"], rtol=TOLERANCE, atol=1e-6)
    assert relative_l2(grad, expected["loss_grad_z"]) < GRADIENT
    through = jax.grad(lambda z: jnp.sum(bsq.apply({}, z).latents * g))(z)
    assert relative_l2(through, expected["grad_z"]) < TOLERANCE
    codes = bsq.apply({}, encoding.indices, method="indices_to_codes")
    assert relative_l2(codes * np.sqrt(config["embed_dim"]), expected["codes_from_indices"]) < TOLERANCE
    # An index of the whole is the indices of the groups in a row.
    shift = config["group_size"]
    groups = expected["group_indices"].astype(np.int64)
    np.testing.assert_array_equal(groups[..., 0] * 2**shift + groups[..., 1], encoding.indices)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 9, 18, 30]), st.integers(0, 9))
def test_every_index_survives_the_round_trip(bits, seed):
    bsq = BSQ(bits, group_bits=1)
    indices = np.random.default_rng(seed).integers(0, bsq.codebook_size, 200).astype(np.int32)
    codes = bsq.apply({}, indices, method="indices_to_codes")
    np.testing.assert_allclose(jnp.linalg.norm(codes, axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(bsq.apply({}, codes, method="codes_to_indices"), indices)
    np.testing.assert_array_equal(bsq.apply({}, codes).indices, indices)


def test_bits_are_independent_so_both_sample_entropies_agree():
    z = normal("bsq/z", (5, 7, 12))
    terms = [
        BSQ(12, entropy=kind, group_bits=4, inverse_temperature=2.0).apply({}, z, train=True).losses
        for kind in ("analytical", "grouped")
    ]
    # They differ in what 1e-8 is added to.
    np.testing.assert_allclose(terms[0]["entropy_sample"], terms[1]["entropy_sample"], rtol=1e-4)
    # Bits of one channel each know less of the mean than groups do: an upper bound.
    assert terms[0]["entropy_codebook"] >= terms[1]["entropy_codebook"]


def test_gradients_pass_the_normalisation():
    z = 3 * normal("bsq/norm", (4, 9))
    grad = jax.grad(lambda z: jnp.sum(BSQ(9).apply({}, z).latents * normal("bsq/g", z.shape)))(z)
    # Length plays no part: the gradient is orthogonal to z.
    np.testing.assert_allclose(jnp.sum(grad * z, axis=-1), 0.0, atol=1e-5)
    assert (jnp.abs(grad).max(-1) > 0).all()


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="group_bits must divide the 10 bits, got 9"):
        BSQ(10)
    with pytest.raises(ValueError, match="Did you mean 'analytical'"):
        BSQ(9, entropy="analytic")
    with pytest.raises(ValueError, match="makes 9 channels, not 8"):
        BSQ(9).input_channels(8)
    with pytest.raises(ValueError, match="1 to 30 bits"):
        BSQ(36)
