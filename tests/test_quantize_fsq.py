"""Finite scalar quantization: the official numbers, exact round trips, entropies in bounded memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import Case, cases, relative_l2
from refweights import uniform

from tokenizers.quantize.fsq import FSQ

# float32 against float32 of another library: a few rounding errors, most of them in tanh.
TOLERANCE = 1e-5


def channels_last(case, key, value):
    return np.moveaxis(value, 1, -1) if case.meta["inputs"][key]["layout"].startswith("BC") else value


def linear(weights, name, x):
    if f"{name}.weight" not in weights:
        return x
    return jnp.matmul(x, weights[f"{name}.weight"].T, precision="highest") + weights[f"{name}.bias"]


@pytest.mark.parametrize("name", cases("quantizers", "fsq_(?!tables).*"))
def test_codes_indices_and_gradients_are_the_official_ones(name):
    case = Case("quantizers", name)
    config, weights = case.meta["config"], case.weights()
    fsq = FSQ(tuple(config["levels"]), symmetric=config.get("preserve_symmetry", False))
    codebooks = config.get("num_codebooks", 1)
    x, g = (channels_last(case, key, case.input(key)) for key in ("x0", "g"))

    @jax.jit
    def forward(x):
        z = linear(weights, "project_in", x)
        z = z.reshape(*z.shape[:-1], codebooks, len(config["levels"]))
        encoding = fsq.apply({}, z)
        codes = encoding.latents.reshape(*x.shape[:-1], -1)
        return linear(weights, "project_out", codes), encoding.indices

    (quantized, indices), pull = jax.vjp(forward, x)
    (grad,) = pull((jnp.asarray(g), np.zeros(indices.shape, jax.dtypes.float0)))
    expected = {key: channels_last(case, "x0", v) if v.ndim == x.ndim else v for key, v in case.outputs.items()}
    indices = indices.reshape(expected["s0_indices"].shape)
    np.testing.assert_array_equal(indices, expected["s0_indices"])
    assert relative_l2(quantized, expected["s0_quantized"]) < TOLERANCE
    assert relative_l2(grad, expected["s0_grad_x"]) < TOLERANCE


@pytest.mark.parametrize("name", cases("quantizers", "fsq_tables"))
def test_tables_are_the_official_ones(name):
    case = Case("quantizers", name)
    ramp = np.float32(np.linspace(-4, 4, 81) + 0.013)
    for key, config in case.meta["config"].items():
        fsq = FSQ(tuple(config["levels"]), symmetric=config.get("preserve_symmetry", False))
        expected = {k.removeprefix(f"{key}_"): v for k, v in case.outputs.items() if k.startswith(f"{key}_")}
        codes = fsq.apply({}, expected["indices"], method="indices_to_codes")
        np.testing.assert_allclose(codes, expected["codes"], atol=2e-7)  # one unit in the last place
        np.testing.assert_array_equal(fsq.apply({}, codes, method="codes_to_indices"), expected["indices"])
        z = np.repeat(ramp[:, None], len(config["levels"]), axis=1)
        np.testing.assert_allclose(fsq.apply({}, z).latents, expected["quantized_ramp"], atol=2e-7)


@pytest.mark.parametrize("name", cases("vidtok", "fsq_math_.*"))
def test_entropy_and_commitment_are_those_of_vidtok(name):
    case = Case("vidtok", name)
    params, weights = case.meta["config"]["params"], case.weights()
    with_losses = "entropy_loss_weight" in params
    form = "clamped" if with_losses else None
    # 40 positions at a time: several chunks, the last one incomplete.
    fsq = FSQ(tuple(params["levels"]), entropy=form, commitment=with_losses, entropy_chunk_size=40)
    n = case.meta["n_steps"][-1] // 2
    sample_weight = 0.1 if n >= 1000 else 0.1 * (3 - 2 * n / 1000)

    for key in case.meta["inputs"]:
        suffix = key.removeprefix("x")
        scale = np.float32(case.meta["inputs"][key]["post"].removeprefix("*") or 1)
        x = case.input(key) * scale
        upstream = uniform(case.meta["upstream"]["seed_name"], case.outputs[f"z{suffix}"].shape)

        @jax.jit
        def total(x, upstream=upstream):
            encoding = fsq.apply({}, linear(weights, "project_in", x), train=True)
            z = linear(weights, "project_out", encoding.latents)
            losses = encoding.losses
            aux = 0.0
            if with_losses:
                entropy = losses["entropy_sample"] - losses["entropy_codebook"]
                aux = sample_weight * entropy + 0.25 * losses["commitment"]
            return jnp.sum(z * upstream) + aux, (z, encoding, aux)

        (_, (z, encoding, aux)), grad = jax.value_and_grad(total, has_aux=True)(x)
        np.testing.assert_array_equal(encoding.indices, case.outputs[f"indices{suffix}"])
        assert relative_l2(z, case.outputs[f"z{suffix}"]) < TOLERANCE
        # The official softmax is taken at 200 <z, c>: its gradient is that much less exact than the numbers.
        assert relative_l2(grad, case.outputs[f"dz{suffix}"]) < 5e-5
        if not with_losses:
            assert encoding.losses == {}
            continue
        losses = encoding.losses
        chex.assert_trees_all_close(
            (
                losses["entropy_sample"],
                losses["commitment"],
                losses["entropy_sample"] - losses["entropy_codebook"],
                aux,
            ),
            (
                case.outputs[f"per_sample_entropy{suffix}"],
                case.outputs[f"commit{suffix}"],
                case.outputs[f"entropy_aux{suffix}"],
                case.outputs[f"aux_loss{suffix}_n{case.meta['n_steps'][-1]}"],
            ),
            rtol=TOLERANCE,
            atol=1e-6,
        )


# Two lengths only: every new shape is a new compilation.
level_lists = st.one_of(st.lists(st.integers(3, 9), min_size=n, max_size=n) for n in (1, 4))


@settings(max_examples=15, deadline=None)
@given(level_lists, st.booleans())
def test_every_index_survives_the_round_trip(levels, symmetric):
    fsq = FSQ(tuple(levels), symmetric=symmetric)
    rng = np.random.default_rng(0)
    indices = np.unique(np.concatenate([rng.integers(0, fsq.codebook_size, 500), [0, fsq.codebook_size - 1]]))
    codes = np.asarray(fsq.apply({}, indices, method="indices_to_codes"))
    np.testing.assert_array_equal(fsq.apply({}, codes, method="codes_to_indices"), indices)
    assert np.abs(codes).max() <= 1.0
    assert len(np.unique(codes, axis=0)) == len(indices)


@settings(max_examples=15, deadline=None)
@given(level_lists, st.booleans(), st.floats(0.1, 100.0))
def test_quantized_values_are_codes_of_their_indices(levels, symmetric, scale):
    fsq = FSQ(tuple(levels), symmetric=symmetric)
    z = scale * uniform("fsq/free", (3, 50, len(levels)))
    encoding = fsq.apply({}, z)
    chex.assert_shape(encoding.indices, (3, 50))
    assert encoding.indices.dtype == jnp.int32
    assert encoding.indices.min() >= 0
    assert encoding.indices.max() < fsq.codebook_size
    np.testing.assert_array_equal(fsq.apply({}, encoding.indices, method="indices_to_codes"), encoding.latents)


def test_bfloat16_input_is_computed_in_float32():
    z = jnp.asarray(2 * uniform("fsq/bf16", (4, 64, 3)), jnp.bfloat16)
    fsq = FSQ((8, 8, 8), commitment=True)
    narrow, wide = fsq.apply({}, z), fsq.apply({}, z.astype(jnp.float32))
    assert narrow.latents.dtype == jnp.float32
    chex.assert_trees_all_equal(narrow, wide)


def test_plain_quantization_has_no_loss_terms_and_evaluation_no_entropy():
    z = uniform("fsq/plain", (2, 8, 3))
    assert FSQ((8, 5, 5)).apply({}, z, train=True).losses == {}
    assert set(FSQ((8, 5, 5), entropy="clamped", commitment=True).apply({}, z).losses) == {"commitment"}


def entropies(z, chunk):
    fsq = FSQ((8, 8, 5), entropy="clamped", entropy_chunk_size=chunk, inverse_temperature=1.0)
    losses = fsq.apply({}, z, train=True).losses
    return losses["entropy_sample"] - 0.5 * losses["entropy_codebook"]


def test_chunks_change_neither_entropies_nor_gradients():
    z = 2 * uniform("fsq/chunks", (5, 9, 3))  # 45 positions
    evaluate = jax.jit(jax.value_and_grad(entropies), static_argnums=1)
    whole = evaluate(z, 45)
    for chunk in (7, 1000):
        # Only the order of float32 sums differs.
        chex.assert_trees_all_close(evaluate(z, chunk), whole, rtol=2e-5, atol=1e-7)


def test_entropies_over_a_batch_on_eight_devices_equal_one_device():
    z = 2 * uniform("fsq/sharded", (8, 9, 3))
    expected = jax.jit(jax.value_and_grad(entropies), static_argnums=1)(z, 24)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(z, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        actual = jax.jit(jax.value_and_grad(entropies), static_argnums=1)(sharded, 24)
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=1e-7)


def test_entropy_memory_grows_with_the_chunk_not_with_the_positions():
    def bytes_needed(positions):
        fsq = FSQ((8,) * 5, entropy="clamped", entropy_chunk_size=32)  # 32768 codes: 4 MiB a chunk
        z = jax.ShapeDtypeStruct((positions, 5), jnp.float32)
        loss = jax.grad(lambda z: sum(fsq.apply({}, z, train=True).losses.values()))
        return jax.jit(loss).lower(z).compile().memory_analysis().temp_size_in_bytes

    small, large = bytes_needed(64), bytes_needed(2048)
    assert large < 64 * 2**20  # the whole table would be 256 MiB
    assert large < 1.5 * small


def test_impossible_settings_are_refused():
    assert FSQ((8, 5, 5)).input_channels(3) == 3
    with pytest.raises(ValueError, match=r"levels \(8, 5, 5\) .* 3 channels, not 4"):
        FSQ((8, 5, 5)).input_channels(4)
    with pytest.raises(ValueError, match=r"at least 2 each, got \(8, 1\)"):
        FSQ((8, 1))
    with pytest.raises(ValueError, match="int32"):
        FSQ((8,) * 11)
    with pytest.raises(ValueError, match="Did you mean 'clamped'"):
        FSQ((8, 8), entropy="clampt")
    with pytest.raises(ValueError, match=r"needs 2 channels, got shape \(4, 3\)"):
        FSQ((8, 8)).apply({}, jnp.zeros((4, 3)))
