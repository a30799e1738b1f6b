"""What a program sends between devices and takes of their memory, read from the program itself."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}
_BYTES |= dict.fromkeys(("f32", "s32", "u32"), 4) | dict.fromkeys(("bf16", "f16", "s16", "u16"), 2)
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]* )?\{$", re.MULTILINE)
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][\w\-]*)\((.*)$", re.MULTILINE)
_CALLED = re.compile(r"(?:to_apply|body|condition|calls|\w+_computations?)=\{?([^,}]*(?:, ?%[\w.\-]+)*)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective operation of a program.

    Attributes:
      kind: of `COLLECTIVES`.
      size: bytes of its result on one device.
      shapes: of its result.
      times: how often the program runs it; loops whose length is not known count once.
    """

    kind: str
    size: int
    shapes: tuple[tuple[int, ...], ...]
    times: int


def transfers(compiled: Any) -> list[Transfer]:
    """The collectives of a compiled program (`jax.stages.Compiled`), one device's view."""
    text = compiled.as_text()
    heads = list(_COMPUTATION.finditer(text))
    bodies = {
        head[1]: text[head.end() : following.start() if following else len(text)]
        for head, following in zip(heads, [*heads[1:], None], strict=True)
    }
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    times: collections.Counter = collections.Counter()
    _count(entry[1], 1, bodies, times)
    found = []
    for name, often in times.items():
        for shape, kind, _ in _OPERATION.findall(bodies[name]):
            kind = kind.removesuffix("-start")
            if kind in COLLECTIVES:
                shapes, size = _arrays(shape)
                found.append(Transfer(kind, size, shapes, often))
    return found


def _count(name: str, times: int, bodies: Mapping[str, str], total: collections.Counter) -> None:
    total[name] += times
    for _, operation, rest in _OPERATION.findall(bodies[name]):
        trips = _TRIPS.search(rest)
        repeat = int(trips[1]) if operation == "while" and trips else 1
        for called in _CALLED.findall(rest):
            for inner in re.findall(r"%?([\w.\-]+)", called):
                if inner in bodies and inner != name:
                    _count(inner, times * repeat, bodies, total)


def _arrays(shape: str) -> tuple[tuple[tuple[int, ...], ...], int]:
    shapes, size = [], 0.0
    for kind, sides in _ARRAY.findall(shape):
        if kind in _BYTES or kind.startswith("f8"):
            sides = tuple(int(side) for side in sides.split(",") if side)
            shapes.append(sides)
            size += math.prod(sides) * _BYTES.get(kind, 1)
    return tuple(shapes), int(size)


def bytes_by_kind(found: Sequence[Transfer]) -> dict[str, int]:
    """Bytes that one device receives in a run of the program, by kind of collective."""
    total: collections.Counter = collections.Counter()
    for transfer in found:
        total[transfer.kind] += transfer.size * transfer.times
    return dict(total)


def peak_bytes(compiled: Any) -> int:
    """Memory of one device: arguments, results that are not written over them, and what lies between."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + max(results, 0)


def kept_bytes(function: Callable, params: Any, *inputs: Any) -> int:
    """Bytes that a function leaves for its backward pass, parameters and inputs apart; traced from shapes, not run.

    They are what differentiation asks for, on any platform. A compiler may keep more, or compute more again.

    Args:
      function: of ``(params, *inputs)``, differentiated with respect to the parameters.
      params, inputs: pytrees of arrays or shapes.
    """
    program = jax.make_jaxpr(
        lambda params, *inputs: jax.tree.leaves(jax.vjp(lambda params: function(params, *inputs), params)[1])
    )(params, *inputs).jaxpr
    given = {*program.invars, *program.constvars}
    left = {value for value in program.outvars if not isinstance(value, Literal)} - given
    return sum(value.aval.size * value.aval.dtype.itemsize for value in left)
