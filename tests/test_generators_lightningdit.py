"""LightningDiT and its flow matching against the authors' code: velocities, losses, gradients, samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import Case, cases, relative_l2

import tokenizers
from tokenizers.convert import engine
from tokenizers.convert import lightningdit as conversion
from tokenizers.generators import flow, generator, lightningdit
from tokenizers.parallel import platform

SYSTEM = "lightningdit"
# float32 in another order. Observed: velocities 1e-6, losses 3e-7, gradients 5e-6.
OUTPUT, LOSS, GRADIENT = 1e-5, 1e-5, 1e-3


def official(case):
    return tokenizers.from_official(SYSTEM, case.meta["config"], case.weights())


def quick(function):
    return jax.jit(function, compiler_options=platform.run_once_options())


def full_is_slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name.startswith("full") else name for name in names]


@pytest.mark.parametrize("name", full_is_slow(cases(SYSTEM, "(small|full)_.*")))
def test_velocities_are_the_official_ones(name):
    case = Case(SYSTEM, name)
    made = official(case)
    x, t, labels = (case.input(key) for key in ("x", "t", "y"))
    run = functools.partial(made.module.apply, capture_intermediates=lambda module, _: module.name == "time_out")
    velocity, seen = quick(run)(made.variables, x, jnp.asarray(t, jnp.float32), labels)
    assert relative_l2(velocity, case.outputs["velocity"]) < OUTPUT
    assert relative_l2(seen["intermediates"]["condition"]["time_out"]["__call__"][0], case.outputs["t_embed"]) < OUTPUT
    if "t_freq" in case.outputs:
        assert relative_l2(lightningdit.time_features(jnp.asarray(t)), case.outputs["t_freq"]) < OUTPUT


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(SYSTEM, "train_.*"))
def test_a_training_step_is_the_official_one(name):
    case = Case(SYSTEM, name)
    run, made = case.meta["run"], official(case)
    matching = flow.Flow(cosine=run["transport"]["use_cosine_loss"])
    data, noise, t, labels = (jnp.asarray(case.input(key)) for key in ("x1", "noise", "t", "y"))

    def loss(params):
        x, _ = matching.mix(data, noise, t)
        predicted = made.module.apply({"params": params}, x, t, labels)
        parts = matching.losses(predicted, data, noise, t)
        return sum(part.mean() for part in parts.values()), (predicted, parts)

    (total, (predicted, parts)), grads = quick(jax.value_and_grad(loss, has_aux=True))(made.variables["params"])
    assert relative_l2(predicted, case.outputs["pred"]) < OUTPUT
    np.testing.assert_allclose(total, case.outputs["loss_total"][0], rtol=LOSS)
    np.testing.assert_allclose(parts["flow"], case.outputs["loss_per_sample"], rtol=LOSS)
    if "cosine" in parts:
        np.testing.assert_allclose(parts["cosine"], case.outputs["cos_loss_per_sample"], rtol=LOSS)
    np.testing.assert_allclose(optax.tree.norm(grads), case.outputs["gradnorm_all"][0], rtol=GRADIENT)
    adam = optax.adamw(run["lr"], b1=0.9, b2=run["beta2"], weight_decay=0.0)
    updates, _ = adam.update(grads, adam.init(grads), made.variables["params"])
    params = optax.apply_updates(made.variables["params"], updates)
    average = jax.tree.map(lambda old, new: 0.9999 * old + 0.0001 * new, made.variables["params"], params)
    named = {
        key: engine.to_official(conversion.TABLE, {"params": jax.device_get(tree)})
        for key, tree in (("grad", grads), ("after", params), ("ema", average))
    }
    for key in run["grad_tensors"]:
        assert relative_l2(named["grad"][key], case.outputs[f"grad:{key}"]) < GRADIENT, key
        # The first step of Adam is the sign of the gradient, also where that is rounding: 2 % of a step is nothing.
        apart = np.abs(named["after"][key] - case.outputs[f"after:{key}"])
        assert (apart < 0.02 * run["lr"]).mean() > 0.99, key
        np.testing.assert_allclose(named["ema"][key], case.outputs[f"ema:{key}"], atol=1e-6)


@pytest.mark.parametrize("name", cases(SYSTEM, "sample_.*"))
def test_samples_are_the_official_ones(name):
    case = Case(SYSTEM, name)
    made, noise, labels = official(case), case.input("z"), case.input("y")
    for wanted in case.meta["run"]["cases"]:
        at = flow.times(wanted["num_steps"], wanted["shift"])
        if wanted["method"] == "euler":
            np.testing.assert_allclose(at, case.outputs[f"times_{wanted['name']}"], atol=1e-6)
            assert len(at) - 1 == case.outputs[f"nfe_{wanted['name']}"][0]
        sample = made.sample(
            None,
            labels,
            noise=noise,
            points=wanted["num_steps"],
            shift=wanted["shift"],
            sampler=wanted["method"],
            guidance=wanted["cfg_scale"],
            guidance_start=wanted["cfg_interval_start"] if wanted["cfg_interval"] else None,
        )
        # Both adaptive methods keep their own errors below 1e-3 of the values.
        tolerance = OUTPUT if wanted["method"] == "euler" else 1e-3
        assert relative_l2(sample, case.outputs[f"sample_{wanted['name']}"]) < tolerance, wanted["name"]
    given = case.meta["run"]["cfg_forward"]
    network = functools.partial(made.module.apply, made.variables)
    for when in ("low", "high"):
        run = flow.guided(network, given["scale"], start=given["start"])
        t = jnp.full(len(labels), given[f"t_{when}"])
        guided = quick(run)(noise, t, labels, jnp.full_like(labels, made.module.classes))
        assert relative_l2(guided, case.outputs[f"cfg_forward_{when}"][: len(labels)]) < OUTPUT


PATHS = {"Linear": "linear", "GVP": "cosine", "VP": "variance_preserving"}


@pytest.mark.parametrize("name", cases(SYSTEM, "transport_paths"))
def test_paths_and_predictions_are_the_official_ones(name):
    case = Case(SYSTEM, name)
    data, noise, predicted, t = (jnp.asarray(case.input(key)) for key in ("x1", "x0", "model_output", "t"))
    compared = 0
    for key, expected in case.outputs.items():
        kind, path, *rest = key.split("_")
        options = {"prediction": rest[0], "weighting": None if rest[1] == "None" else rest[1]} if rest else {}
        matching = flow.Flow(PATHS[path], cosine=kind == "cos", **options)
        x, velocity = matching.mix(data, noise, t)
        found = {
            "xt": lambda: x,  # noqa: B023
            "ut": lambda: velocity,  # noqa: B023
            "loss": lambda: matching.losses(predicted, data, noise, t)["flow"],  # noqa: B023
            "cos": lambda: matching.losses(predicted, data, noise, t)["cosine"],  # noqa: B023
            "drift": lambda: matching.velocity(predicted, x, t),  # noqa: B023
        }[kind]()
        assert relative_l2(found, expected) < 1e-4, key  # the variance-preserving path takes differences near 1
        compared += 1
    assert compared == len(case.outputs)


# What holds without the originals ------------------------------------------------------------------------------------

SMALL = {"channels": 4, "grid": (4, 4), "size": (2, 16, 2), "classes": 3}


def test_a_new_one_predicts_nothing_and_can_be_sampled():
    made = generator.create("lightningdit", **SMALL)
    sample = made.sample(jax.random.key(0), [0, 3], points=3)
    assert sample.shape == (2, 4, 4, 4)
    np.testing.assert_allclose(sample, jax.random.normal(jax.random.key(0), sample.shape))  # its last layer is zero
    for wrong in ([4], [-1], [[0]]):
        with pytest.raises(ValueError, match=r"from 0 to 3 \(none\)"):
            made.sample(jax.random.key(0), wrong)
    with pytest.raises(ValueError, match="Did you mean 'euler'"):
        made.sample(jax.random.key(0), [0], sampler="eular")


def test_labels_are_hidden_in_training_alone():
    made = generator.create("lightningdit", **SMALL, label_dropout=0.5)
    params = jax.tree.map(lambda leaf: leaf + 0.1, made.variables["params"])
    x, t = jnp.ones((64, 4, 4, 4)), jnp.full(64, 0.5)

    def run(labels, **options):
        return np.asarray(made.module.apply({"params": params}, x, t, jnp.full(64, labels), **options))[:, 0, 0, 0]

    shown, hidden = run(1), run(3)
    assert np.ptp(shown) < 1e-5
    train = run(1, train=True, rngs={"dropout": jax.random.key(0)})
    is_hidden = np.abs(train - hidden) < 1e-5
    np.testing.assert_allclose(train[~is_hidden], shown[~is_hidden], atol=1e-5)
    assert 16 < is_hidden.sum() < 48


def test_times_of_training_follow_their_distribution():
    drawn = flow.Flow(time_mean=-0.75, time_std=1.0).draw_times(jax.random.key(0), 4000)
    logits = np.log(drawn / (1 - drawn))
    np.testing.assert_allclose([logits.mean(), logits.std()], [-0.75, 1.0], atol=0.06)
    drawn = flow.Flow(time_std=None).draw_times(jax.random.key(0), 4000)
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [0.5, 12**-0.5], atol=0.02)


def test_official_files_and_configs_are_read_strictly():
    name = cases(SYSTEM, "small_released_style")[0]
    case = Case(SYSTEM, name)
    state = case.weights()
    wrapped = {f"ema.module.{key}": value for key, value in state.items()} | {"opt.step": np.zeros(1)}
    made = tokenizers.from_official(SYSTEM, case.meta["config"], wrapped)
    back = engine.to_official(conversion.TABLE, jax.device_get(dict(made.variables)))
    assert set(back) == {key for key in state if key not in case.meta["buffers_computed"]}
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key])
    del state["final_layer.linear.bias"]
    with pytest.raises(ValueError, match=r"missing 'final_layer\.linear\.bias'"):
        tokenizers.from_official(SYSTEM, case.meta["config"], state)
    with pytest.raises(ValueError, match="config 'use_ropes'.*use_rope"):
        conversion.fields_from_official({"use_ropes": True})


def test_released_sizes_have_the_published_parameter_counts():
    for name, millions in (("lightningdit-xl-vavae-f16d32", 675), ("lightningdit-b-vtp-f16d64", 130)):
        count = sum(leaf.size for leaf in jax.tree.leaves(generator.shapes(generator.build(name))))
        assert abs(count / 1e6 - millions) < 1, name
