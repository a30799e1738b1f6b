"""Every file of configs/ describes something that can be trained or evaluated, at its full size."""

import ast
import importlib
import pathlib
import re

import jax
import ml_collections
import pytest

from configs import base, eval_default
from tokenizers.data.pipeline import Pipeline
from tokenizers.evaluate import protocols, run
from tokenizers.networks import weights
from tokenizers.parallel.mesh import make_mesh
from tokenizers.train import build
from tokenizers.train.step import make_step

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
NAMES = [path.stem for path in FILES if path.stem not in ("__init__", "base")]


def load(name, argument=None):
    module = importlib.import_module(f"configs.{name}")
    return module.get_config() if argument is None else module.get_config(argument)


def accepted_arguments(name):
    """What a config says it accepts, when it is given what it does not."""
    with pytest.raises(ValueError, match="no_such_argument") as caught:
        load(name, "no_such_argument")
    found = re.search(r"Accepted: ([\w, .-]+?)\.?$", str(caught.value))
    return found[1].split(", ") if found else []


TRAINING = [
    (name, argument)
    for name in NAMES
    if not name.startswith(("eval_", "generation_", "scaling_"))
    for argument in (None, *accepted_arguments(name))
]
GENERATORS = [
    (name, argument)
    for name in NAMES
    if name.startswith("generation_lightningdit")
    for argument in (None, *accepted_arguments(name))
]
# The weights of what judges reconstructions and latents are files.
WITHOUT_FILES = {
    "perceptual": None,
    "convnext_weight": 0.0,
    "vgg_hidden_weight": 0.0,
    "content_weight": 0.0,
    "gram_weight": 0.0,
    "alignment": {"network": None},
}
# A small network with the patches and the codes of the published sizes.
RANDOM_TOKENS = {
    "model": {
        "name": "maskgit_vqgan",
        "bottleneck": {"name": "vq", "codebook_size": 1024, "code_dim": 8},
        "latent_channels": 8,
        "widths": (32, 32, 32, 32, 32),
        "blocks": 1,
    },
    "path": "random",
}


def without_files(loss):
    return WITHOUT_FILES | ({} if loss["tokens"]["path"] == "random" else {"tokens": RANDOM_TOKENS})


