"""A generator with its weights: where it comes from, and how it is sampled."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import convert, errors, registry
from ..parallel import platform
from ..types import Array
from . import flow

VELOCITY = flow.Flow()
SAMPLERS = {"euler": flow.euler, "dopri5": flow.dopri5}


@functools.cache
def systems() -> dict[str, ModuleType]:
    """Generator files by the name of their system."""
    names = sorted(info.name for info in pkgutil.iter_modules([str(pathlib.Path(__file__).parent)]))
    files = (importlib.import_module(f".{name}", __package__) for name in names)
    return {file.SYSTEM: file for file in files if hasattr(file, "SYSTEM")}


def build(name: str, **fields: Any) -> nn.Module:
    """The Linen module of a released variant or of a system, with fields overridden."""
    known = {
        variant: (file, dict(entry.config)) for file in systems().values() for variant, entry in file.VARIANTS.items()
    }
    known |= {system: (file, {}) for system, file in systems().items()}
    file, config = errors.pick("generator", name, known)
    return registry.with_fields(file.Model, name, config | fields)


def shapes(module: nn.Module) -> Mapping[str, Any]:
    """Shapes and dtypes of its variables."""
    return jax.eval_shape(module.init, jax.random.key(0), *module.example())


def create(name: str, seed: int = 0, **fields: Any) -> Any:
    """A generator with random weights: a `Generator`, or what its file calls so."""
    module = build(name, **fields)
    initialize = jax.jit(module.init, compiler_options=platform.run_once_options())
    return _made(module, initialize(jax.random.key(seed), *module.example()), name)


def _made(module: nn.Module, variables: Mapping[str, Any], name: str) -> Any:
    return getattr(systems()[_system_of(module)], "Generator", Generator)(module, variables, name)


def from_official(system: str, config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray]) -> Any:
    """A generator from the authors' own config and state dict; errors as in `tokenizers.from_official`."""
    table = convert.system(system)
    return _converted(system, table.fields_from_official(config), state_dict)


def load(file: str | pathlib.Path, model: str, **fields: Any) -> Any:
    """A generator from an official weight file; ``model`` is the released variant, or the system, it belongs to."""
    from ..convert import files

    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is no weight file.")
    return _converted(model, fields, files.read_state_dict(path))


def _converted(name: str, fields: Mapping[str, Any], state_dict: Mapping[str, np.ndarray]) -> Any:
    module = build(name, **fields)
    table = convert.system(_system_of(module))
    variables = convert.variables(table, module, shapes(module), convert.named(table, state_dict))
    return _made(module, jax.tree.map(jnp.asarray, variables), name)


def _system_of(module: nn.Module) -> str:
    return next(system for system, file in systems().items() if isinstance(module, file.Model))


@dataclasses.dataclass(frozen=True)
class Generator:
    """Module, variables and name of a network that makes latents from noise and labels."""

    module: nn.Module
    variables: Mapping[str, Any]
    name: str

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of an item, ``(h, w, C)``."""
        return (*self.module.grid, self.module.channels)

    def sample(
        self,
        key: Any,
        labels: Any,
        *,
        points: int = 250,
        shift: float = 0.0,
        sampler: str = "euler",
        guidance: float = 1.0,
        guidance_start: float | None = None,
        guided_channels: int | None = 3,
        noise: Array | None = None,
        matching: flow.Flow = VELOCITY,
    ) -> Array:
        """Latents ``(B, h, w, channels)``, normalised as those it was trained on.

        Args:
          key: of the noise.
          labels: int ``(B,)``; the number of classes means none.
          points: times at which the flow is followed; one more than steps.
          shift: see `flow.times`.
          sampler: ``euler``, or ``dopri5``, which chooses its steps itself.
          guidance: scale of classifier-free guidance, 1 is none.
          guidance_start: time before which there is none.
          guided_channels: see `flow.guided`.
          noise: in place of ``key``'s.
          matching: what the network predicts, on which path.
        """
        follow = errors.pick("sampler", sampler, SAMPLERS)
        labels = jnp.asarray(labels, jnp.int32)
        if labels.ndim != 1 or (labels.size and not 0 <= int(labels.min()) <= int(labels.max()) <= self.module.classes):
            raise ValueError(f"labels must be (B,) integers from 0 to {self.module.classes} (none); got {labels}.")
        if noise is None:
            noise = jax.random.normal(key, (len(labels), *self.latent_shape))
        run = _sampler(self.module, follow, guidance, guidance_start, guided_channels, matching)
        return run(self.variables, jnp.asarray(noise), labels, flow.times(points, shift))


@functools.lru_cache(maxsize=16)
def _sampler(module, follow, guidance, start, channels, matching):
    @platform.jit
    def run(variables, noise, labels, at):
        network = functools.partial(module.apply, variables)
        nothing = jnp.full_like(labels, module.classes)

        def velocity(x, t):
            if guidance == 1.0:
                predicted = network(x, t, labels)
            else:
                predicted = flow.guided(network, guidance, start=start, channels=channels)(x, t, labels, nothing)
            return matching.velocity(predicted, x, t)

        return follow(velocity, noise, at)

    return run
