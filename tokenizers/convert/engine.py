"""Conversion tables: which official tensor holds which of our parameters, in both directions and strict in both.

A table is a tuple of `Rule`s written from our side. Our variables are flattened to paths like
``params/decoder/conv_out/kernel``; the first rule whose regular expression matches the whole path names the official
tensor::

    TABLE = (
        Rule(r"params/(encoder|decoder)/conv_in/(?:kernel|bias)", r"\\1.conv_in.{leaf}"),
        Rule(r"params/quantize/codebook", r"quantize.embedding.weight"),
    )
    variables = to_tree(TABLE, jax.eval_shape(model.init, ...), state_dict, ignore=(r"loss\\..*",))
    state_dict = to_official(TABLE, variables)

A module called ``layers`` is a scanned one (`nn/scan.py`): each of its leaves holds that of all layers along axis 0.
Tables see one path per layer, ``params/encoder/layers/3/norm1/scale``, as if the layers were modules of their own.

Where official names depend on the depth of a network, or differ between published files, TABLE is a function of our
paths and of the official names at hand (none when names are made) that returns the rules.

Pure numpy; arrays of any kind are read through ``np.asarray``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Our leaf names and what PyTorch calls the same thing; other names are the same on both sides.
OFFICIAL_LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}

# Nearest matches cost a string comparison with every name: only the first problems of a kind get one.
_HINTS = 20


@dataclasses.dataclass(frozen=True)
class Transform:
    """Two functions that undo each other: the official array to ours and back.

    ``part=(index, count)`` says that our leaf is one of ``count`` equal pieces along axis 0 of the official tensor
    (a fused query-key-value weight, say); the functions then see that piece alone.
    """

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_official: Callable[[np.ndarray], np.ndarray]
    part: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table.

    Attributes:
      ours: regular expression for the whole path of one of our leaves, ``"params/conv_in/(kernel|bias)"``.
      official: the official name. ``\\1`` and ``\\g<name>`` are groups of the expression (``/`` in them becomes ``.``),
        ``{leaf}`` is PyTorch's word for the last part of our path (kernel, scale, embedding -> weight, mean ->
        running_mean, var -> running_var, bias -> bias). A function of the match where the name needs arithmetic.
        None for a variable that official files never hold.
      transform: the layout; by default a ``kernel`` goes from (out, in, ...) to (..., in, out), all else stays.
      absent: our value where the file has no such tensor, ``(match, state_dict, leaf) -> array``, for statistics that
        follow from the rest (counts of a codebook, say). Without it a missing tensor is an error.
    """

    ours: str
    official: str | Callable[[re.Match], str] | None
    transform: Transform | None = None
    absent: Callable[[re.Match, Mapping[str, np.ndarray], Any], np.ndarray] | None = None

    def __post_init__(self):
        if self.official is None and self.absent is None:
            raise ValueError(f"the rule for {self.ours!r} names neither an official tensor nor a value in its absence.")


Table = Sequence[Rule] | Callable[[Sequence[str], Sequence[str]], Sequence[Rule]]


# --- layouts ---------------------------------------------------------------------------------------------------------


def _kernel_to_ours(array: np.ndarray) -> np.ndarray:
    return array if array.ndim < 2 else np.moveaxis(array, (0, 1), (-1, -2))


def _kernel_to_official(array: np.ndarray) -> np.ndarray:
    return array if array.ndim < 2 else np.moveaxis(array, (-1, -2), (0, 1))


def _flip_spatial(array: np.ndarray, axes: Iterable[int]) -> np.ndarray:
    return np.flip(array, tuple(axes))


identity = Transform(lambda a: a, lambda a: a)
"""The same layout on both sides."""

kernel = Transform(_kernel_to_ours, _kernel_to_official)
"""Convolution (O, I, k...) <-> (k..., I, O) and dense (O, I) <-> (I, O); what ``kernel`` leaves use by default."""

transposed_conv = Transform(
    lambda a: _flip_spatial(np.moveaxis(a, (0, 1), (-2, -1)), range(a.ndim - 2)),
    lambda a: np.moveaxis(_flip_spatial(a, range(a.ndim - 2)), (-2, -1), (0, 1)),
)
"""PyTorch's ConvTranspose (I, O, k...) <-> (k..., I, O) of `jax.lax.conv_transpose`, which does not flip the kernel."""


def dense_from_conv(spatial: int) -> Transform:
    """Official 1x1 convolution (O, I, 1, ...) with that many spatial axes <-> our dense kernel (I, O)."""
    axes = tuple(range(2, 2 + spatial))
    return Transform(lambda a: np.squeeze(a, axes).T, lambda a: np.expand_dims(a.T, axes))