SCHEMAS = {"autoencoder": base.get_base, "pretraining": base.get_pretraining_base}
each_config = pytest.mark.parametrize(("name", "argument"), TRAINING, ids=lambda value: str(value))
# Tracing a step of a published size takes up to 20 s; a small one of each family runs always.
TRACED_ALWAYS = ("quickstart", "cosmos_cv8x8x8")
each_traced = pytest.mark.parametrize(
    ("name", "argument"),
    [
        pytest.param(name, argument, marks=[] if argument == "smoke" or name in TRACED_ALWAYS else pytest.mark.slow)
        for name, argument in TRAINING
    ],
    ids=lambda value: str(value),
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configs_are_data(path):
    """They import each other and the container of fields, and nothing that computes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module]
        else:
            continue
        assert all(name.split(".")[0] in ("configs", "ml_collections") for name in found), found


@each_config
def test_configs_keep_to_the_schema(name, argument):
    """A field that no code reads would be ignored; the model's own fields are checked where it is built."""

    def compare(config, schema, where):
        for key in config:
            assert key in schema, f"{where}{key}"
            if hasattr(schema[key], "keys") and where + key not in (
                "model",
                "init_parts",
                "loss.tokens.model",
                "loss.bottleneck",
                "data.streams",
                "schedules",
            ):
                compare(config[key], schema[key], f"{where}{key}.")

    config = load(name, argument)
    schema = SCHEMAS[config.recipe]()
    compare(config, schema, "")
    for key, stream in config.data.streams.items():
        compare(stream, base.stream(), f"data.streams.{key}.")


@pytest.mark.parametrize(("name", "argument"), GENERATORS, ids=lambda value: str(value))
def test_generators_keep_to_their_schema_and_take_a_step_at_full_size(name, argument):
    config, schema = load(name, argument), base.get_generator()
    assert set(config) == set(schema)
    for part in ("optimizer", "flow", "data", "mesh", "log", "checkpoint"):
        assert set(config[part]) == set(schema[part])
    config.model.update({"grid": (16, 16), "channels": 32, "classes": 1000})  # as the latents' folder would say
    config = config.to_dict()
    recipe, mesh = build.recipe(config), make_mesh(devices=jax.devices()[:1])
    build.check_batches([("latents", (config["data"]["batch_size"], 16, 16, 32))], recipe, mesh)
    with jax.set_mesh(mesh):
        state = build.abstract_state(config, recipe, mesh)
        inputs = recipe.inputs_of((config["data"]["batch_size"], 16, 16, 32))
        new, metrics = jax.eval_shape(make_step(recipe), state, {}, inputs)
    assert jax.tree.map(lambda a, b: a.shape == b.shape, new, state)
    assert set(metrics) >= {"loss/generator", "loss/flow", "loss/cosine", "learning_rate"}


@each_traced
def test_configs_take_a_step_at_full_size(name, argument):
    """The whole step is traced for every batch shape, with shapes in place of arrays: nothing is allocated."""
    config = load(name, argument)
    config.loss.update(without_files(config.loss))
    config.discriminator.against = "reconstruction"  # no perceptual terms are left
    config.captions.path = weights.SHAPES
    if config.data.source not in ("", "embedded", "shapes"):  # neither is the data
        source = "shapes" if config.recipe == "pretraining" else "embedded"
        config.data.update({"source": source, "path": "", "virtual_camera": True})
    config = config.to_dict()
    recipe, mesh = build.recipe(config), make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = build.abstract_state(config, recipe, mesh)
        step = make_step(recipe)
        for _, shape in Pipeline(config["data"], seed=config["seed"]).shapes:
            inputs = recipe.inputs_of(shape)
            new, metrics = jax.eval_shape(step, state, dict(recipe.networks), inputs)
            assert jax.tree.map(lambda a, b: a.shape == b.shape, new, state)
            assert metrics["loss/generator"].shape == ()


@each_config
def test_batches_fit_the_compression(name, argument):
    """Training pixels are neither padded nor cropped."""
    config = load(name, argument).to_dict()
    judge = config["discriminator"] | {"against": "reconstruction"}
    config |= {"loss": config["loss"] | without_files(config["loss"]), "discriminator": judge}
    config["captions"]["path"] = weights.SHAPES
    spec = build.recipe(config).model.spec
    time, height, width = spec.compression
    for stream in config["data"]["streams"].values():
        assert (stream["frames"] - spec.first_frame_alone) % time == 0 or not spec.video
        assert all(h % height == 0 and w % width == 0 for h, w in stream["resolutions"])


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_give_the_command(name):
    assert f"--config=configs/{name}.py" in (importlib.import_module(f"configs.{name}").__doc__ or "")


def test_the_evaluation_config_names_what_exists():
    config = eval_default.get_config()
    assert set(config.metrics) == set(run.METRICS)
    assert config.protocol in protocols.PROTOCOLS
    assert accepted_arguments("eval_default") == []


@pytest.mark.parametrize(
    ("name", "argument"), [*TRAINING, *GENERATORS, ("generation_blackbox", None)], ids=lambda value: str(value)
)
def test_no_field_hides_behind_a_method(name, argument):
    """A field called like a method of ConfigDict (``items``, ``keys``, ...) cannot be set on the command line."""

    def walk(config, where):
        for key in config:
            assert not hasattr(ml_collections.ConfigDict, key), f"{where}{key}"
            if isinstance(config[key], ml_collections.ConfigDict):
                walk(config[key], f"{where}{key}.")

    walk(load(name, argument), "")
