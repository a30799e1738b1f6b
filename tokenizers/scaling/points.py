"""The points of a sweep: every combination of the values of its axes, and what each changes in a config."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a study.

    Attributes:
      values: by axis, the name of the value that it has there.
      overrides: fields of the training config, as on the command line: ``{"optimizer.lr": 1e-4}``.
    """

    values: Mapping[str, str]
    overrides: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its folder."""
        return "_".join(f"{axis}-{value}" for axis, value in self.values.items())


def points(axes: Mapping[str, Mapping[str, Mapping[str, Any]]], seeds: int) -> list[Point]:
    """All of a study's points, each with seeds from 0 on.

    Args:
      axes: by axis, in the order that names them, its values by name, each of them overrides.
      seeds: runs that differ in nothing but ``config.seed``.

    Raises:
      ValueError: for axes without values, and where two axes change one field.
    """
    if seeds < 1:
        raise ValueError(f"a study needs at least one seed, got seeds={seeds}.")
    for axis, values in axes.items():
        if not values:
            raise ValueError(f"axis {axis!r} of the study has no values.")
    found = []
    for chosen in itertools.product(*(values.items() for values in axes.values())):
        overrides: dict[str, Any] = {}
        for axis, (name, changes) in zip(axes, chosen, strict=True):
            twice = sorted(set(overrides) & set(changes))
            if twice:
                raise ValueError(f"axis {axis!r}, value {name!r}: another axis changes {', '.join(twice)} as well.")
            overrides |= changes
        values = {axis: name for axis, (name, _) in zip(axes, chosen, strict=True)}
        found += [Point(values | {"seed": str(seed)}, overrides | {"seed": seed}) for seed in range(seeds)]
    return found


def flags(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as they stand on a command line."""
    return [f"--config.{name}={_text(value)}" for name, value in overrides.items()]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return repr(tuple(_tuples(entry) for entry in value))
    return str(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, (list, tuple)) else value
