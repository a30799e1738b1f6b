"""Bottlenecks, one per file, with one interface (docs/architecture.md, "A bottleneck")."""

from __future__ import annotations

import importlib
from typing import Any

from .. import errors

BOTTLENECKS = {
    "fsq": (".fsq", "FSQ"),
    "vq": (".vq", "VectorQuantizer"),
    "lfq": (".lfq", "LFQ"),
    "bsq": (".bsq", "BSQ"),
    "ibq": (".ibq", "IBQ"),
    "simvq": (".simvq", "SimVQ"),
    "residual": (".residual", "Residual"),
    "grouped": (".grouped", "Grouped"),
    "gumbel": (".gumbel", "GumbelSoftmax"),
    "gumbel_nearest": (".gumbel", "GumbelNearest"),
    "gaussian": (".gaussian", "DiagonalGaussian"),
    "identity": (".identity", "Identity"),
}


def create(name: str, **fields: Any):
    """The bottleneck of that name; fields are those of its Linen module.

    Raises:
      ValueError: for an unknown name or field.
    """
    file, cls = errors.pick("bottleneck", name, BOTTLENECKS)
    bottleneck = getattr(importlib.import_module(file, __package__), cls)
    accepted = [field for field in bottleneck.__dataclass_fields__ if field not in ("parent", "name")]
    for field in fields:
        if field not in accepted:
            raise errors.unknown(f"field of bottleneck {name}", field, accepted)
    return bottleneck(**fields)