def conv_from_dense(spatial: int) -> Transform:
    """Official dense kernel (O, I) <-> our 1x1 convolution (1, ..., I, O) with that many spatial axes."""
    axes = tuple(range(spatial))
    return Transform(lambda a: np.expand_dims(a.T, axes), lambda a: np.squeeze(a, axes).T)


def squeeze(*axes: int) -> Transform:
    """Official tensor with extra axes of size one at these places <-> ours without them."""
    return Transform(lambda a: np.squeeze(a, axes), lambda a: np.expand_dims(a, axes))


def expand(*axes: int) -> Transform:
    """Our leaf has extra axes of size one at these places <-> the official tensor without them."""
    return Transform(lambda a: np.expand_dims(a, axes), lambda a: np.squeeze(a, axes))


def reshape(official: Sequence[int], ours: Sequence[int]) -> Transform:
    """Both shapes given; one entry of each may be -1."""
    return Transform(lambda a: a.reshape(tuple(ours)), lambda a: a.reshape(tuple(official)))


def transpose(*axes: int) -> Transform:
    """``ours = official.transpose(axes)``."""
    back = tuple(int(i) for i in np.argsort(axes))
    return Transform(lambda a: a.transpose(axes), lambda a: a.transpose(back))


def part(index: int, count: int, of: Transform = identity) -> Transform:
    """Our leaf is piece ``index`` of ``count`` equal pieces of the official axis 0, itself laid out by ``of``."""
    return Transform(of.to_ours, of.to_official, part=(index, count))


# --- names -----------------------------------------------------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to ``{"params/conv_in/kernel": leaf}``."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, path + "/")
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


LAYERS = "layers"


