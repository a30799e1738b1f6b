"""Residual and grouped quantization: official numbers over training steps, exact round trips, coarse to fine."""

import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Case, cases, normal, relative_l2
from refweights import image_like

import tokenizers
from tokenizers import registry
from tokenizers.parallel import mesh as meshes
from tokenizers.quantize.bsq import BSQ
from tokenizers.quantize.fsq import FSQ
from tokenizers.quantize.gradients import unit_norm
from tokenizers.quantize.grouped import Grouped
from tokenizers.quantize.lfq import LFQ
from tokenizers.quantize.residual import Residual, residual_fsq, residual_lfq
from tokenizers.quantize.simvq import SimVQ
from tokenizers.quantize.vq import VectorQuantizer

# float32 against float32 of another library: only the order of sums differs.
TOLERANCE = 1e-5
KEY = jax.random.key(0)


def linear(weights, name, x):
    if f"{name}.weight" not in weights:
        return x
    return jnp.matmul(x, weights[f"{name}.weight"].T, precision="highest") + weights[f"{name}.bias"]


def training(case, bottleneck, weigh):
    """A jitted ``(variables, x) -> (quantized, indices, loss, new variables, gradient in x)`` with its projections."""
    weights = {k: v for k, v in case.weights().items() if k.startswith("project")}
    g = case.input("g")

    @jax.jit
    def step(variables, x):
        def objective(x):
            encoding, new = bottleneck.apply(
                variables, linear(weights, "project_in", x), True, rngs={"bottleneck": KEY}, mutable=["codebook"]
            )
            quantized, loss = linear(weights, "project_out", encoding.latents), weigh(encoding.losses)
            return jnp.sum(quantized * g) + loss, (quantized, encoding.indices, loss, new)

        grad, (quantized, indices, loss, new) = jax.grad(objective, has_aux=True)(x)
        return quantized, indices, loss, {**variables, **new}, grad

    return step, lambda codes: linear(weights, "project_out", codes), lambda x: linear(weights, "project_in", x)


def check(case, bottleneck, variables, weigh, follow=None):
    """All steps of a case, then evaluation and the way back from indices."""
    expected = case.outputs
    step, project_out, project_in = training(case, bottleneck, weigh)
    for i in range(case.meta["steps"]):
        quantized, indices, loss, variables, grad = step(variables, case.input(f"x{i}"))
        np.testing.assert_array_equal(indices, expected[f"s{i}_indices"])
        assert relative_l2(quantized, expected[f"s{i}_quantized"]) < TOLERANCE
        if f"s{i}_loss" in expected:
            np.testing.assert_allclose(loss, np.sum(expected[f"s{i}_loss"]), rtol=TOLERANCE)
        assert relative_l2(grad, expected[f"s{i}_grad_x"]) < 5 * TOLERANCE
        if follow is not None:
            follow(variables["codebook"], i)
    encoding = bottleneck.apply(variables, project_in(case.input("x0")))
    np.testing.assert_array_equal(encoding.indices, expected["eval_indices"])
    assert relative_l2(project_out(encoding.latents), expected["eval_quantized"]) < TOLERANCE
    codes = bottleneck.apply(variables, encoding.indices, method="indices_to_codes")
    assert relative_l2(project_out(codes), expected["eval_quantized"]) < TOLERANCE
    if "from_indices" in expected:
        assert relative_l2(project_out(codes), expected["from_indices"]) < TOLERANCE


def table_state(codes):
    state = {"codes": codes, "cluster_size": np.ones(len(codes)), "embed_avg": codes, "initialised": True}
    return {name: jnp.asarray(value, bool if name == "initialised" else jnp.float32) for name, value in state.items()}


