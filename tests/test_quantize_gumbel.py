"""Gumbel-softmax: the official samples under the official noise, deterministic tokens, round trips."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, cases, relative_l2
from refweights import uniform

from tokenizers.quantize.gumbel import GumbelSoftmax, gumbel_softmax, kl_to_uniform

KEY = jax.random.key(0)


def official_noise(case, key):
    entry = case.meta["inputs"][key]
    u = (uniform(entry["seed_name"], tuple(entry["shape"])).astype(np.float64) + 1) / 2 * (1 - 2.0**-20) + 2.0**-21
    return -np.log(np.float32(-np.log(np.float32(u).astype(np.float64))))


@pytest.mark.parametrize("name", cases("vqgan", "gumbel_small_f4"))
def test_codes_are_those_of_gumbel_vqgan(name):
    case = Case("vqgan", name)
    config, expected = case.meta["config"], case.outputs
    weights = case.weights("quantize.")
    kernel = weights["proj.weight"][:, :, 0, 0].T
    variables = {
        "params": {"proj": {"kernel": kernel, "bias": weights["proj.bias"]}, "embedding": weights["embed.weight"]}
    }
    vq = GumbelSoftmax(config["n_embed"], code_dim=config["embed_dim"])
    chex.assert_trees_all_equal_shapes(variables, vq.init(KEY, expected["prequant"]))
    logits = vq.apply(variables, expected["prequant"], method="logits")
    assert relative_l2(logits, expected["logits"]) < 1e-5

    encoding = vq.apply(variables, expected["prequant"])
    np.testing.assert_array_equal(encoding.indices, expected["indices_argmax"])
    # log(q K + 1e-10) there, log q + log K here.
    np.testing.assert_allclose(config["kl_weight"] * encoding.losses["kl"], expected["kl_loss"], rtol=1e-5)

    choice, indices = gumbel_softmax(logits, official_noise(case, "gumbel_u"), case.meta["temperature"], hard=True)
    np.testing.assert_array_equal(indices, expected["indices_sampled"])
    assert relative_l2(vq.apply(variables, choice, method="mix"), expected["quant_sampled"]) < 1e-5


@pytest.mark.parametrize("name", cases("dvae", "train_derived"))
def test_relaxed_samples_are_those_of_the_dvae_formulas(name):
    """The case keeps every 8th of its 512 logits, too few for a softmax: ratios of probabilities are enough."""
    case = Case("dvae", name)
    logits, noise = case.outputs["s0_logits"], official_noise(case, "gumbel_u_0")[..., ::8]
    ours, _ = gumbel_softmax(logits, noise, case.meta["tau"][0], hard=False)
    theirs = case.outputs["s0_soft_one_hot"]
    assert relative_l2(ours, theirs / theirs.sum(-1, keepdims=True)) < 1e-5


VARIANTS = {
    "table": GumbelSoftmax(24, code_dim=6),
    "table on logits": GumbelSoftmax(24, code_dim=6, project=False),
    "one-hot": GumbelSoftmax(24, project=False, hard=False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_index_survives_the_round_trip(name):
    vq = VARIANTS[name]
    variables = vq.init(KEY, jnp.zeros((1, 24)))
    indices = jnp.arange(24).reshape(4, 6)
    codes = vq.apply(variables, indices, method="indices_to_codes")
    np.testing.assert_array_equal(vq.apply(variables, codes, method="codes_to_indices"), indices)


@pytest.mark.parametrize("name", VARIANTS)
def test_evaluation_is_the_code_of_the_argmax_without_randomness(name):
    vq = VARIANTS[name]
    z = 3 * uniform("gumbel/eval", (2, 5, 24))
    variables = vq.init(KEY, z)
    encoding = vq.apply(variables, z)
    np.testing.assert_array_equal(encoding.indices, jnp.argmax(vq.apply(variables, z, method="logits"), -1))
    np.testing.assert_array_equal(encoding.latents, vq.apply(variables, encoding.indices, method="indices_to_codes"))


def test_a_hard_sample_is_a_table_row_with_gradients_for_logits_and_table():
    vq = VARIANTS["table"]
    z = uniform("gumbel/hard", (2, 9, 8))
    variables = vq.init(KEY, z)

    @jax.jit
    def sample(variables, z):
        encoding = vq.apply(variables, z, train=True, temperature=0.5, rngs={"bottleneck": KEY})
        return jnp.sum(encoding.latents * uniform("gumbel/g", encoding.latents.shape)), encoding

    grads, encoding = jax.grad(sample, argnums=(0, 1), has_aux=True)(variables, z)
    codes = vq.apply(variables, encoding.indices, method="indices_to_codes")
    np.testing.assert_allclose(encoding.latents, codes, atol=1e-6)  # a sum over one-hot weights
    for gradient in jax.tree.leaves(grads):
        assert jnp.any(gradient != 0)


def test_a_lower_temperature_makes_relaxed_samples_harder_in_one_compilation():
    vq = VARIANTS["one-hot"]
    z = uniform("gumbel/tau", (400, 24))
    traces = []

    @jax.jit
    def peak(temperature):
        traces.append(1)
        latents = vq.apply({}, z, train=True, temperature=temperature, rngs={"bottleneck": KEY}).latents
        return jnp.mean(jnp.max(latents, axis=-1)), jnp.sum(latents, axis=-1)

    peaks = [peak(jnp.float32(t)) for t in (4.0, 1.0, 1 / 16)]
    assert peaks[0][0] < peaks[1][0] < peaks[2][0]
    assert peaks[2][0] > 0.9
    np.testing.assert_allclose(peaks[0][1], 1.0, atol=1e-5)
    assert len(traces) == 1
    fixed = GumbelSoftmax(24, project=False, hard=False, temperature=4.0)
    latents = fixed.apply({}, z, train=True, rngs={"bottleneck": KEY}).latents
    np.testing.assert_allclose(jnp.mean(jnp.max(latents, axis=-1)), peaks[0][0], rtol=1e-5)


def test_samples_follow_the_probabilities():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
    vq = GumbelSoftmax(3, project=False)
    z = jnp.broadcast_to(logits, (20000, 3))
    indices = vq.apply({}, z, train=True, rngs={"bottleneck": KEY}).indices
    # Three standard deviations of a frequency over 20000 draws are 0.011.
    np.testing.assert_allclose(jnp.bincount(indices, length=3) / 20000, [0.5, 0.3, 0.2], atol=0.011)


def test_kl_is_zero_for_equal_logits_and_log_k_for_a_certain_choice():
    np.testing.assert_allclose(kl_to_uniform(jnp.full((4, 16), 3.0)), 0.0, atol=1e-6)
    np.testing.assert_allclose(kl_to_uniform(100.0 * jnp.eye(16)), np.log(16), rtol=1e-6)


def test_bfloat16_input_is_computed_in_float32():
    vq = VARIANTS["table"]
    z = jnp.asarray(uniform("gumbel/bf16", (2, 5, 8)), jnp.bfloat16)
    variables = vq.init(KEY, z)
    narrow, wide = vq.apply(variables, z), vq.apply(variables, z.astype(jnp.float32))
    assert narrow.latents.dtype == jnp.float32
    chex.assert_trees_all_equal(narrow, wide)


def test_input_channels_are_logits_or_what_is_projected_to_them():
    assert VARIANTS["table"].input_channels(6) == 6
    assert VARIANTS["table on logits"].input_channels(6) == 24
    assert VARIANTS["one-hot"].input_channels(24) == 24
    with pytest.raises(ValueError, match="latents of 6 channels, not 7"):
        VARIANTS["table"].input_channels(7)


def test_logits_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"needs 24 logits, got shape \(2, 8\)"):
        VARIANTS["one-hot"].apply({}, jnp.zeros((2, 8)))
