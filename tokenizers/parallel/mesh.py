"""The device mesh: named axes for data, fsdp and context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .. import errors
from .constrain import CONTEXT_AXIS, DATA_AXES

CONTEXT_SPLITS = ("height", "width", "time")


def make_mesh(
    data: int = -1, fsdp: int = 1, context: int = 1, split: str = "height", devices: Sequence | None = None
) -> Mesh:
    """A mesh with axes ``("data", "fsdp", "context_<split>")``.

    Args:
      data: devices along the batch; one of the three sizes may be -1 = all that remain.
      fsdp: devices over which the batch and the large parameters are split.
      context: devices over which one axis of the activations is split.
      split: which axis that is: height, width or time. Time is odd (1 + 4 k) in causal tokenizers, so height or width
        divide more often.
      devices: default all devices of all processes.
    """
    if split not in CONTEXT_SPLITS:
        raise errors.unknown("context split", split, CONTEXT_SPLITS)
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "context": context}
    if list(sizes.values()).count(-1) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes {sizes}: each must be positive, and at most one may be -1 (all that remain).")
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh sizes {sizes} do not use the {len(devices)} devices exactly; their product must be that."
        )
    names = (*DATA_AXES, f"{CONTEXT_AXIS}_{split}")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=devices)


def from_config(config: Mapping) -> Mesh:
    """`make_mesh` from ``config.mesh``: ``data``, ``fsdp``, ``context``, ``split``."""
    return make_mesh(config["data"], config["fsdp"], config["context"], config["split"])


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes that split a batch."""
    return tuple(axis for axis in DATA_AXES if axis in mesh.axis_names)


def batch_parts(mesh: Mesh) -> int:
    """Number of pieces a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process loads the rows ``[index * B / count, (index + 1) * B / count)`` of a batch of B.

    Not the process index and count where the context axis spans processes: those then load the same rows.
    """
    parts = batch_parts(mesh)
    places = NamedSharding(mesh, PartitionSpec(batch_axes(mesh))).addressable_devices_indices_map((parts,))
    mine = sorted({row for (rows,) in places.values() for row in range(parts)[rows]})
    if parts % len(mine) or mine[0] % len(mine) or mine[-1] - mine[0] + 1 != len(mine):
        raise ValueError(
            f"mesh {dict(mesh.shape)} gives this process the parts {mine} of {parts} of a batch; they must be one "
            "aligned block. Choose sizes that are multiples of each other, in the order of the devices."
        )
    return mine[0] // len(mine), parts // len(mine)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def global_batch(mesh: Mesh, local: np.ndarray) -> jax.Array:
    """One global array from the rows of the batch that each process has loaded (`batch_share`).

    Raises:
      ValueError: when the mesh does not divide the global batch.
    """
    total, parts = local.shape[0] * batch_share(mesh)[1], batch_parts(mesh)
    if total % parts:
        raise ValueError(
            f"a batch of {total} items cannot be split over {parts} devices (mesh {dict(mesh.shape)}); "
            f"use a multiple of {parts}."
        )
    placement = batch_sharding(mesh)
    return jax.make_array_from_process_local_data(placement, local, (total, *local.shape[1:]))
