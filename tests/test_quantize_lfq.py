"""Lookup-free quantization: official numbers of both conventions, round trips, entropies over groups of bits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Case, cases, relative_l2
from refweights import uniform

from tokenizers.quantize.gradients import unit_norm
from tokenizers.quantize.lfq import LFQ, soft_clamp

# float32 against float32 of another library.
TOLERANCE = 1e-5
# The softmax is taken at 200 <z, c>, which amplifies rounding of z by that factor in its gradient.
GRADIENT_TOLERANCE = 1e-4


def linear(weights, name, x):
    if f"{name}.weight" not in weights:
        return x
    return jnp.matmul(x, weights[f"{name}.weight"].T, precision="highest") + weights[f"{name}.bias"]


# Open-MAGVIT2: little bit order, smoothed entropies pooled over codebooks ------------------------------------------


@pytest.mark.parametrize("name", cases("lfq_losses", "open_lfq_.*"))
def test_losses_and_gradients_are_those_of_open_magvit2(name):
    case = Case("lfq_losses", name)
    config, expected = case.meta["config"], case.outputs
    bits = config["codebook_size"].bit_length() - 1
    lfq = LFQ(bits, entropy_chunk_size=5)  # several chunks, the last one incomplete
    x = case.input("x")
    groups = (*x.shape[:-1], x.shape[-1] // bits, bits)

    @jax.jit
    def forward(x):
        encoding = lfq.apply({}, x.reshape(groups), train=True)
        losses = encoding.losses
        terms = {
            "per_sample_entropy": losses["entropy_sample"],
            "codebook_entropy": losses["entropy_codebook"],
            "commitment": losses["commitment"],
            "entropy_aux_loss": config["sample_minimization_weight"] * losses["entropy_sample"]
            - config["batch_maximization_weight"] * losses["entropy_codebook"],
            "sum_of_quantized_times_w": jnp.sum(encoding.latents.reshape(x.shape) * uniform("w", x.shape)),
        }
        return terms, encoding

    terms, pull, encoding = jax.vjp(forward, x, has_aux=True)
    assert relative_l2(encoding.latents.reshape(x.shape), expected["quantized"]) < TOLERANCE
    indices = np.asarray(encoding.indices).ravel()
    if config.get("token_factorization"):
        first, second = config["factorized_bits"]
        np.testing.assert_array_equal(indices % 2**first, expected["indices_pre"])
        np.testing.assert_array_equal(indices // 2**first, expected["indices_post"])
    else:
        np.testing.assert_array_equal(indices, expected["indices"])
        codes = lfq.apply({}, indices[:8], method="indices_to_codes")
        np.testing.assert_array_equal(codes, expected["decode_of_first_8_indices"])
    for key, value in terms.items():
        if key in expected:
            # Nearly uniform probabilities: the difference of the two entropies is rounding noise of their size, 7.
            np.testing.assert_allclose(value, expected[key], rtol=TOLERANCE, atol=5e-6)
        (grad,) = pull({other: jnp.float32(other == key) for other in terms})
        theirs = expected[f"grad_x_of_{key}"]
        # At 2^18 codes the two entropies nearly cancel (62.2 - 61.7 -> 0.8 in norm): what is exact is relative to them.
        size = np.linalg.norm(
            expected["grad_x_of_per_sample_entropy" if key == "entropy_aux_loss" else f"grad_x_of_{key}"]
        )
        assert np.linalg.norm(grad - theirs) < GRADIENT_TOLERANCE * max(size, np.linalg.norm(theirs)), key


# vector-quantize-pytorch: big bit order, clamped entropies, one average per codebook -------------------------------


def lucidrains(case, x, inverse_temperature):
    """(output, indices, loss, terms) of a case with its projections, codebooks and options around our quantizer."""
    config, weights = case.meta["config"], case.weights()
    bits, codebooks = config["codebook_size"].bit_length() - 1, config.get("num_codebooks", 1)
    spherical = config.get("spherical", False)
    scale = bits**-0.5 if spherical else config.get("codebook_scale", 1.0)
    lfq = LFQ(bits, bit_order="big", scale=scale, entropy="clamped", inverse_temperature=inverse_temperature)
    z = linear(weights, "project_in", x)
    if "soft_clamp_input_value" in config:
        z = soft_clamp(z, config["soft_clamp_input_value"])
    z = z.reshape(*z.shape[:-1], codebooks, bits)
    if spherical:
        z = unit_norm(z)
    encodings = [lfq.apply({}, z[..., c, :], train=True) for c in range(codebooks)]
    terms = {k: sum(e.losses[k] for e in encodings) / codebooks for k in encodings[0].losses}
    entropy = terms["entropy_sample"] - config.get("diversity_gamma", 1.0) * terms["entropy_codebook"]
    if config.get("experimental_softplus_entropy_loss"):
        entropy = jax.nn.softplus(entropy + config["entropy_loss_offset"])
    loss = config.get("entropy_loss_weight", 0.1) * entropy
    loss = loss + config.get("commitment_loss_weight", 0.0) * terms["commitment"]
    latents = jnp.concatenate([e.latents for e in encodings], axis=-1)
    indices = jnp.stack([e.indices for e in encodings], axis=-1)
    return linear(weights, "project_out", latents), (indices, loss, terms)


@pytest.mark.parametrize("name", cases("quantizers", "lfq.*"))
def test_losses_and_gradients_are_those_of_vector_quantize_pytorch(name):
    case = Case("quantizers", name)
    x, g, expected = case.input("x0"), case.input("g"), case.outputs
    inverse_temperature = case.meta["forward_kwargs"].get("inv_temperature", 100.0)

    @jax.jit
    def objective(x):
        quantized, (indices, loss, terms) = lucidrains(case, x, inverse_temperature)
        return jnp.sum(quantized * g) + loss, (quantized, indices, loss, terms)

    grad, (quantized, indices, loss, terms) = jax.grad(objective, has_aux=True)(x)
    np.testing.assert_array_equal(indices.reshape(expected["s0_indices"].shape), expected["s0_indices"])
    assert relative_l2(quantized, expected["s0_quantized"]) < TOLERANCE
    for ours, theirs in (("entropy_sample", "per_sample_entropy"), ("entropy_codebook", "batch_entropy")):
        np.testing.assert_allclose(terms[ours], expected[f"s0_{theirs}"], rtol=TOLERANCE)
    np.testing.assert_allclose(loss, expected["s0_loss"], rtol=TOLERANCE)
    assert relative_l2(grad, expected["s0_grad_x"]) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("name", cases("lfq_losses", "lucidrains_.*"))
def test_auxiliary_loss_is_that_of_vector_quantize_pytorch(name):
    case = Case("lfq_losses", name)
    x = case.input("x")

    def auxiliary(x):
        _, (indices, loss, _) = lucidrains(case, x, case.meta.get("inv_temperature", 100.0))
        return loss, indices

    (loss, indices), grad = jax.jit(jax.value_and_grad(auxiliary, has_aux=True))(x)
    np.testing.assert_array_equal(indices.reshape(case.outputs["indices"].shape), case.outputs["indices"])
    np.testing.assert_allclose(loss, case.outputs["aux_loss"], rtol=TOLERANCE)
    assert relative_l2(grad, case.outputs["grad_x_of_aux_loss"]) < GRADIENT_TOLERANCE


# Properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 10, 30]), st.sampled_from(["little", "big"]), st.floats(0.1, 4.0), st.integers(0, 9))
def test_every_index_survives_the_round_trip(bits, order, scale, seed):
    lfq = LFQ(bits, bit_order=order, scale=scale)
    indices = np.random.default_rng(seed).integers(0, lfq.codebook_size, 200).astype(np.int32)
    codes = lfq.apply({}, indices, method="indices_to_codes")
    np.testing.assert_array_equal(lfq.apply({}, codes, method="codes_to_indices"), indices)
    np.testing.assert_array_equal(np.abs(codes), np.float32(scale))


def test_bit_orders_name_the_same_code_by_mirrored_indices():
    z = uniform("lfq/order", (50, 6))
    little, big = (LFQ(6, bit_order=order).apply({}, z) for order in ("little", "big"))
    np.testing.assert_array_equal(little.latents, big.latents)
    mirrored = [int(f"{i:06b}"[::-1], 2) for i in np.asarray(little.indices)]
    np.testing.assert_array_equal(mirrored, big.indices)


def test_entropy_of_a_sample_is_a_sum_over_bits():
    """p factorises over the bits of a cube, so groups change the sample term by nothing, and only that one."""
    z = 0.02 * uniform("lfq/groups", (6, 11, 12))
    losses = jax.jit(
        lambda z, group: LFQ(12, entropy_group_bits=group).apply({}, z, train=True).losses, static_argnums=1
    )
    whole, grouped = losses(z, None), losses(z, 3)
    np.testing.assert_allclose(whole["entropy_sample"], grouped["entropy_sample"], rtol=1e-5)
    assert grouped["entropy_codebook"] > whole["entropy_codebook"]  # independent bits have the largest joint entropy


def test_zero_is_negative_and_bfloat16_is_computed_in_float32():
    lfq = LFQ(4)
    assert lfq.apply({}, jnp.zeros((1, 4))).indices.tolist() == [0]
    z = jnp.asarray(0.01 * uniform("lfq/bf16", (2, 9, 4)), jnp.bfloat16)
    narrow, wide = (jax.jit(lambda z: lfq.apply({}, z, train=True))(v) for v in (z, z.astype(jnp.float32)))
    assert narrow.latents.dtype == jnp.float32
    chex.assert_trees_all_equal(narrow, wide)


def test_entropy_terms_exist_while_training_only():
    z = uniform("lfq/eval", (3, 4))
    assert set(LFQ(4).apply({}, z).losses) == {"commitment"}
    assert set(LFQ(4).apply({}, z, train=True).losses) == {"commitment", "entropy_sample", "entropy_codebook"}
    assert set(LFQ(4, entropy=None).apply({}, z, train=True).losses) == {"commitment"}


def test_impossible_settings_are_refused():
    assert LFQ(4).input_channels(4) == 4
    with pytest.raises(ValueError, match="makes 4 channels, not 5"):
        LFQ(4).input_channels(5)
    with pytest.raises(ValueError, match="1 to 30 bits"):
        LFQ(36)
    with pytest.raises(ValueError, match="Did you mean 'little'"):
        LFQ(4, bit_order="litle")
    with pytest.raises(ValueError, match="must divide the 18 bits, got 4"):
        LFQ(18, entropy_group_bits=4)
    with pytest.raises(ValueError, match="Did you mean 'smoothed'"):
        LFQ(4, entropy="smooth")
    with pytest.raises(ValueError, match="needs 4 channels"):
        LFQ(4).apply({}, jnp.zeros((1, 5)))
