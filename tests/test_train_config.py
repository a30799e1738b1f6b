"""Configs: misspelt fields and wrong types are refused by name, runs own their folders, files are whole."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import tiny_run
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from tokenizers.train import build
from tokenizers.train import config as configs

ROOT = pathlib.Path(__file__).resolve().parent.parent


# --- the command line


def refusal(*arguments, program="train.py"):
    """The one line with which a program refuses its command line."""
    command = [sys.executable, program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 1, done
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    return done.stderr


QUICKSTART = "--config=configs/quickstart.py:smoke"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([QUICKSTART, "--config.optimizr.lr=1"], ["'config.optimizr'", "Did you mean 'config.optimizer'?"]),
        ([QUICKSTART, "--config.data.streams.image.framez=1"], ["Did you mean 'config.data.streams.image.frames'?"]),
        ([QUICKSTART, "--config.steps=abc"], ["config.steps='abc' has the wrong type: it takes int"]),
        ([QUICKSTART, "--config.steps.x=1"], ["config.steps has no fields of its own"]),
        ([QUICKSTART, "--config.model.channels=(8,'a')"], ["config.model.channels=(8, 'a') has the wrong type"]),
        (["--config=configs/quickstrat.py"], ["'configs/quickstrat.py'", "Did you mean 'configs/quickstart.py'?"]),
        (["--config=configs/quickstart.py:smok"], ["unknown argument 'smok'", "Accepted: smoke"]),
        ([QUICKSTART, "--confg.steps=1"], ["Unknown command line flag 'confg.steps'"]),
        ([], ["--config must have a value"]),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(arguments, parts):
    message = refusal(*arguments)
    for part in parts:
        assert part in message


def test_evaluation_refuses_in_the_same_way():
    assert "Did you mean 'config.mesh.data'?" in refusal("--checkpoint=x", "--config.mesh.dat=1", program="eval.py")


def test_misspelt_fields_in_a_config_file_are_refused():
    for mistake in (
        lambda: base.optimizer(learning_rate=1.0),
        lambda: base.stream(frame=1),
        lambda: base.data(paths=""),
        lambda: setattr(base.get_base(), "step", 1),
        lambda: setattr(base.get_base().loss, "perceptul", "lpips_vgg"),
        lambda: setattr(base.get_base().discriminator, "channel", 1),
    ):
        with pytest.raises((KeyError, AttributeError), match="does not exist"):
            mistake()
    with pytest.raises(TypeError):
        base.get_base().steps = "many"


# --- what a config must hold


def recipe(**changes):
    config = tiny_run.get_config()
    config.update_from_flattened_dict(changes)
    return build.recipe(configs.to_dict(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "tinny"}, "unknown tokenizer 'tinny'. Did you mean 'tiny'"),
        ({"discriminator.name": "patchgan"}, "unknown discriminator 'patchgan'.* Accepted: patchgan_2d, patchgan_3d"),
        ({"discriminator.generator_loss": "hing"}, "unknown generator loss 'hing'. Did you mean 'hinge'"),
        ({"discriminator.discriminator_loss": "hing"}, "unknown discriminator loss 'hing'"),
        ({"discriminator.start": 9}, "generator_start=2 lies before discriminator.start=9"),
        ({"loss.reconstruction": "l3"}, "unknown reconstruction loss 'l3'.* Accepted: .*l1"),
        ({"loss.reduction": "sum"}, "unknown loss reduction 'sum'"),
        ({"optimizer.schedule": "cosin"}, "unknown learning-rate schedule 'cosin'"),
    ],
)
def test_names_without_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_model_fields_without_meaning_are_refused():
    config = configs.to_dict(tiny_run.get_config())
    config["model"]["levelz"] = 3
    with pytest.raises(ValueError, match="unknown field of tiny 'levelz'"):
        build.recipe(config)


@pytest.mark.parametrize("none", ["", "None"])
def test_no_discriminator_can_be_said_on_the_command_line(none):
    assert recipe(**{"discriminator.name": none}).adversary is None


@pytest.mark.parametrize(
    ("field", "value", "smallest"),
    [
        ("steps", 0, 1),
        ("accumulate", 0, 1),
        ("log.every", 0, 1),
        ("checkpoint.keep_last", 0, 1),
        ("profile.steps", -1, 0),
    ],
)
def test_counts_that_make_no_sense_are_refused(field, value, smallest):
    config = tiny_run.get_config()
    configs.check_numbers(configs.to_dict(config))
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=f"config.{field}={value} must be at least {smallest}"):
        configs.check_numbers(configs.to_dict(config))
    with pytest.raises(ValueError, match="config.ema_decay=1.0 must be at least 0 and below 1"):
        configs.check_numbers(configs.to_dict(tiny_run.get_config()) | {"ema_decay": 1.0})


@pytest.mark.parametrize(
    ("shape", "accumulate", "message"),
    [
        ((12, 1, 16, 16, 3), 1, "stream 'a': batch_size=12 must be a multiple of the 8 parts"),
        ((8, 1, 16, 16, 3), 3, "and of accumulate=3"),
        ((8, 1, 18, 16, 3), 1, "stream 'a': pixels of shape .* heights must be multiples of 4"),
    ],
)
def test_batches_that_fit_nothing_are_refused_before_compiling(shape, accumulate, message):
    from tokenizers.parallel.mesh import make_mesh

    with pytest.raises(ValueError, match=message):
        build.check_batches([("a", shape)], recipe(accumulate=accumulate), make_mesh())
    assert len(jax.devices()) == 8


# --- folders


def test_a_run_owns_its_folder(tmp_path):
    folder, config = tmp_path / "runs" / "a", tiny_run.get_config()
    assert configs.claim_folder(folder, config) is False
    assert configs.claim_folder(folder, config) is True
    assert json.loads((folder / "config.json").read_text()) == configs.to_dict(config)
    config.optimizer.lr, config.data.streams.video.frames = 0.5, 5
    with pytest.raises(ValueError, match="holds a run with another config") as caught:
        configs.claim_folder(folder, config)
    lines = str(caught.value).splitlines()[1:]
    assert lines == ["  data.streams.video.frames: 3 -> 5", "  optimizer.lr: 0.01 -> 0.5"]


def test_how_a_run_is_watched_and_where_it_computes_may_change(tmp_path):
    config = tiny_run.get_config()
    configs.claim_folder(tmp_path, config)
    for field, value in {
        "steps": 99,
        "log.every": 7,
        "checkpoint.every": 9,
        "evaluation.max_items": 1,
        "mesh.fsdp": 8,
        "mesh.rules": (("a", "fsdp"),),
        "data.workers": 2,
        "profile.steps": 3,
        "compilation_cache": "/elsewhere",
    }.items():
        config.update_from_flattened_dict({field: value})
    assert configs.claim_folder(tmp_path, config)
    assert configs.read_config(tmp_path)["steps"] == 99


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty and not a run of train.py"):
        configs.claim_folder(tmp_path, tiny_run.get_config())
    with pytest.raises(ValueError, match="is a file; --workdir takes a folder"):
        configs.claim_folder(tmp_path / "thesis.tex", tiny_run.get_config())
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_kill_while_the_config_is_written_leaves_a_usable_folder(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            configs.claim_folder(tmp_path, tiny_run.get_config())
    assert not (tmp_path / "config.json").exists()  # never half of one
    assert configs.claim_folder(tmp_path, tiny_run.get_config()) is False
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_damaged_config_is_reported_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": ')
    with pytest.raises(ValueError, match="config.json is not readable JSON.*restore it from a backup"):
        configs.claim_folder(tmp_path, tiny_run.get_config())


values = st.one_of(st.integers(-5, 5), st.text("ab", max_size=2), st.none(), st.lists(st.integers(0, 3), max_size=2))
trees = st.recursive(values, lambda inner: st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, max_size=3))


@given(st.dictionaries(st.text("xyz", min_size=1, max_size=2), trees, max_size=4))
def test_a_config_never_differs_from_itself(config):
    assert configs.differences(config, configs.to_dict(config)) == []
    changed = config | {"seed": 1}
    assert configs.differences(config, changed) == ["seed: None -> 1"]
