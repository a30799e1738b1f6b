"""Where tokenizers come from: random weights, a run, a saved folder, an official file, or an official state dict."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from . import convert, registry
from .api import SAVED_CONFIG, SAVED_WEIGHTS, Tokenizer
from .parallel import platform

RUN_CONFIG = "config.json"


def create(name: str, seed: int = 0, **fields: Any) -> Tokenizer:
    """A tokenizer with random weights.

    Args:
      name: a released variant of `available`, or a system.
      seed: of the random weights.
      **fields: fields of the model that differ from the variant's.
    """
    module = registry.build(name, **fields)
    pixels = jnp.zeros(registry.example_shape(module), jnp.float32)
    initialize = jax.jit(module.init, compiler_options=platform.run_once_options())
    variables = initialize(jax.random.key(seed), pixels)
    return Tokenizer(module, dict(variables), name, fields)


def load(source: str | pathlib.Path, model: str | None = None, step: int | None = None, **fields: Any) -> Tokenizer:
    """A tokenizer with trained weights.

    Args:
      source: a run of train.py (its EMA weights), a folder of `Tokenizer.save`, an official weight file
        (.safetensors .pth .pt .ckpt .bin .jit), which needs ``model``, or a published folder of such a file and its
        ``config.json``, which needs its system as ``model``.
      model: released variant, or system, that an official file belongs to.
      step: checkpoint of a run; default the latest.
      **fields: with an official file, fields that differ from the variant's.

    Raises:
      ValueError: when the source is none of these, or does not fit the model.
    """
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist; accepted: a run of train.py, a saved folder, or a weight file.")
    published = _published_weights(path)
    if step is not None and not is_run(path):
        raise ValueError(f"step={step} belongs to a run of train.py, which {path} is not.")
    if path.is_file():
        return _from_file(path, model, fields)
    if published is not None:
        return _from_published(path, published, model, fields)
    if model is not None or fields:
        raise ValueError(f"{path} is a folder and knows its model; model= and fields belong to official weight files.")
    if (path / SAVED_CONFIG).is_file():
        return _from_saved(path)
    if is_run(path):
        return _from_run(path, step)
    raise ValueError(
        f"{path} holds neither {RUN_CONFIG} (a run of train.py) nor {SAVED_CONFIG} (a saved tokenizer); to load an "
        "official weight file, give the file itself, or a folder with its config.json, and model=."
    )


def is_run(path: pathlib.Path) -> bool:
    """Whether that is a run of train.py; a published folder has a config.json too, beside its weights."""
    return (path / RUN_CONFIG).is_file() and _published_weights(path) is None


def knows_its_model(path: pathlib.Path) -> bool:
    """Whether that is a run of train.py or a folder of `Tokenizer.save`; weight files have to be told theirs."""
    return is_run(path) or (path / SAVED_CONFIG).is_file()


_PUBLISHED = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")


def _published_weights(folder: pathlib.Path) -> pathlib.Path | None:
    """The weight file beside the config.json of a published folder."""
    if not (folder / RUN_CONFIG).is_file() or (folder / SAVED_CONFIG).is_file():
        return None
    return next((folder / name for name in _PUBLISHED if (folder / name).is_file()), None)


def _from_published(folder: pathlib.Path, file: pathlib.Path, model: str | None, fields: Mapping[str, Any]) -> Any:
    from .convert import files

    if model is None or fields:
        raise ValueError(
            f"{folder} is a published folder: its config.json has the fields, and model= says whose it is, for example "
            f"load({str(folder)!r}, model='vtp'); one of: {', '.join(registry.systems())}."
        )
    try:
        config = json.loads((folder / RUN_CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / RUN_CONFIG} is not readable JSON ({error}); fetch it again.") from error
    return from_official(registry.system_of(model), config, files.read_state_dict(file))


def _from_saved(folder: pathlib.Path) -> Tokenizer:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((folder / SAVED_CONFIG).read_text())
        name, fields = config["name"], config["fields"]
        variables = traverse_util.unflatten_dict(load_file(folder / SAVED_WEIGHTS), sep="/")
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(
            f"the saved tokenizer {folder} is incomplete or damaged ({type(error).__name__}: {error}); save it again."
        ) from error
    module = registry.build(name, **fields)
    _same_tree(registry.abstract_variables(module), variables, folder)
    return Tokenizer(module, jax.tree.map(jnp.asarray, variables), name, fields)


def _same_tree(expected: Any, found: Any, where: pathlib.Path) -> None:
    want = {k: v.shape for k, v in traverse_util.flatten_dict(dict(expected), sep="/").items()}
    have = {k: v.shape for k, v in traverse_util.flatten_dict(dict(found), sep="/").items()}
    wrong = sorted(name for name in set(want) | set(have) if want.get(name) != have.get(name))
    if wrong:
        lines = [f"{name}: expected {want.get(name)}, found {have.get(name)}" for name in wrong[:10]]
        raise ValueError(f"{where} does not fit its model in {len(wrong)} arrays:\n  " + "\n  ".join(lines))


def _from_run(folder: pathlib.Path, step: int | None) -> Tokenizer:
    from .train import checkpoint

    fields = dict(checkpoint.read_config(folder)["model"])
    name = fields.pop("name")
    module = registry.build(name, **fields)
    shapes = registry.abstract_variables(module)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    state = {key: value for key, value in shapes.items() if key != "params"}
    found = checkpoint.load_weights(folder, {"ema": shapes["params"]} | ({"model_state": state} if state else {}), step)
    return Tokenizer(module, {"params": found["ema"], **found.get("model_state", {})}, name, fields)


def _from_file(path: pathlib.Path, model: str | None, fields: Mapping[str, Any]) -> Tokenizer:
    from .convert import files

    if model is None:
        raise ValueError(
            f"{path} is a weight file; say which tokenizer it belongs to: load({str(path)!r}, model=...), one of: "
            f"{', '.join(registry.available())}."
        )
    return _converted(convert.system(registry.system_of(model)), files.read_state_dict(path), model, fields)


def from_official(system: str, config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray]) -> Any:
    """A `Tokenizer` (or `generators.generator.Generator`) from the authors' own config and state dict.

    Args:
      system: name of the system, for example ``vqgan``.
      config: the config as the authors wrote it, as a dictionary.
      state_dict: official parameter names and arrays.

    Raises:
      ValueError: for an unknown system, or a missing, unexpected or misshapen tensor, by name.
    """
    from .generators import generator

    table = convert.system(system)
    if hasattr(table, "system_of"):  # one name for several networks
        system = table.system_of(config)
        table = convert.system(system)
    if system in generator.systems():
        return generator.from_official(system, config, state_dict)
    return _converted(table, state_dict, system, table.fields_from_official(config))


def _converted(table, state_dict: Mapping[str, np.ndarray], name: str, fields: Mapping[str, Any]) -> Tokenizer:
    state_dict = convert.named(table, state_dict)
    module = registry.build(name, **fields)
    if hasattr(table, "fields_from_weights"):
        fields = {**fields, **table.fields_from_weights(module, state_dict)}
        module = registry.build(name, **fields)
    variables = convert.variables(table, module, registry.abstract_variables(module), state_dict)
    return Tokenizer(module, jax.tree.map(jnp.asarray, variables), name, fields)
