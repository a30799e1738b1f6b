"""Checkpoints of a run: one atomic step of named items, written in the background. The only importer of orbax.

Items: ``params``, ``ema``, ``model_state``, ``optimizer``, ``adversary``, ``teacher`` (arrays), ``counters`` (steps and
skips), ``data`` and ``meta`` (JSON). Inference reads ``ema`` and ``model_state`` alone.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from .. import errors
from ..parallel.rules import path_name
from .config import read_config  # noqa: F401  (what a run is, beside its weights)
from .state import TrainState

_ARRAY_ITEMS = ("params", "ema", "model_state", "optimizer", "adversary", "teacher", "counters")
_FOLDER = "checkpoints"
_UNMEASURED = -1e9


def _items(state: TrainState) -> dict[str, Any]:
    """The arrays of a state by item; items without a single array are left out (orbax refuses to write them)."""
    counters = {"step": state.step, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    found = {"counters": counters} | {name: getattr(state, name) for name in _ARRAY_ITEMS if name != "counters"}
    return {name: found[name] for name in _ARRAY_ITEMS if jax.tree.leaves(found[name])}


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


class Checkpoints:
    """Writes and reads the steps under ``<run>/checkpoints``.

    Args:
      run: folder of the run.
      keep_last: how many of the latest steps stay.
      keep_best: how many of the best by their score on held-out data stay besides.
    """

    def __init__(self, run: str | pathlib.Path, keep_last: int = 2, keep_best: int = 1):
        self.folder = pathlib.Path(run).resolve() / _FOLDER
        kept = [policies.LatestN(n=keep_last)]
        if keep_best:
            kept.append(policies.BestN(get_metric_fn=_score, n=keep_best, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=_score,  # without it the metrics of a step are not written
            cleanup_tmp_directories=True,  # what a killed save has left
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All complete steps, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Mapping, meta: Mapping, score: float | None = None) -> None:
        """Starts writing the state; returns as soon as the arrays are copied.

        Args:
          state: the run after ``state.step`` steps.
          data: position and fingerprint of the data, JSON.
          meta: what else a reader needs to know, JSON.
          score: of this state on held-out data if it was measured, for keep-best; more is better.
        """
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        arguments |= {"data": ocp.args.JsonSave(dict(data)), "meta": ocp.args.JsonSave(dict(meta))}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(**arguments),
            # Not measured: never better than a measured one.
            metrics={"score": _UNMEASURED if score is None else float(score)},
            force=True,
        )

    def restore(self, target: TrainState, step: int | None = None) -> tuple[TrainState, dict, dict]:
        """(state, data, meta) of a step (default the latest), laid out as ``target`` says.

        Args:
          target: a state of `jax.ShapeDtypeStruct` with shardings; the mesh may differ from the one that saved.
          step: which step.

        Raises:
          ValueError: for an incomplete, damaged or foreign checkpoint: says which folder and what to do.
        """
        step = self.latest() if step is None else step
        wanted = _items(target)
        found = _read(self.folder / str(step), wanted, ("data", "meta"), self.steps(), whole=True)
        counters = found["counters"]
        arrays = {name: found[name] for name in wanted if name != "counters"}
        return target.replace(**arrays, **counters), found["data"], found["meta"]

    def wait(self) -> None:
        """Until the save in flight is complete.

        Raises:
          Exception: what went wrong in it.
        """
        self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        """Waits for the save in flight; what goes wrong in it does not replace the error that ends the run."""
        try:
            self._manager.close()
        except Exception as problem:
            if error is None:
                raise
            error.add_note(f"The last checkpoint could not be completed either: {problem}")


def _read(folder: pathlib.Path, wanted: Mapping, records: tuple[str, ...], steps: list[int], whole: bool) -> dict:
    """The items of a step: trees of arrays laid out as ``wanted`` says, and JSON ``records``.

    Args:
      folder: of the step.
      wanted: trees of `jax.ShapeDtypeStruct` by item.
      records: names of JSON items.
      steps: what else the run has, for the advice when this one cannot be read.
      whole: refuse a step with arrays that nobody asked for.
    """
    found = {}
    reading = ""
    try:
        for reading in (*wanted, *records):
            if not (folder / reading).is_dir():
                raise FileNotFoundError(f"{folder / reading} is missing")
        extra = [name for name in _ARRAY_ITEMS if whole and name not in wanted and (folder / name).is_dir()]
        if extra:
            reading = extra[0]
            raise ValueError(f"this config has no {', '.join(extra)}")
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            for reading, tree in wanted.items():
                _same_arrays(tree, handler.metadata(folder / reading))
        for reading in records:
            with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
                found[reading] = handler.restore(folder / reading)
        for reading, tree in wanted.items():
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                found[reading] = reader.restore(folder / reading, args=ocp.args.StandardRestore(tree))
    except Exception as error:
        raise _damaged(folder, reading, error, steps) from error
    return found


def _same_arrays(wanted: Any, saved: Any) -> None:
    """Refuses another tree before anything is read; what orbax says of it is long and names no parameter."""
    want, have = _shapes(wanted), _shapes(getattr(saved, "tree", saved))
    wrong = [name for name in sorted(want | have) if want.get(name) != have.get(name)]
    if wrong:
        lines = [f"{name}: this config has {want.get(name)}, the file {have.get(name)}" for name in wrong[:5]]
        raise ValueError(f"{len(wrong)} arrays differ: {'; '.join(lines)}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _damaged(folder: pathlib.Path, item: str, error: Exception, steps: list[int]) -> ValueError:
    others = [step for step in steps if str(step) != folder.name]
    remedy = (
        f"To go on from step {max(others)}, move that folder away and run the same command again."
        if others
        else "There is no other step in this run: start anew with another --workdir."
    )
    named = re.search(re.escape(str(folder / item)) + r"[\w./-]*", str(error))
    summary = " ".join(str(error).split())[:600]
    return ValueError(
        f"the checkpoint {folder} cannot be read: {named[0] if named else folder / item} is missing or truncated, or "
        f"was written by another model or version. {remedy} Cause: {type(error).__name__}: {summary}"
    )


def load_weights(run: str | pathlib.Path, target: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
    """``{"ema": ..., "model_state": ...}`` of a run, without optimizer and discriminator.

    Args:
      run: folder of the run.
      target: trees of `jax.ShapeDtypeStruct` for the two items (without ``model_state`` where the model has none).
      step: default the latest.

    Raises:
      ValueError: when there is no checkpoint, or it cannot be read.
    """
    folder = pathlib.Path(run).resolve() / _FOLDER
    if not folder.is_dir():
        raise ValueError(f"{run} has no {_FOLDER}/ folder: it is not a run of train.py, or no step was saved yet.")
    steps = sorted(found.step for found in ocp.path.step.standard_name_format().find_all(folder))
    if not steps:
        raise ValueError(f"{folder} holds no complete checkpoint; let the run reach its first save.")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise errors.unknown(f"step of {run}", step, steps)
    return _read(folder / str(step), target, (), steps, whole=False)
