"""Schedules: the official curves, what a step sees of them, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from reference import Case, cases
from test_train_step import pixels

from configs import base
from tokenizers import registry
from tokenizers.quantize.gumbel import GumbelSoftmax
from tokenizers.train import build, schedules
from tokenizers.train.config import to_dict


@pytest.mark.parametrize("name", cases("dvae", "schedules_derived"))
def test_cosines_are_those_of_the_dvae_recipe(name):
    case = Case("dvae", name)
    for quantity in ("beta", "tau", "lr"):
        entry = case.meta["config"][quantity]
        value = schedules.schedule(base.schedule(start=entry["start"], end=entry["end"], steps=entry["total"]))
        found = [value(step) for step in case.meta["at_steps"]]
        # 1 + cos in float32: known to 1e-7 of the range.
        np.testing.assert_allclose(
            found, case.outputs[quantity], rtol=1e-5, atol=2e-7 * max(entry["start"], entry["end"])
        )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "linear", "start": 1.0, "end": 3.0, "steps": 10}, [1.0, 1.0, 2.0, 3.0, 3.0]),
        ({"kind": "linear", "start": 1.0, "end": 3.0, "steps": 5, "begin": 5}, [1.0, 1.0, 1.0, 3.0, 3.0]),
        ({"kind": "exponential", "start": 1.0, "end": 1e-2, "steps": 10}, [1.0, 1.0, 0.1, 0.01, 0.01]),
        ({"kind": "piecewise", "points": ((0, 2.0), (5, 0.0), (10, 4.0))}, [2.0, 2.0, 0.0, 4.0, 4.0]),
        ({"kind": "cosine", "start": 2.0, "end": 0.0, "steps": 10}, [2.0, 2.0, 1.0, 0.0, 0.0]),
    ],
)
def test_kinds(changes, expected):
    value = schedules.schedule(base.schedule(**changes))
    np.testing.assert_allclose([value(step) for step in (0, 0, 5, 10, 11)], expected, atol=1e-6)
    traced = jax.jit(value)(jnp.int32(5))
    np.testing.assert_allclose(traced, expected[2], atol=1e-6)


def gumbel_config():
    config = tiny_run.get_config("plain")
    config.model.bottleneck = {"name": "gumbel", "codebook_size": 24, "code_dim": 3, "hard": False}
    config.loss.bottleneck.kl = 0.5
    return config


def test_a_step_sees_the_values_of_its_own_number_in_one_program():
    config = gumbel_config()
    points = ((0, 0.0), (1, 0.25), (2, 1.0))
    config.schedules.loss.kl = base.schedule(kind="piecewise", points=points)
    config.schedules.model.temperature = base.schedule(kind="linear", start=4.0, end=0.5, steps=2)
    _, recipe, state, step = tiny_run.parts(config, jax.devices()[:1])
    assert "schedule" not in state.model_state
    for number, (kl, temperature) in enumerate(((0.0, 4.0), (0.25, 2.25), (1.0, 0.5))):
        state, metrics = step(state, pixels(number))
        np.testing.assert_allclose(metrics["schedule/kl"], kl, atol=1e-6)
        np.testing.assert_allclose(metrics["schedule/temperature"], temperature, atol=1e-6)
        weighted = metrics["loss/l1"] + kl * metrics["loss/kl"]
        np.testing.assert_allclose(metrics["loss/generator"], weighted, rtol=1e-5)
    (program,) = step.programs.values()
    assert program._cache_size() == 1
    assert int(state.skipped) == 0


@pytest.mark.slow
def test_a_constant_schedule_is_the_constant():
    losses = []
    for scheduled in (False, True):
        config = gumbel_config()
        config.model.bottleneck["temperature"] = 4.0 if not scheduled else 1.0
        if scheduled:
            config.schedules.loss.kl = base.schedule(start=0.5, end=0.5)
            config.schedules.model.temperature = base.schedule(start=4.0, end=4.0)
        _, _, state, step = tiny_run.parts(config, jax.devices()[:1])
        state, metrics = step(state, pixels(0))
        losses.append((metrics["loss/generator"], optax.tree.norm(state.params)))
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_every_module_that_declares_the_field_follows_it():
    model = registry.build(
        "vqvae", channels=8, levels=2, latent_channels=4, bottleneck=GumbelSoftmax(8, code_dim=4), block_channels=4
    )
    config = {"loss": {}, "model": {"temperature": base.schedule(start=2.0, end=2.0)}}
    tree = schedules.build(config, model, {}).variables(jnp.int32(0))["schedule"]
    assert jax.tree.map(float, tree) == {
        "network": {"quantize_top": {"temperature": 2.0}, "quantize_bottom": {"temperature": 2.0}}
    }


def test_schedules_of_nothing_are_refused():
    config = gumbel_config()
    config.schedules.loss.kll = base.schedule()
    with pytest.raises(ValueError, match="no such weight.*'kll'.*Did you mean 'kl'"):
        build.recipe(to_dict(config))
    config = gumbel_config()
    config.schedules.model.temperatur = base.schedule()
    with pytest.raises(ValueError, match="'temperatur'.*Did you mean 'temperature'"):
        build.recipe(to_dict(config))
    for changes, message in (
        ({"kind": "cosin"}, "Did you mean 'cosine'"),
        ({"steps": 0}, "steps >= 1"),
        ({"kind": "exponential"}, "between positive numbers, got start=0.0"),
        ({"kind": "piecewise"}, "points"),
        ({"kind": "piecewise", "points": ((5, 1.0), (0, 2.0))}, "in order"),
    ):
        with pytest.raises(ValueError, match=message):
            schedules.schedule(base.schedule(**changes))


# Warm-up in straight lines, from and to the first and last of its steps, then half a cosine.
DINOV2 = {
    "lr": {"begin": 100, "start": 2e-4, "end": 1e-6, "steps": 900, "points": ((0, 0.0), (99, 2e-4))},
    "teacher_momentum": {"start": 0.994, "end": 1.0, "steps": 1000},
    "teacher_temp": {"kind": "piecewise", "points": ((0, 0.04), (299, 0.07))},
    "wd_freeze": {
        "begin": 30, "start": 0.04, "end": 0.4, "steps": 470,
        "points": ((0, 0.0), (9, 0.0), (10, 0.01), (29, 0.04)),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DINOV2)
def test_dinov2s_schedules_can_be_said(name):
    case = Case("ssl", "schedules")
    (given,) = (entry for entry in case.meta["config"]["schedules"] if entry["name"] == name)
    value = schedules.schedule(base.schedule(**DINOV2[name]).to_dict())
    found = [float(value(step)) for step in given["at"]]
    np.testing.assert_allclose(found, case.outputs[name], rtol=2e-6, atol=1e-9)
