"""Entropy terms: the official functions, and memory that does not grow with positions x codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, cases, relative_l2

from tokenizers.quantize.entropy import code_entropies
from tokenizers.quantize.ibq import IBQ
from tokenizers.quantize.lfq import LFQ
from tokenizers.quantize.nearest import nearest

# float32 against float32; the softmax multiplies rounding of its input by 1 / temperature = 100.
TOLERANCE, GRADIENT = 1e-5, 1e-4


@pytest.mark.parametrize("name", cases("lfq_losses", "entropy_fn_.*|magvit_entropy_.*"))
def test_terms_and_gradients_are_the_official_ones(name):
    case = Case("lfq_losses", name)
    config, expected = case.meta["config"], case.outputs
    key = "affinity" if "magvit" in name else "logits"
    logits = case.input(key)
    mask = np.asarray(case.meta["inputs"]["mask"]["values"]) if "mask" in case.meta["inputs"] else None
    weights = config.get("sample_minimization_weight", 1.0), config.get("batch_maximization_weight", 1.0)
    form = {"argmax": "smoothed_argmax", "softmax": "smoothed"}[config.get("loss_type", "softmax")]

    def loss(logits):
        codes = jnp.eye(logits.shape[-1])
        sample, mean = code_entropies(logits, codes, 1 / config["temperature"], form, chunk_size=4, mask=mask)
        return weights[0] * sample - weights[1] * mean, (sample, mean)

    (value, terms), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    np.testing.assert_allclose(terms, [expected["sample_entropy"], expected["avg_entropy"]], rtol=TOLERANCE)
    np.testing.assert_allclose(value, expected["loss"], rtol=TOLERANCE, atol=1e-6)
    assert relative_l2(grad, expected[f"grad_{key}"]) < GRADIENT


CODES = 2**18


def temporary_bytes(function, *shapes):
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("batch", [8, 64])
def test_entropies_of_2_to_the_18_codes_need_no_table_of_positions_and_codes(batch):
    shape = (batch, 16, 16, 18)
    table = 4 * batch * 16 * 16 * CODES  # 2 and 16 GiB

    def loss(z):
        losses = LFQ(18).apply({}, z, train=True).losses
        return losses["entropy_sample"] - losses["entropy_codebook"] + losses["commitment"]

    # Two matrices (positions, 512) and their gradients, and a few arrays of 2^18: observed 26 and 138 MiB.
    assert temporary_bytes(jax.value_and_grad(loss), shape) < table / 50


@pytest.mark.parametrize("batch", [8, 64])
def test_nearest_of_2_to_the_18_codes_works_on_a_part_of_them_at_a_time(batch):
    # One part of 2^27 scores, whatever the batch: observed 0.5 GiB.
    assert temporary_bytes(nearest, (batch, 16, 16, 18), (CODES, 18)) < 1.2 * 4 * 2**27


def test_ibq_of_2_to_the_18_codes_trains_on_a_few_positions_at_a_time():
    vq = IBQ(CODES, 256, chunk_size=64)

    def loss(table, z):
        encoding = vq.apply({"params": {"codebook": table}}, z, train=True)
        return jnp.sum(encoding.latents) + sum(encoding.losses.values())

    table = 4 * 8 * 16 * 16 * CODES
    codebook = 4 * CODES * 256
    # Tables of 64 positions, and a few copies of the codebook's gradient: observed less than a half.
    used = temporary_bytes(jax.value_and_grad(loss, argnums=(0, 1)), (CODES, 256), (8, 16, 16, 256))
    assert used - 4 * codebook < table / 2
