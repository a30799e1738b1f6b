"""Which tokenizers there are: every file in ``models/`` registers itself by being there."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from . import errors, models, quantize
from .types import Variant


@functools.cache
def systems() -> dict[str, ModuleType]:
    """Model files by the name of their system."""
    names = sorted(info.name for info in pkgutil.iter_modules(models.__path__))
    found = (importlib.import_module(f".models.{name}", __package__) for name in names)
    return {module.SYSTEM: module for module in found}


def variants() -> dict[str, tuple[str, Variant]]:
    """Released variant -> (system, its entry)."""
    return {name: (system, entry) for system, module in systems().items() for name, entry in module.VARIANTS.items()}


def available() -> tuple[str, ...]:
    """Names of the released variants, sorted; any of them goes into `create` and `describe`."""
    return tuple(sorted(variants()))


def system_of(name: str) -> str:
    """The system of a released variant, or of the system itself.

    Raises:
      ValueError: for an unknown name.
    """
    known = variants()
    if name in known:
        return known[name][0]
    if name in systems():
        return name
    raise errors.unknown("tokenizer", name, [*available(), *systems()])


def build(name: str, **fields: Any) -> nn.Module:
    """The Linen module of a variant or of a system, with fields overridden.

    Args:
      name: a released variant (its fields are the start), or a system (its defaults are).
      **fields: fields of the system's ``Model``; ``bottleneck`` is a module, or a mapping ``{"name": ..., fields}``.

    Raises:
      ValueError: for an unknown name or field.
    """
    system, known = system_of(name), variants()
    if name in known:
        fields = dict(known[name][1].config) | fields
    return with_fields(systems()[system].Model, system, fields)


def with_fields(model: type[nn.Module], name: str, fields: Mapping[str, Any]) -> nn.Module:
    """A module of that class, of fields as a config or a file has them; ``name`` is for the error of an unknown one."""
    accepted = [field for field in model.__dataclass_fields__ if field not in _LINEN_FIELDS]
    for field in fields:
        if field not in accepted:
            raise errors.unknown(f"field of {name}", field, accepted)
    return model(**{field: _attribute(field, value) for field, value in fields.items()})


_LINEN_FIELDS = ("parent", "name")


def _attribute(field: str, value: Any) -> Any:
    """Linen attributes must be hashable: lists become tuples, a mapping with a name becomes its bottleneck."""
    if isinstance(value, Mapping):
        fields = {key: _attribute(key, item) for key, item in value.items()}
        if "name" not in fields:
            raise ValueError(f"{field}={dict(value)!r} lacks its 'name'. Accepted: {', '.join(quantize.BOTTLENECKS)}.")
        return quantize.create(fields.pop("name"), **fields)
    if isinstance(value, (list, tuple)):
        return tuple(_attribute(field, item) for item in value)
    if field == "dtype" and value is not None:
        return getattr(jnp, jnp.dtype(value).name)  # "bfloat16" in a saved config is jnp.bfloat16
    return value


def fields_of(module: nn.Module) -> dict[str, Any]:
    """All fields of a model or bottleneck as JSON values; `build` makes the same module of them.

    Raises:
      ValueError: for a field without such a value that is not at its default (a function, say).
    """
    found = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name in _LINEN_FIELDS or (isinstance(value, FunctionType) and value is field.default):
            continue
        found[field.name] = _as_data(field.name, value)
    return found


def _as_data(field: str, value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_as_data(field, item) for item in value]
    if isinstance(value, nn.Module):
        names = {cls: name for name, (_, cls) in quantize.BOTTLENECKS.items()}
        return {"name": errors.pick("bottleneck", type(value).__name__, names)} | fields_of(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if field == "dtype":
        return jnp.dtype(value).name
    raise ValueError(f"the field {field}={value!r} of the model cannot be written to a file.")


def example_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the smallest input that passes through every layer: ``(1, T, H, W, C)`` or ``(1, H, W, C)``."""
    spec = module.spec
    time, height, width = spec.compression
    fewest = getattr(module, "input_frames", None) or (1 + time if spec.first_frame_alone else time)
    frames = (fewest,) if spec.video else ()
    smallest = getattr(module, "input_size", None) or (height * 4, width * 4)
    return (1, *frames, *smallest, spec.channels)


def abstract_variables(module: nn.Module) -> dict[str, Any]:
    """Shapes of all variables of a tokenizer, without computing anything."""
    pixels = jax.ShapeDtypeStruct(example_shape(module), jnp.float32)
    return dict(jax.eval_shape(module.init, jax.random.key(0), pixels))


def parameter_count(module: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_variables(module)["params"]))


def describe(name: str) -> dict[str, Any]:
    """Facts about a released variant: compression, codebook or channels, parameters, paper, source, licence, ..."""
    known = variants()
    if name not in known:
        raise errors.unknown("variant", name, known)
    system, entry = known[name]
    module = build(name)
    spec = module.spec
    return {
        "name": name,
        "system": system,
        "compression": spec.compression,
        "codebook_size": spec.codebook_size,
        "latent_channels": spec.latent_channels,
        "bits_per_token": spec.bits_per_token,
        "tokens_per_item": spec.tokens_per_item,
        "parameters": parameter_count(module),
        "causal": spec.causal,
        "video": spec.video,
        "paper": entry.paper,
        "source": entry.source,
        "license": entry.license,
        "note": entry.note,
    }
