"""A generator is trained by the loop that trains tokenizers: exactly resumable, over any mesh, from latents on disk."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tiny_run
import toys
from reference import Case, relative_l2

import tokenizers
from configs import base
from tokenizers.convert import engine
from tokenizers.convert import lightningdit as conversion
from tokenizers.data.latents import LatentFolder
from tokenizers.data.pipeline import Pipeline
from tokenizers.generation.latents import Coder, extract
from tokenizers.generators.flow import Flow
from tokenizers.parallel.mesh import global_batch, make_mesh
from tokenizers.train import build, dryrun, loop, matching
from tokenizers.train.config import to_dict
from tokenizers.train.step import make_step

SHAPE = (4, 4, 2)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    stream = {"resolutions": ((16, 16),), "batch_size": 32}
    data = Pipeline({"source": "shapes", "drawings": 64, "streams": {"image": stream}}, split="once")
    coder = Coder(toys.image("continuous"), (16, 16), "mean")
    return extract(coder, data, tmp_path_factory.mktemp("latents") / "made").path


def config(latents, **changes):
    made = base.get_generator()
    made.steps, made.ema_decay, made.compilation_cache = 6, 0.9, ""
    made.model.update({"size": (1, 16, 2)})
    made.optimizer.lr = 1e-2
    made.data.update({"path": str(latents), "batch_size": 16})
    made.log.update({"every": 1, "tensorboard": False})
    made.checkpoint.update({"every": 2, "keep_best": 0})
    made.mesh.update({"data": 1})
    made.flow.cosine = False
    made.model.update(changes.pop("model", {}))
    made.update_from_flattened_dict(changes)
    return made


@pytest.fixture(scope="module")
def finished(latents, tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        toys.use_one_device(patch)
        assert loop.run(config(latents), folder)
    return folder


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(finished, latents, tmp_path, one_device):
    loop.run(config(latents, steps=3), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")  # as if killed between step 2 and 3
    assert loop.run(config(latents), tmp_path / "run")
    assert tiny_run.curve(tmp_path / "run") == tiny_run.curve(finished)
    ours, theirs = (matching.load(folder).variables for folder in (tmp_path / "run", finished))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert [line["frames"] for line in tiny_run.curve(finished)] == [16, 32, 48, 64, 80, 96]
    assert "2 channels, 64 classes" in (finished / "summary.txt").read_text()
    with pytest.raises(ValueError, match=r"flow.time_mean: 0.0 -> -0.5"):
        loop.run(config(latents, **{"flow.time_mean": -0.5}), finished)


def test_a_run_can_start_from_another_ones_weights(finished, latents):
    settings = matching.resolve(to_dict(config(latents, init_from=str(finished))))
    mesh = make_mesh(devices=jax.devices()[:1])
    state = build.initial_state(settings, build.recipe(settings), mesh)
    wanted = matching.load(finished).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, state.params["model"], wanted)
    jax.tree.map(np.testing.assert_array_equal, state.ema, wanted)


def test_shape_and_classes_are_those_of_the_latents(latents, tmp_path, one_device):
    with pytest.raises(ValueError, match=r"config.model.channels=3, but the latents in .* have 2"):
        loop.run(config(latents, **{"model": {"channels": 3}}), tmp_path / "run")
    with pytest.raises(ValueError, match="Extract them first"):
        loop.run(config(tmp_path), tmp_path / "run")
    with pytest.raises(ValueError, match="batch_size=16 must be a multiple of .* accumulate=3"):
        loop.run(config(latents, accumulate=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def parts(latents, devices, **changes):
    """(state, step) of a config over a mesh."""
    settings = matching.resolve(to_dict(config(latents, **changes)))
    where = settings["mesh"]
    mesh = make_mesh(where["data"], where["fsdp"], devices=jax.devices()[:devices])
    recipe = build.recipe(settings)
    with jax.set_mesh(mesh):
        state = build.initial_state(settings, recipe, mesh)
        program = jax.jit(make_step(recipe), out_shardings=build.out_shardings(state, mesh))

    def step(state, batch):
        with jax.set_mesh(mesh):
            inputs = {name: global_batch(mesh, value) for name, value in recipe.inputs(batch).items()}
            return program(state, {}, inputs)

    return state, step


def losses(latents, count, devices=1, **changes):
    batches = build.data(to_dict(config(latents)), 0, 1)
    state, step = parts(latents, devices, **changes)
    found = []
    for number in range(count):
        state, metrics = step(state, batches.batch(number))
        found.append(float(metrics["loss/generator"]))
    assert int(metrics["skipped"]) == 0
    return found


def test_training_learns(latents):
    found = losses(latents, 60, **{"optimizer.lr": 5e-3})
    # Of normalized latents and noise, whoever predicts nothing is wrong by 2.
    assert abs(found[0] - 2) < 0.2
    assert np.mean(found[-20:]) < 1.7


def test_latents_that_are_not_finite_change_nothing_but_counters(latents):
    batch = build.data(to_dict(config(latents)), 0, 1).batch(0)
    first, step = parts(latents, 1)
    spoiled = batch | {"latents": np.array(batch["latents"])}
    spoiled["latents"][3, 1, 2] = np.nan
    state, metrics = step(first, spoiled)
    assert not np.isfinite(metrics["loss/generator"])
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (1, 1, 1)
    tiny_run.only_counters_differ(state, first)


@pytest.mark.slow
def test_neither_mesh_nor_micro_batches_change_a_run(latents):
    # Sums in another order.
    over_mesh = losses(latents, 3, 8, **{"mesh.data": 2, "mesh.fsdp": 4, "mesh.smallest": 1})
    np.testing.assert_allclose(over_mesh, losses(latents, 3), rtol=1e-4)
    in_parts, whole = (losses(latents, 3, accumulate=count, model={"label_dropout": 0.0}) for count in (2, 1))
    np.testing.assert_allclose(in_parts, whole, rtol=1e-4)


@pytest.mark.slow
def test_a_dry_run_needs_no_latents(latents):
    tiny = config("", **{"data.batch_size": 16, "model": {"grid": (4, 4), "channels": 2, "classes": 3}})
    tiny.mesh.update({"data": 2, "fsdp": 4})
    (program,) = dryrun.compile_steps(tiny)
    assert "latents (16, 4, 4, 2)" in program.inputs
    assert program.flops > 0
    tiny.data.path = str(latents)  # which have other classes
    with pytest.raises(ValueError, match=r"config.model.classes=3, but the latents in .* have 64"):
        next(dryrun.compile_steps(tiny))


def test_times_become_uniform_when_the_recipe_says_so(latents):
    settings = matching.resolve(to_dict(config(latents, **{"flow.uniform_from": 5})))
    recipe = build.recipe(settings)
    assert recipe.at(4).flow == Flow(cosine=False)
    assert recipe.at(5).flow.time_std is None
    assert recipe.at(4).program != recipe.at(5).program
    assert recipe.at(5).told() == ["uniform times"]
    assert LatentFolder(latents).shape == SHAPE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_small", "train_small_nocos"])
def test_gradients_are_the_official_ones(name):
    case = Case("lightningdit", name)
    made = tokenizers.from_official("lightningdit", case.meta["config"], case.weights())
    whole = matching.Matching(
        model=made.module.clone(label_dropout=0.0),
        flow=Flow(cosine=case.meta["run"]["transport"]["use_cosine_loss"]),
        optimizer=None,
        learning_rate=None,
        seed=0,
        ema_decay=0.0,
        ema_warmup=False,
    )
    names = {"data": "x1", "noise": "noise", "t": "t", "label": "y"}
    arrays = {ours: np.asarray(case.input(theirs)) for ours, theirs in names.items()}
    arrays["t"] = arrays["t"].astype(np.float32)
    params = {"model": made.variables["params"]}
    for recipe in (whole, dataclasses.replace(whole, accumulate=len(arrays["t"]))):
        grads, metrics = jax.jit(recipe.gradients)(params, arrays, jax.random.key(0))
        np.testing.assert_allclose(metrics["loss/generator"], case.outputs["loss_total"][0], rtol=1e-5)
        named = engine.to_official(conversion.TABLE, {"params": jax.device_get(grads["model"])})
        for key in case.meta["run"]["grad_tensors"]:
            assert relative_l2(named[key], case.outputs[f"grad:{key}"]) < 1e-3, key