@pytest.mark.parametrize("name", cases("quantizers", "residual_vq|residual_vq_(dropout|shared|projection)|vq_heads_.*"))
def test_vector_quantizers_in_a_row_or_side_by_side_are_the_official_ones(name, monkeypatch):
    case = Case("quantizers", name)
    config, tables = case.meta["config"], case.input("codebook")
    tables = tables if tables.ndim == 3 else tables[None]
    layer = VectorQuantizer(
        config["codebook_size"],
        tables.shape[-1],
        learning="ema",
        decay=config.get("decay", 0.8),
        estimator="rotation_trick" if config.get("rotation_trick", True) else "straight_through",
    )
    repeat = 1
    if config.get("shared_codebook"):
        tables, repeat = tables[:1], config["num_quantizers"]
    layers = tuple(layer.clone() for _ in tables)
    bottleneck, kind = (
        (Grouped(layers, parts=config["heads"] // len(layers)), "groups")
        if "heads" in config
        else (Residual(layers, fewest=config.get("quantize_dropout_cutoff_index", -1) + 1, repeat=repeat), "layers")
    )
    if "forward_kwargs" in case.meta:  # the authors draw the last layer that is used
        seed = case.meta["forward_kwargs"]["rand_quantize_dropout_fixed_seed"]
        last = random.Random(seed).randrange(config["quantize_dropout_cutoff_index"], config["num_quantizers"])
        monkeypatch.setattr(jax.random, "randint", lambda *_: jnp.int32(last + 1))
    variables = {"codebook": {f"{kind}_{i}": table_state(table) for i, table in enumerate(tables)}}
    shapes = jax.eval_shape(
        bottleneck.init,
        KEY,
        jnp.zeros((1, config.get("codebook_dim", config["dim"]) if kind == "layers" else config["dim"])),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(dict(shapes), variables)

    def follow(state, i):
        for key, theirs in (("codes", "embed"), ("cluster_size", "cluster_size")):
            ours = np.stack([state[f"{kind}_{layer}"][key] for layer in range(len(tables))])
            stored = case.outputs[f"s{i}_{theirs}"][: len(tables)]
            assert relative_l2(ours, stored.reshape(ours.shape)) < TOLERANCE

    check(case, bottleneck, variables, lambda losses: losses["commitment"], follow)


@pytest.mark.parametrize("name", cases("quantizers", "vq_codebook_dim_projection"))
def test_a_narrow_codebook_between_projections_is_the_official_one(name):
    case = Case("quantizers", name)
    config = case.meta["config"]
    vq = VectorQuantizer(
        config["codebook_size"],
        config["codebook_dim"],
        distance="cosine",
        learning="ema",
        decay=0.8,
        estimator="rotation_trick",
    )
    variables = {"codebook": table_state(np.asarray(unit_norm(case.input("codebook"))))}

    def follow(state, i):
        assert relative_l2(state["codes"], case.outputs[f"s{i}_embed"][0]) < TOLERANCE

    check(case, vq, variables, lambda losses: config["commitment_weight"] * losses["commitment"], follow)


@pytest.mark.parametrize("name", cases("quantizers", "residual_sim_vq"))
def test_residual_simvq_is_the_official_one(name):
    case = Case("quantizers", name)
    config, tables = case.meta["config"], case.input("codebook")
    layers = tuple(SimVQ(config["codebook_size"], config["dim"], estimator="rotation_trick") for _ in tables)
    weights = case.weights()
    variables = {
        "codebook": {f"layers_{i}": {"table": jnp.asarray(table)} for i, table in enumerate(tables)},
        "params": {
            f"layers_{i}": {"kernel": weights[f"layers.{i}.code_transform.weight"].T} for i in range(len(tables))
        },
    }
    check(case, Residual(layers), variables, lambda losses: losses["codebook"] + 0.25 * losses["commitment"])


@pytest.mark.parametrize("name", cases("quantizers", "residual_fsq"))
def test_residual_fsq_is_the_official_one(name):
    case = Case("quantizers", name)
    config = case.meta["config"]
    check(case, residual_fsq(tuple(config["levels"]), config["num_quantizers"]), {}, lambda losses: 0.0)


@pytest.mark.parametrize("name", cases("quantizers", "residual_lfq"))
def test_residual_lfq_is_the_official_one(name):
    case = Case("quantizers", name)
    config = case.meta["config"]
    bottleneck = residual_lfq(config["dim"], config["num_quantizers"], bit_order="big", entropy="clamped")

    def weigh(losses):
        return config["entropy_loss_weight"] * (losses["entropy_sample"] - losses["entropy_codebook"])

    check(case, bottleneck, {}, weigh)


# Properties -------------------------------------------------------------------------------------------------------

GROUPS = {
    "fsq": Grouped((FSQ((5, 5, 3)), FSQ((3, 5, 5)))),
    "lfq": Grouped((LFQ(4), LFQ(4), LFQ(4))),
    "one lfq": Grouped((LFQ(4),), parts=3),
    "bsq": Grouped((BSQ(6, group_bits=3), BSQ(6, group_bits=2))),
    "vq": Grouped(tuple(VectorQuantizer(17, 3, codebook_init=jax.nn.initializers.normal(1.0)) for _ in range(2))),
}


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(GROUPS)), st.integers(0, 100))
def test_every_index_of_groups_survives_the_round_trip(name, seed):
    grouped = GROUPS[name]
    indices = np.random.default_rng(seed).integers(0, grouped.codebook_size, (7, 5, grouped.codebooks))
    channels = {"fsq": 6, "lfq": 12, "one lfq": 12, "bsq": 12, "vq": 6}[name]
    variables = grouped.init(KEY, jnp.zeros((1, channels)))
    codes = grouped.apply(variables, indices, method="indices_to_codes")
    chex.assert_shape(codes, (7, 5, channels))
    np.testing.assert_array_equal(grouped.apply(variables, codes, method="codes_to_indices"), indices)
    assert grouped.input_channels(channels) == channels


LAYERS = {
    "fsq": residual_fsq((5, 4, 3), 3),
    "lfq": residual_lfq(5, 4),
    "vq": Residual(tuple(VectorQuantizer(17, 3, codebook_init=jax.nn.initializers.normal(s)) for s in (1.0, 0.3))),
}


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(LAYERS)), st.integers(0, 100))
def test_indices_of_residual_codes_lead_back_to_the_codes(name, seed):
    residual = LAYERS[name]
    z = np.random.default_rng(seed).normal(size=(2, 9, 5 if name == "lfq" else 3))
    variables = residual.init(KEY, z)
    encoding = residual.apply(variables, z)
    chex.assert_shape(encoding.indices, (2, 9, residual.codebooks))
    codes = residual.apply(variables, encoding.indices, method="indices_to_codes")
    np.testing.assert_allclose(codes, encoding.latents, atol=1e-6)
    # Quantizing a code again may name it in another way, at the same place.
    again = residual.apply(variables, codes, method="codes_to_indices")
    if name == "lfq":
        np.testing.assert_array_equal(again, encoding.indices)


