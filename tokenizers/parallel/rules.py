"""Where parameters go: regular expressions over their paths, and one default.

Optimizer state and EMA repeat the paths of the parameters inside their own, so the same rules place them too. Plain
paths instead of boxed metadata keep parameter trees plain dictionaries for conversion, EMA and checkpoints.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import errors

Rule = tuple[str, str | tuple]

# Smaller arrays are not worth the gather.
FSDP_SMALLEST = 2**16


def path_name(path) -> str:
    """``a/b/c`` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def spec_for(path: str, shape: Sequence[int], mesh: Mesh, rules: Sequence[Rule], smallest: int) -> PartitionSpec:
    """The partition of one array.

    Args:
      path: its ``a/b/c`` path; the first rule whose expression is found in it decides.
      shape: its shape.
      mesh: the mesh; its axes are ``data``, ``fsdp`` and ``context`` (whatever the context splits).
      rules: pairs (expression, placement); a placement is ``"fsdp"`` (the default below), ``"replicate"``, or a tuple
        with one mesh axis name or ``None`` per array axis.
      smallest: arrays with fewer elements are replicated by the default.

    Raises:
      ValueError: for a placement that the shape or the mesh does not allow.
    """
    placement: Any = next((place for pattern, place in rules if re.search(pattern, path)), "fsdp")
    if placement == "replicate" or mesh.size == 1:
        return PartitionSpec()
    if placement == "fsdp":
        return _largest_divisible(shape, mesh, smallest)
    if isinstance(placement, str) or len(placement) != len(shape):
        raise ValueError(
            f"sharding rule for {path!r} says {placement!r}; accepted: 'fsdp', 'replicate', or one mesh axis or None "
            f"per axis of its shape {tuple(shape)}."
        )
    axes = [_mesh_axis(axis, mesh) for axis in placement]
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"sharding rule for {path!r} splits {size} of its shape {tuple(shape)} over {mesh.shape[axis]} devices "
                f"of mesh axis {axis!r}, which does not divide it."
            )
    return PartitionSpec(*axes)


def _mesh_axis(name: str | None, mesh: Mesh) -> str | None:
    """The axis of the mesh that a rule means; ``context`` stands for context_height and its siblings."""
    known = {axis.split("_")[0]: axis for axis in mesh.axis_names} | {axis: axis for axis in mesh.axis_names}
    return None if name is None else errors.pick("mesh axis in a sharding rule", name, known)


def check_used(rules: Sequence[Rule], tree: Any) -> None:
    """Refuses a rule whose expression is found in no path of ``tree``.

    Raises:
      ValueError: with the expression and the nearest path.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(f"sharding rule {pattern!r} matches no parameter; the nearest are {', '.join(near)}.")


def _largest_divisible(shape: Sequence[int], mesh: Mesh, smallest: int) -> PartitionSpec:
    parts = mesh.shape.get("fsdp", 1)
    fitting = [i for i, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not fitting or math.prod(shape) < smallest:
        return PartitionSpec()
    best = max(fitting, key=lambda i: (shape[i], i))  # the last one among equals: output channels
    return PartitionSpec(*("fsdp" if i == best else None for i in range(len(shape))))


def shardings(tree: Any, mesh: Mesh, rules: Sequence[Rule] = (), smallest: int = FSDP_SMALLEST) -> Any:
    """A tree of `NamedSharding` for a tree of arrays or `jax.ShapeDtypeStruct`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh, rules, smallest)), tree
    )


def describe(tree: Any, mesh: Mesh, rules: Sequence[Rule] = (), smallest: int = FSDP_SMALLEST) -> str:
    """One line per split array, for the log: path, shape, partition."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        spec = spec_for(path_name(path), leaf.shape, mesh, rules, smallest)
        if any(spec):
            lines.append(f"{path_name(path)} {tuple(leaf.shape)} {spec}")
    return "\n".join(lines) or "every parameter is replicated"
