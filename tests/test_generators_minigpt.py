"""The GPT prior of VQGAN against the authors' code: logits, losses, gradients, samples, orders of tokens."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import refweights
from reference import Case, cases, relative_l2

import tokenizers
from configs import base
from tokenizers.convert import ar_prior as conversion
from tokenizers.convert import engine
from tokenizers.generators import generator, minigpt
from tokenizers.parallel import platform
from tokenizers.train import optim

# float32 in another order. Observed: logits 5e-7, of 24 layers 2e-6; gradients 2e-6, changes by AdamW 1e-5.
OUTPUT, GRADIENT = 1e-5, 1e-3


def quick(function):
    return jax.jit(function, compiler_options=platform.run_once_options())


def integers(case, key):
    entry = case.meta["inputs"][key]
    high = entry["n"] if "n" in entry else entry["high"]
    share = (refweights.uniform(entry["seed_name"], tuple(entry["shape"])).astype(np.float64) + 1) / 2
    return np.minimum(np.floor(share * high), high - 1).astype(np.int32)


def official(case, **changes):
    weights = {name: value for name, value in case.weights().items() if not name.startswith("permuter.")}
    made = tokenizers.from_official(case.meta["system"], case.meta["config"] | changes, weights)
    assert isinstance(made, minigpt.Generator)
    return made


def of_transformer(made, tree):
    return engine.to_official(conversion.TABLE, {"params": jax.device_get(tree)})


FAST = "gpt_unmasked_prefix"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == FAST else pytest.mark.slow) for name in cases("vqgan", "(full_)?gpt_.*")],
)
def test_logits_and_greedy_tokens_are_the_official_ones(name):
    case = Case("vqgan", name)
    expected, made, tokens = case.outputs, official(case), integers(case, "tokens")
    loss, logits = quick(functools.partial(minigpt.loss, made.module))(made.variables, tokens[:, :1], tokens[:, 1:])
    step = 4 if "logits" in case.meta.get("slices", {}) else 1
    assert relative_l2(logits[:, ::step], expected["logits"]) < OUTPUT
    np.testing.assert_allclose(loss, expected["loss"], rtol=OUTPUT)
    if "logits_with_prefix" in expected:
        found = quick(made.module.apply)(made.variables, tokens[:, :-1], case.input("embeddings"))
        assert relative_l2(found, expected["logits_with_prefix"]) < OUTPUT
    if "greedy_tokens" in expected:
        steps = case.meta["past_steps"]
        begin = tokens[:, :1]
        sample = made.sample(jax.random.key(0), condition=begin, steps=steps, greedy=True)
        np.testing.assert_array_equal(sample, expected["greedy_tokens"])
        # What is remembered gives the logits of the whole.
        extend = quick(functools.partial(made.module.apply, method="extend"))
        token, cache, found = begin, made.module.empty_cache(len(begin)), []
        for place in range(steps):
            logits, cache = extend(made.variables, token, cache, place)
            found.append(logits[:, -1])
            token = expected["greedy_tokens"][:, place : place + 1]
        assert relative_l2(np.stack(found, axis=1), expected["past_logits"]) < OUTPUT


@pytest.mark.parametrize("name", cases("vqgan", "net2net_.*"))
@pytest.mark.slow
def test_pictures_are_completed_as_by_the_official_code(name):
    """Pixels to tokens in the transformer's order, their loss, a greedy second half, and pixels again."""
    case = Case("vqgan", name)
    expected, made = case.outputs, official(case)
    tok = tokenizers.from_official("vqgan", *conversion.first_stage(case.meta["config"], case.weights()))
    indices = tok.encode(case.input("image")).indices
    np.testing.assert_array_equal(indices, expected["indices_raster"])
    tokens = made.to_sequence(indices)
    np.testing.assert_array_equal(tokens, expected["z_indices"])
    np.testing.assert_array_equal(made.to_grid(tokens), indices)
    labels = integers(case, "class") if "class" in case.meta["inputs"] else None
    condition = made.condition(labels, None if labels is not None else len(tokens))
    np.testing.assert_array_equal(condition, expected["c_indices"])
    loss, logits = quick(functools.partial(minigpt.loss, made.module))(made.variables, condition, tokens)
    assert relative_l2(logits, expected["logits"]) < OUTPUT
    np.testing.assert_allclose(loss, expected["loss"], rtol=OUTPUT)
    kept = np.isfinite(minigpt.filtered(logits, top_k=5)).sum(-1)
    np.testing.assert_array_equal(kept, expected["kept_top5"])
    options = {"labels": labels} if labels is not None else {"batch": len(tokens)}
    half = tokens[:, : tokens.shape[1] // 2]
    whole = made.sample(jax.random.key(0), known=half, greedy=True, **options)
    np.testing.assert_array_equal(made.to_sequence(whole), expected["completed_tokens"])
    assert relative_l2(tok.decode_indices(whole), expected["completed_image"]) < 1e-4


OFFICIAL_ORDERS = {
    "Subsample": "subsample", "ZCurve": "z_curve", "SpiralOut": "spiral_out", "SpiralIn": "spiral_in",
    "Random": "random", "AlternateParsing": "alternate",
}  # fmt: skip


@pytest.mark.parametrize("name", cases("vqgan", "permuters"))
def test_orders_of_tokens_are_the_official_ones(name):
    compared = 0
    for key, expected in Case("vqgan", name).outputs.items():
        official_name, size, way = key.split("_")
        order = minigpt.ORDERS[OFFICIAL_ORDERS[official_name]](int(size), int(size))
        np.testing.assert_array_equal(order if way == "forward" else np.argsort(order), expected, err_msg=key)
        compared += 1
    assert compared == 24


@pytest.mark.parametrize("order", sorted(minigpt.ORDERS))
def test_every_order_has_every_position_once(order):
    for grid in ((1, 1), (2, 3), (5, 4)):
        np.testing.assert_array_equal(np.sort(minigpt.ORDERS[order](*grid)), np.arange(grid[0] * grid[1]))


@pytest.mark.parametrize("name", cases("ar_prior", "small_.*"))
def test_gradients_and_samples_are_the_official_ones(name):
    case = Case("ar_prior", name)
    meta, expected, made = case.meta, case.outputs, official(case)
    ids, condition = integers(case, "ids"), integers(case, "condition")[:, None]

    def loss(params):
        return minigpt.loss(made.module, {"params": params}, condition, ids)

    (value, logits), gradients = quick(jax.value_and_grad(loss, has_aux=True))(made.variables["params"])
    assert relative_l2(logits, expected["logits"]) < OUTPUT
    np.testing.assert_allclose(value, expected["loss"], rtol=OUTPUT)
    named = of_transformer(made, gradients)
    norms = [np.linalg.norm(named[key]) for key in meta["grad_norm_names"]]
    # Gradients of the biases of keys are zero but for rounding.
    np.testing.assert_allclose(norms, expected["grad_norms"], rtol=GRADIENT, atol=1e-6 * np.max(norms))
    for key in meta["params"]["picks"]:
        theirs = expected[f"grad:{key}"]
        found = (
            named[key]
            if named[key].shape == theirs.shape
            else named[key].reshape(-1)[:: named[key].size // theirs.size]
        )
        assert relative_l2(found, theirs) < GRADIENT, key
    steps, vocabulary = ids.shape[1], meta["config"]["vocab_size"]
    for kind, options in meta["params"]["samples"].items():
        options = {("greedy" if key == "sample_logits" else key): value for key, value in options.items()}
        if "greedy" in options:
            options["greedy"] = not options["greedy"]
        noise = np.stack([gumbel(f"{meta['params']['draw_seed']}/draw{i}", (2, vocabulary)) for i in range(steps)])
        found = made.sample(None, condition=condition, steps=steps, noise=noise, **options)
        np.testing.assert_array_equal(found, expected[f"sample_{kind}"], err_msg=kind)


def gumbel(name, shape):
    """argmax(p / -log(u)) is argmax(log p + this)."""
    u = ((refweights.uniform(name, shape) + 1) / 2).astype(np.float32)
    return -np.log(-np.log(np.clip(u, 1e-7, 1 - 1e-7)))


@pytest.mark.parametrize("name", cases("vqgan", "train_gpt_pkeep"))
@pytest.mark.slow
def test_training_steps_with_corrupted_tokens_are_the_official_ones(name):
    case = Case("vqgan", name)
    meta, expected, made = case.meta, case.outputs, official(case)
    assert made.module.keep == meta["config"]["pkeep"]
    tok = tokenizers.from_official("vqgan", *conversion.first_stage(meta["config"], case.weights()))
    tokens = made.to_sequence(tok.encode(case.input("image")).indices)
    condition = made.condition(batch=len(tokens))
    config = base.optimizer(name="adamw", lr=meta["learning_rate"], b1=0.9, b2=0.95, weight_decay=0.01, clip=0.0)
    optimizer = optim.make(config, 1)[0]
    keep, drawn = integers(case, "keep") == 1, integers(case, "random_tokens")

    def loss(params):
        with (
            mock.patch.object(jax.random, "bernoulli", return_value=keep),
            mock.patch.object(jax.random, "randint", return_value=drawn),
        ):
            return minigpt.loss(made.module, {"params": params}, condition, tokens, jax.random.key(0))[0]

    @quick
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value, gradients

    params = made.variables["params"]
    state = optimizer.init(params)
    for i in range(meta["steps"]):
        before = of_transformer(made, params)
        params, state, value, gradients = step(params, state)
        after, gradients = of_transformer(made, params), of_transformer(made, gradients)
        np.testing.assert_allclose(value, expected[f"s{i}_loss"], rtol=OUTPUT)
        norms = np.array([np.linalg.norm(gradients[key]) for key in meta["grad_norm_names"]])
        np.testing.assert_allclose(norms, expected[f"s{i}_grad_norms"], rtol=GRADIENT, atol=1e-6 * norms.max())
        for key in meta["step_tensors"]:
            stored = key.replace(".", "_")
            if f"s{i}_grad__{stored}" in expected:
                assert relative_l2(gradients[key], expected[f"s{i}_grad__{stored}"]) < GRADIENT, key
            assert relative_l2(after[key] - before[key], expected[f"s{i}_delta__{stored}"]) < 1e-3, key


# What holds without the originals ------------------------------------------------------------------------------------

SMALL = {"vocabulary": 11, "block": 12, "size": (2, 16, 2), "grid": (3, 4)}


def test_likely_tokens_are_kept():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    expected = (
        ({"top_k": 2}, [0, 1, 0, 1]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 1, 0, 1]),
        ({"top_k": 3, "top_p": 0.99}, [0, 1, 1, 1]),
        ({"top_k": 9}, [1, 1, 1, 1]),
    )
    every = quick(lambda logits: [minigpt.filtered(logits, **options) for options, _ in expected])(logits)
    for found, (options, kept) in zip(every, expected, strict=True):
        np.testing.assert_array_equal(np.isfinite(found)[0], np.array(kept, bool), err_msg=str(options))
        np.testing.assert_array_equal(found[np.isfinite(found)], logits[np.isfinite(found)])


@pytest.mark.slow
def test_samples_continue_what_is_known_and_follow_the_class():
    made = generator.create("ar_prior", **SMALL, order="z_curve", classes=3, remat=True)
    made = dataclasses.replace(made, variables=jax.tree.map(lambda leaf: 20 * leaf, made.variables))
    first = made.sample(jax.random.key(0), [0, 2])
    assert first.shape == (2, 3, 4)
    known = made.to_sequence(first)[:, :5]
    again = made.sample(jax.random.key(1), [0, 2], known=known)
    np.testing.assert_array_equal(made.to_sequence(again)[:, :5], known)
    assert (again != first).any()
    assert (made.sample(jax.random.key(0), [1, 1])[0] != first[0]).any()
    for wrong in ([3], [-1], [[0]], None):
        with pytest.raises(ValueError, match="labels must be .* from 0 to 2"):
            made.sample(jax.random.key(0), wrong)
    with pytest.raises(ValueError, match="does not fit"):
        made.sample(jax.random.key(0), condition=np.zeros((1, 2), int))
    with pytest.raises(ValueError, match="steps=3 with grid"):
        made.sample(jax.random.key(0), [0], steps=3)


def test_conditions_are_those_of_the_model():
    module = generator.build("ar_prior", **SMALL, start=7)
    made = minigpt.Generator(module, {}, "ar_prior")
    np.testing.assert_array_equal(made.condition(batch=2), [[7], [7]])
    with pytest.raises(ValueError, match="needs the number of pictures as batch"):
        made.condition([1])
    with pytest.raises(ValueError, match="needs tokens as its condition"):
        minigpt.Generator(module.clone(start=None), {}, "ar_prior").condition(batch=1)
    with pytest.raises(ValueError, match="Did you mean 'spiral_in'"):
        generator.build("ar_prior", **SMALL | {"order": "spiral"})
    with pytest.raises(ValueError, match="order='random' needs a grid"):
        generator.build("ar_prior", **SMALL | {"order": "random", "grid": None})


GPT = {"vocab_size": 64, "block_size": 64}
FIRST = {"target": "taming.models.vqgan.VQModel", "params": {"ddconfig": {"resolution": 32, "ch_mult": [1, 2, 4]}}}
NET2NET = {"transformer_config": {"params": GPT}, "first_stage_config": FIRST}


def test_official_configs_are_read_strictly():
    read = conversion.fields_from_official
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    found = read({"model": {"target": "x.Net2NetTransformer", "params": NET2NET | {"cond_stage_config": labels}}})
    assert (found["grid"], found["classes"], found["size"]) == ((8, 8), 10, (12, 256, 8))
    assert read(NET2NET | {"cond_stage_config": FIRST})["start"] is None
    assert read(NET2NET | {"cond_stage_config": "__is_unconditional__", "sos_token": 5})["start"] == 5
    for config, message in (
        (GPT | {"n_layers": 3}, "key of a GPT config 'n_layers'.*n_layer"),
        (GPT | {"attn_pdrop": 0.1}, "attn_pdrop of a GPT config 0.1"),
        ({"vocab_size": 3}, "a GPT config lacks block_size"),
        (NET2NET, "lacks cond_stage_config"),
        (NET2NET | {"cond_stage_config": labels, "permuter_config": {"target": "a.Spiral"}}, "permuter 'Spiral'"),
    ):
        with pytest.raises(ValueError, match=message):
            read(config)


def test_released_sizes_have_the_published_parameter_counts():
    for name, millions in (("minigpt-cin-vqgan-f16-16384", 1411), ("minigpt-faceshq-vqgan-f16-1024", 305)):
        count = sum(leaf.size for leaf in jax.tree.leaves(generator.shapes(generator.build(name))))
        assert abs(count / 1e6 - millions) < 1, (name, count)
