"""A run without its devices: every step is compiled for the mesh, from shapes alone, and nothing is computed.

Needs neither the data nor weight files. The devices are virtual ones of the CPU's backend, whose programs keep bfloat16
values in float32 here and there; an accelerator's pads small axes. What it says of memory is a guide, not a promise.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from .. import errors
from ..networks import weights
from ..parallel import flops, traffic
from ..parallel import mesh as meshes
from . import build
from . import config as configs
from .step import Trainable, make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled step.

    Attributes:
      inputs: what it is compiled for, in words.
      seconds: that compiling took.
      flops: of matrix products and convolutions, of all devices together.
      peak: bytes of one device.
      state: of these, the state's.
      transfers: what the devices send each other in a step.
    """

    inputs: str
    seconds: float
    flops: float
    peak: int
    state: int
    transfers: Sequence[traffic.Transfer]

    @property
    def traffic(self) -> Mapping[str, int]:
        """Bytes that one device receives per step, by kind of collective."""
        return traffic.bytes_by_kind(self.transfers)


def mesh_fields(text: str) -> dict[str, Any]:
    """``data:8,fsdp:8`` (also ``context:2``, and ``split:width``) as fields of ``config.mesh``.

    Raises:
      ValueError: for what is none.
    """
    fields: dict[str, Any] = {}
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition(":")
        if name not in ("data", "fsdp", "context", "split"):
            raise errors.unknown("axis of --mesh", name, ("data", "fsdp", "context", "split"))
        if name != "split" and not (value.isdecimal() and int(value)):
            raise ValueError(f"--mesh={text!r}: {name} takes a number of devices, e.g. {name}:8, not {value!r}.")
        fields[name] = value if name == "split" else int(value)
    return fields


def devices(mesh: Mapping[str, Any]) -> int:
    """How many a mesh of ``config.mesh`` has; an axis of -1 counts once."""
    return math.prod(max(mesh[name], 1) for name in ("data", "fsdp", "context"))


def compile_steps(config: Mapping) -> Iterator[Program]:
    """The step of every batch shape, as it is when all its parts run.

    Args:
      config: of a run; its mesh must be as large as the number of devices.

    Raises:
      ValueError: for a config that does not fit.
    """
    config = compilable(configs.to_dict(config))
    configs.check_numbers(config)
    mesh = meshes.from_config(config["mesh"])
    with jax.set_mesh(mesh):
        recipe = build.recipe(config)
        shapes = _batches(config, recipe)
        build.check_batches(shapes, recipe, mesh)
        state = build.abstract_state(config, recipe, mesh)
        everywhere, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
        networks = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), dict(recipe.networks)
        )
        for name, shape in shapes:
            inputs = {
                key: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows)
                for key, array in recipe.inputs_of(shape).items()
            }
            last = recipe.at(config["steps"])
            program = jax.jit(make_step(last), donate_argnums=0, out_shardings=build.out_shardings(state, mesh))
            began = time.perf_counter()
            traced = program.trace(state, networks, inputs)
            compiled = traced.lower().compile()
            seconds = time.perf_counter() - began
            yield Program(
                inputs=f"stream {name!r}: " + ", ".join(f"{key} {array.shape}" for key, array in inputs.items()),
                seconds=seconds,
                flops=flops.count(traced.jaxpr),
                peak=traffic.peak_bytes(compiled),
                state=sum(_local_bytes(leaf) for leaf in jax.tree.leaves(state)),
                transfers=traffic.transfers(compiled),
            )


def _batches(config: Mapping, recipe: Trainable) -> list[tuple[str, tuple[int, ...]]]:
    """(stream, global shape) of all batches."""
    if config["recipe"] == "generator":  # of latents; without a folder of them, such as the network's defaults are for
        return [("latents", (config["data"]["batch_size"], *recipe.model.grid, recipe.model.channels))]
    return [
        (name, (stream["batch_size"], stream["frames"], *size, 3))
        for name, stream in config["data"]["streams"].items()
        for size in stream["resolutions"]
    ]


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))


def compilable(config: Mapping) -> dict[str, Any]:
    """The config as it can be compiled: shapes in place of weight files, random weights for a whole tokenizer."""
    config = copy.deepcopy(dict(config))
    config["init_from"] = None
    if config["precision"] == "auto":  # what it means where such a run takes place
        config["precision"] = "bfloat16"
    if config["recipe"] == "generator":
        return dict(build.kind(config).resolve(config)) if config["data"]["path"] else config
    for place, name in (
        *((config["loss"], f"{part}_path") for part in ("perceptual", "convnext", "vgg", "flow")),
        (config["loss"]["alignment"], "path"),
        (config["discriminator"], "path"),
        (config["captions"], "path"),
    ):
        place[name] = weights.SHAPES
    config["loss"]["tokens"]["path"] = "random"
    config["init_parts"] = {}
    return config


def report(config: Mapping, say: Callable[[str], None]) -> None:
    """`compile_steps`, in words."""
    mesh = meshes.from_config(config["mesh"])
    say(f"dry run on {mesh.size} virtual devices, mesh {dict(mesh.shape)}")
    for program in compile_steps(config):
        sent = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in sorted(program.traffic.items())) or "none"
        say(
            f"{program.inputs}\n"
            f"  memory per device: {program.peak / 2**30:.2f} GiB, of these the state {program.state / 2**30:.2f} GiB\n"
            f"  {program.flops / mesh.size / 1e12:.2f} TFLOP per device and step\n"
            f"  received per device and step, GiB: {sent}\n"
            f"  compiled in {program.seconds:.0f} s"
        )
