"""Activation sharding by name: layers say what their axes mean, the mesh in force says where they go."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

DATA_AXES = ("data", "fsdp")
CONTEXT_AXIS = "context"

# Which activation axis the context axis of the mesh splits is part of the mesh itself, as the suffix of the axis name,
# so that the layers need no argument and no global variable. A plain "context" splits the height.
_CONTEXT_NAMES = {CONTEXT_AXIS: "height"} | {f"{CONTEXT_AXIS}_{name}": name for name in ("time", "height", "width")}


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the compiler to lay out ``x`` over the mesh in force (`jax.set_mesh`); the identity without one.

    Args:
      x: an array with one name per axis.
      names: of ``batch``, ``time``, ``height``, ``width``, ``channel``, ``None``. ``batch`` goes over (data, fsdp), the
        axis that the mesh's context axis splits goes over it, all others are replicated.

    An axis whose size the mesh does not divide is left alone.
    """
    if len(names) != x.ndim:
        raise ValueError(f"constrain got {len(names)} names {names} for an array of shape {x.shape}.")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = [_fitting(mesh, _axes_of(mesh, name), size) for name, size in zip(names, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def whole(tree: Any) -> Any:
    """Parameters as layers use them: on every device, however they are stored. The identity without a mesh.

    Call it where parameters enter a model. XLA would gather split ones by itself, except where it thinks it need not:
    a convolution whose image is split along its height and whose kernel is split along its channels came out wrong,
    forward or backward, without any error (jax 0.10.2 on CPU). Gradients pass whole as well, and are split again where
    the optimizer keeps its state.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)


def divided() -> bool:
    """Whether more than one device is at work (the mesh in force)."""
    return jax.sharding.get_abstract_mesh().size > 1


def splits(name: str) -> bool:
    """Whether the mesh in force splits that activation axis (``time``, ``height``, ``width``)."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[axis] > 1 for axis in ([] if mesh.empty else _axes_of(mesh, name)))


def _axes_of(mesh, name: str | None) -> tuple[str, ...]:
    if name == "batch":
        return tuple(axis for axis in DATA_AXES if axis in mesh.axis_names)
    return tuple(axis for axis in mesh.axis_names if name is not None and _CONTEXT_NAMES.get(axis) == name)


def _fitting(mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    while axes:
        parts = 1
        for axis in axes:
            parts *= mesh.shape[axis]
        if size % parts == 0:
            return axes
        axes = axes[1:]  # (data, fsdp) falls back to fsdp alone, then to no sharding
    return None