def per_layer(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat leaves with those of scanned layers cut into one per layer."""
    split = {}
    for path, leaf in flat.items():
        head, found, tail = path.partition(f"/{LAYERS}/")
        if found:
            split |= {f"{head}{found}{i}/{tail}": _layer(leaf, i) for i in range(leaf.shape[0])}
        else:
            split[path] = leaf
    return split


def _layer(leaf: Any, index: int) -> Any:
    abstract = not hasattr(leaf, "__array__")
    return _Shape(tuple(leaf.shape[1:]), leaf.dtype) if abstract else np.asarray(leaf)[index]


@dataclasses.dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]
    dtype: Any


def stacked(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `per_layer`."""
    whole, layers = {}, {}
    for path, leaf in flat.items():
        head, found, tail = path.partition(f"/{LAYERS}/")
        if found:
            index, _, tail = tail.partition("/")
            layers.setdefault(f"{head}{found}{tail}", {})[int(index)] = leaf
        else:
            whole[path] = leaf
    return whole | {path: np.stack([found[i] for i in range(len(found))]) for path, found in layers.items()}


def official_names(table: Table, paths: Iterable[str]) -> dict[str, str]:
    """``{our path: official name}``; a ``ValueError`` lists the paths without a rule and the names given twice."""
    plan = _plan(table, paths)
    return {path: name for path, (name, _, _) in plan.items() if name is not None}


def _expand(rule: Rule, match: re.Match, path: str) -> str | None:
    if rule.official is None:
        return None

    def group(reference: re.Match) -> str:
        key = reference[1] or reference[2]
        return (match[int(key) if key.isdigit() else key] or "").replace("/", ".")

    leaf = path.rsplit("/", 1)[-1]
    if callable(rule.official):
        name = rule.official(match)
    else:
        name = re.sub(r"\\(?:(\d+)|g<(\w+)>)", group, rule.official)
    return name.replace("{leaf}", OFFICIAL_LEAF.get(leaf, leaf))


Absent = Callable[[Mapping[str, np.ndarray], Any], np.ndarray]


def _plan(
    table: Table, paths: Iterable[str], official: Iterable[str] = ()
) -> dict[str, tuple[str | None, Transform, Absent | None]]:
    """Official name, layout and value in its absence for each of our paths."""
    plan, orphans, holders = {}, [], {}
    paths = tuple(paths)
    table = table(paths, tuple(official)) if callable(table) else table
    for path in paths:
        for rule in table:
            match = re.fullmatch(rule.ours, path)
            if match:
                default = kernel if path.rsplit("/", 1)[-1] == "kernel" else identity
                absent = functools.partial(rule.absent, match) if rule.absent else None
                plan[path] = (_expand(rule, match, path), rule.transform or default, absent)
                if plan[path][0] is not None:
                    holders.setdefault(plan[path][0], []).append(path)
                break
        else:
            orphans.append(path)
    problems = [f"no rule of the table matches our {path}" for path in orphans]
    for name, sharing in holders.items():
        parts = [plan[path][1].part for path in sharing]
        if parts == [None]:
            continue
        count = parts[0][1] if parts[0] else 0
        if sorted(p or (-1, -1) for p in parts) != [(i, count) for i in range(count)]:
            problems.append(f"{name} is given to {', '.join(sharing)}, which are not all its parts ({parts})")
    _raise("The conversion table does not fit the model", problems)
    return plan


# --- both directions -------------------------------------------------------------------------------------------------


def to_tree(
    table: Table,
    target: Mapping[str, Any],
    state_dict: Mapping[str, np.ndarray],
    ignore: Iterable[str] = (),
) -> dict[str, Any]:
    """Official tensors as our variables.

    Args:
      table: the rules, first match wins, or a function that returns them.
      target: our variables as nested dictionaries, every leaf with ``shape`` and ``dtype`` (`jax.eval_shape` of init).
      state_dict: ``{official name: array}``.
      ignore: regular expressions for whole official names that are dropped on purpose.

    Returns:
      The tree of ``target`` with numpy arrays of its dtypes.

    Raises:
      ValueError: lists every missing, unexpected and misshapen tensor at once.
    """
    wanted = per_layer(flatten(target))
    plan = _plan(table, wanted, state_dict)
    used = {name for name, _, _ in plan.values()}
    ignored = [re.compile(pattern) for pattern in ignore]
    spare = [n for n in state_dict if n not in used and not any(pattern.fullmatch(n) for pattern in ignored)]
    missing = [(path, name) for path, (name, _, absent) in plan.items() if name not in state_dict and not absent]

    problems = [f"missing {n!r} (our {p}){_nearest(n, spare, i)}" for i, (p, n) in enumerate(missing)]
    gone = [name for _, name in missing]
    problems += [f"unexpected {n!r} {np.shape(state_dict[n])}{_nearest(n, gone, i)}" for i, n in enumerate(spare)]
    flat = {}
    for path, (name, transform, _) in plan.items():
        if name in state_dict:
            try:
                flat[path] = _fitted(np.asarray(state_dict[name]), transform, wanted[path])
            except ValueError as error:
                problems.append(f"misshapen {name!r} (our {path}): {error}")
    _raise("The official weights do not fit the model", problems)
    for path, (name, _, absent) in plan.items():
        if name not in state_dict:
            flat[path] = _fitted(np.asarray(absent(state_dict, wanted[path])), identity, wanted[path])
    return unflatten(stacked(flat))


def to_official(table: Table, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our variables as ``{official name: array}``: the exact inverse of `to_tree` (ignored tensors stay away)."""
    flat = per_layer(flatten(tree))
    plan = _plan(table, flat)
    whole: dict[str, np.ndarray] = {}
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for path, (name, transform, _) in plan.items():
        if name is None:
            continue
        value = np.array(transform.to_official(np.asarray(flat[path])), order="C")
        if transform.part:
            pieces.setdefault(name, {})[transform.part[0]] = value
        else:
            whole[name] = value
    for name, found in pieces.items():
        whole[name] = np.concatenate([found[i] for i in range(len(found))])
    return whole


def _fitted(array: np.ndarray, transform: Transform, want: Any) -> np.ndarray:
    """The official array in our layout and dtype, or a ``ValueError`` that says what is wrong with it."""
    shape, dtype = tuple(want.shape), np.dtype(want.dtype)
    official_shape = array.shape
    if transform.part:
        index, count = transform.part
        if not array.ndim or array.shape[0] % count:
            raise ValueError(f"its shape {official_shape} cannot be cut into {count} parts")
        array = np.split(array, count)[index]
    try:
        ours = transform.to_ours(array)
    except ValueError as error:
        raise ValueError(f"its shape {official_shape} cannot be laid out as our {shape} ({error})") from error
    if ours.shape != shape:
        raise ValueError(f"its shape {official_shape} becomes {ours.shape}, the model has {shape}")
    if _is_float(ours.dtype) != _is_float(dtype):
        raise ValueError(f"it holds {ours.dtype}, the model {dtype}")
    return np.array(ours, dtype=dtype, order="C")


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind not in "biu"


def _nearest(name: str, candidates: list[str], rank: int) -> str:
    if rank >= _HINTS:
        return ""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f"; nearest on the other side: {close[0]!r}" if close else ""


def _raise(headline: str, problems: list[str]) -> None:
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{headline}: {len(problems)} problem{'s' * (len(problems) > 1)}.{lines}")
