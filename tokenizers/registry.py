"""Which tokenizers there are: every file in ``models/`` registers itself by being there."""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Mapping
from types import ModuleType
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


def build(name: str, **fields: Any) -> nn.Module:
    """The Linen module of a variant or of a system, with fields overridden.

    Args:
      name: a released variant (its fields are the start), or a system (its defaults are).
      **fields: fields of the system's ``Model``; ``bottleneck`` is a mapping ``{"name": ..., fields}``.

    Raises:
      ValueError: for an unknown name or field.
    """
    known = variants()
    if name in known:
        system, entry = known[name]
        fields = dict(entry.config) | fields
    elif name in systems():
        system = name
    else:
        raise errors.unknown("tokenizer", name, [*available(), *systems()])
    model = systems()[system].Model
    accepted = [field for field in model.__dataclass_fields__ if field not in ("parent", "name")]
    for field in fields:
        if field not in accepted:
            raise errors.unknown(f"field of {system}", field, accepted)
    return model(**{field: _attribute(value) for field, value in fields.items()})


def _attribute(value: Any) -> Any:
    """Linen attributes must be hashable: lists become tuples, a mapping with a name becomes its bottleneck."""
    if isinstance(value, Mapping):
        fields = {key: _attribute(item) for key, item in value.items()}
        return quantize.create(fields.pop("name"), **fields)
    if isinstance(value, (list, tuple)):
        return tuple(_attribute(item) for item in value)
    return value


def example_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the smallest input that passes through every layer: ``(1, T, H, W, C)`` or ``(1, H, W, C)``."""
    spec = module.spec
    time, height, width = spec.compression
    frames = (1 + time if spec.first_frame_alone else time,) if spec.video else ()
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
    """Facts about a released variant: compression, codebook or channels, parameters, causality, paper, source, licence."""
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