@pytest.mark.parametrize("name", ["lfq", "vq"])
def test_every_layer_brings_the_code_closer(name):
    residual = LAYERS[name]
    z = 0.8 * normal(f"residual/{name}", (400, 5 if name == "lfq" else 3))
    variables = residual.init(KEY, z)
    indices = residual.apply(variables, z).indices
    errors = [
        jnp.mean(jnp.square(z - residual.apply(variables, indices[:, : n + 1], method="indices_to_codes")))
        for n in range(residual.codebooks)
    ]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False)), errors


def test_statistics_of_layers_on_eight_devices_are_those_of_one():
    residual = Residual(tuple(VectorQuantizer(16, 4, learning="ema", kmeans_iterations=2) for _ in range(2)))
    z = normal("residual/sharded", (8, 5, 4))
    variables = residual.init(KEY, z)

    def step(variables, z):
        return residual.apply(variables, z, train=True, mutable=["codebook"], rngs={"bottleneck": KEY})

    expected = jax.jit(step)(variables, z)
    mesh = meshes.make_mesh(data=4, fsdp=2, context=1)
    with jax.set_mesh(mesh):
        actual = jax.jit(step)(variables, meshes.global_batch(mesh, z))
    # Only the order of float32 sums differs.
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["residual", "grouped"])
def test_any_model_takes_them_and_a_position_has_several_tokens(kind):
    entry = {"name": "lfq", "bits": 3, "entropy": None}
    where = "layers" if kind == "residual" else "groups"
    bottleneck = {"name": kind, where: (entry, entry)}
    channels = 3 if kind == "residual" else 6
    small = {"channels": (8,), "patch": 2, "space_down": (True,), "time_down": (True,), "latent_channels": channels}
    tok = tokenizers.create("causal3d", bottleneck=bottleneck, **small)
    # Written as data, and made again of it.
    assert registry.build("causal3d", **registry.fields_of(tok.module)) == tok.module
    assert (tok.spec.codebook_size, tok.spec.codebooks, tok.spec.bits_per_token) == (8, 2, 6.0)
    encoding = tok.encode(image_like("residual/clip", (1, 3, 8, 8, 3)))
    chex.assert_shape(encoding.indices, (1, 2, 2, 2, 2))
    chex.assert_shape(encoding.latents, (1, 2, 2, 2, channels))
    np.testing.assert_allclose(tok.decode_indices(encoding.indices), tok.decode(encoding.latents), atol=1e-6)


def test_impossible_layers_are_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        Residual(())
    with pytest.raises(ValueError, match="at least one group"):
        Grouped(())
    with pytest.raises(ValueError, match="parts=2 needs a single group, got 2"):
        Grouped((LFQ(3), LFQ(3)), parts=2)
    with pytest.raises(ValueError, match="2 layers need as many scales"):
        Residual((LFQ(3), LFQ(3)), scales=(1.0,))
    with pytest.raises(ValueError, match="need one codebook size, got"):
        _ = Residual((LFQ(3), FSQ((5, 5, 5)))).codebook_size
    with pytest.raises(ValueError, match="2 groups do not divide 5 channels"):
        Grouped((LFQ(3), LFQ(3))).input_channels(5)
    with pytest.raises(ValueError, match="indices of 2 groups"):
        Grouped((LFQ(3), LFQ(3))).apply({}, jnp.zeros((4, 3), int), method="indices_to_codes")
