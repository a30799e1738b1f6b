"""The public object: a tokenizer is a Linen module, its variables and a few facts."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import pixels as pixel_values
from . import registry
from .parallel import rules
from .parallel.constrain import constrain
from .types import Array, Encoding, Spec

_SAVED_CONFIG, _SAVED_WEIGHTS = "tokenizer.json", "weights.safetensors"
_NAMES = ("batch", "time", "height", "width", "channel")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with its weights.

    Attributes:
      module: the Linen module.
      variables: ``{"params": ...}`` and, where the bottleneck keeps statistics, ``"codebook"``.
      name: variant or system it was built from.
      fields: fields given besides; ``registry.build(name, **fields)`` is ``module``.
      mesh: devices it is laid out over, ``None`` for one device.
    """

    module: nn.Module
    variables: Mapping[str, Any]
    name: str
    fields: Mapping[str, Any]
    mesh: Mesh | None = None

    @property
    def spec(self) -> Spec:
        """Compression, channels, codebook size, causality."""
        return self.module.spec

    @property
    def params(self) -> Any:
        """The parameters: ``module.apply({"params": params}, x, method="encode")``."""
        return self.variables["params"]

    def encode(self, pixels, strict: bool = False) -> Encoding:
        """Pixels to latents and indices.

        Args:
          pixels: ``(B, H, W, C)`` images or ``(B, T, H, W, C)`` videos, uint8 in [0, 255] or float in [-1, 1].
          strict: refuse a frame count or size that does not fit, instead of padding it by repeating the edge.

        Returns:
          `Encoding`; for an image its latents and indices have no time axis.
        """
        pixel_values.check(pixels, self.spec.channels)
        fitted = _fit(self.spec, tuple(pixels.shape), strict)
        native, restore = _ranks(self.spec, pixels.ndim)
        encoding = self._run("encode", native(_pad(pixels, fitted)))
        return jax.tree.map(lambda leaf: restore(leaf) if jnp.ndim(leaf) else leaf, encoding)

    def decode(self, latents) -> Array:
        """Latents to float32 pixels around [-1, 1], not clipped.

        Args:
          latents: as `encode` returns them: ``(B, T', H', W', D)`` gives a video, ``(B, H', W', D)`` an image.
        """
        native, restore = _ranks(self.spec, jnp.ndim(latents))
        return restore(self._run("decode", native(jnp.asarray(latents))))

    def decode_indices(self, indices) -> Array:
        """Token ids to pixels; the shape rules of `decode` without the channel axis."""
        if self.spec.codebook_size is None:
            raise ValueError(f"{self.name} is continuous: it has no indices. Use decode(latents).")
        return self.decode(self.indices_to_latents(indices))

    def indices_to_latents(self, indices) -> Array:
        """Token ids to the codes that `decode` reads."""
        return self._run("indices_to_latents", jnp.asarray(indices))

    def reconstruct(self, pixels) -> Array:
        """``decode(encode(pixels))`` with the frame count and size of the input."""
        video = self.decode(self.encode(pixels).latents)
        crop = tuple(slice(0, size) for size in pixels.shape[1:-1])
        return video[(slice(None), *crop)]

    def shard(self, mesh: Mesh) -> Tokenizer:
        """The same tokenizer over a mesh: large parameters over fsdp, inputs over batch and the context axis."""
        placed = jax.device_put(dict(self.variables), rules.shardings(dict(self.variables), mesh))
        return dataclasses.replace(self, variables=placed, mesh=mesh)

    def cast(self, dtype) -> Tokenizer:
        """The same tokenizer computing in another dtype (float32, bfloat16); parameters stay float32."""
        return dataclasses.replace(self, module=self.module.clone(dtype=dtype))

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes weights and config into a new or empty folder that `load` reads."""
        from safetensors.numpy import save_file

        folder = pathlib.Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; choose a new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        flat = traverse_util.flatten_dict(jax.device_get(dict(self.variables)), sep="/")
        save_file({name: np.ascontiguousarray(value) for name, value in flat.items()}, folder / _SAVED_WEIGHTS)
        config = {"name": self.name, "fields": _jsonable(self.fields)}
        (folder / _SAVED_CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def _run(self, method: str, value) -> Any:
        if self.mesh is None:
            return _compiled(self.module, method)(self.variables, value)
        with jax.set_mesh(self.mesh):
            if not isinstance(value, jax.Array) or not isinstance(value.sharding, NamedSharding):
                value = jax.device_put(value, NamedSharding(self.mesh, PartitionSpec()))
            return _compiled(self.module, method)(self.variables, value)


@functools.lru_cache(maxsize=64)
def _compiled(module: nn.Module, method: str):
    """One jitted function per (module, method); jit itself keeps one program per input shape."""

    def apply(variables, value):
        if method == "encode":
            value = pixel_values.to_float(value)
        if value.ndim == len(_NAMES) and method != "indices_to_latents":
            value = constrain(value, *_NAMES)
        return module.apply(variables, value, method=method)

    return jax.jit(apply)


def _ranks(spec: Spec, rank: int):
    """(function to the module's own rank, function back) for an input of that rank."""
    if spec.tokens_per_item is not None or (rank == 5) == spec.video:
        return (lambda x: x), (lambda x: x)
    if spec.video:  # an image is one frame
        return (lambda x: x[:, None]), (lambda x: x[:, 0])
    frames = {}

    def fold(x):
        frames["shape"] = x.shape[:2]
        return x.reshape(-1, *x.shape[2:])

    return fold, lambda x: x.reshape(*frames["shape"], *x.shape[1:])


def _fit(spec: Spec, shape: tuple[int, ...], strict: bool) -> tuple[int, ...]:
    """The smallest shape that fits the compression and holds ``shape``."""
    time, height, width = spec.compression
    wanted = list(shape)
    wanted[-3], wanted[-2] = -(-shape[-3] // height) * height, -(-shape[-2] // width) * width
    if spec.video and len(shape) == 5:
        if spec.first_frame_alone:
            wanted[1] = 1 + -(-(shape[1] - 1) // time) * time
        else:
            wanted[1] = -(-shape[1] // time) * time
    if strict and tuple(wanted) != shape:
        frames = f"1 + {time} k" if spec.first_frame_alone else f"{time} k"
        raise ValueError(
            f"pixels of shape {shape} do not fit: frames must be {frames}, heights multiples of {height} and widths of "
            f"{width}; the nearest larger shape is {tuple(wanted)}."
        )
    return tuple(wanted)


def _pad(pixels, shape: tuple[int, ...]):
    if tuple(pixels.shape) == shape:
        return pixels
    amounts = [(0, wanted - size) for wanted, size in zip(shape, pixels.shape, strict=True)]
    return jnp.pad(jnp.asarray(pixels), amounts, mode="edge")


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    return value


def create(name: str, seed: int = 0, **fields: Any) -> Tokenizer:
    """A tokenizer with random weights.

    Args:
      name: a released variant of `available`, or a system.
      seed: of the random weights.
      **fields: fields of the model that differ from the variant's.
    """
    module = registry.build(name, **fields)
    pixels = jnp.zeros(registry.example_shape(module), jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(seed), pixels)
    return Tokenizer(module, dict(variables), name, fields)


def load(source: str | pathlib.Path, model: str | None = None, step: int | None = None, **fields: Any) -> Tokenizer:
    """A tokenizer with trained weights.

    Args:
      source: a run of train.py (its EMA weights), a folder of `Tokenizer.save`, or an official weight file
        (.safetensors .pth .pt .ckpt .bin .jit), which needs ``model``.
      model: released variant that an official file belongs to.
      step: checkpoint of a run; default the latest.
      **fields: with an official file, fields that differ from the variant's.

    Raises:
      ValueError: when the source is none of these, or does not fit the model.
    """
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist; accepted: a run of train.py, a saved folder, or a weight file.")
    if path.is_file():
        return _from_file(path, model, fields)
    if model is not None or fields:
        raise ValueError(f"{path} is a folder and knows its model; model= and fields belong to official weight files.")
    if (path / _SAVED_CONFIG).is_file():
        return _from_saved(path)
    return _from_run(path, step)


def _from_saved(folder: pathlib.Path) -> Tokenizer:
    from safetensors.numpy import load_file

    config = json.loads((folder / _SAVED_CONFIG).read_text())
    module = registry.build(config["name"], **config["fields"])
    variables = traverse_util.unflatten_dict(load_file(folder / _SAVED_WEIGHTS), sep="/")
    _same_tree(registry.abstract_variables(module), variables, folder)
    return Tokenizer(module, jax.tree.map(jnp.asarray, variables), config["name"], config["fields"])


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
    module = registry.build(model, **fields)
    return _converted(module, registry.variants()[model][0], files.read_state_dict(path), model, fields)


def from_official(system: str, config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray]) -> Tokenizer:
    """A tokenizer from the authors' own config and state dict.

    Args:
      system: name of the system, for example ``vqgan``.
      config: the config as the authors wrote it, as a dictionary.
      state_dict: official parameter names and arrays.

    Raises:
      ValueError: for an unknown system, or a missing, unexpected or misshapen tensor, by name.
    """
    fields = _table(system).fields_from_official(config)
    return _converted(registry.build(system, **fields), system, state_dict, system, fields)


def _table(system: str):
    import importlib

    from . import convert, errors

    converted = convert.systems()
    if system not in converted:
        raise errors.unknown("system with official weights", system, converted)
    return importlib.import_module(f".convert.{system}", __package__)


def _converted(module, system: str, state_dict, name: str, fields) -> Tokenizer:
    from .convert import engine

    table = _table(system)
    variables = engine.to_tree(table.TABLE, registry.abstract_variables(module), state_dict, ignore=table.IGNORE)
    return Tokenizer(module, jax.tree.map(jnp.asarray, variables), name, fields)
