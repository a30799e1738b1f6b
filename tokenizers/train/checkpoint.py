"""Checkpoints of a run: one atomic step of named items, written in the background. The only importer of orbax.

Items: ``params``, ``ema``, ``model_state``, ``optimizer``, ``adversary`` (arrays), ``counters`` (steps and skips),
``data`` and ``meta`` (JSON). Inference reads ``ema`` and ``model_state`` alone.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from .state import TrainState

_ARRAY_ITEMS = ("params", "ema", "model_state", "optimizer", "adversary", "counters")
_FOLDER = "checkpoints"


def _items(state: TrainState) -> dict[str, Any]:
    """The arrays of a state by item; items without a single array are left out (orbax refuses to write them)."""
    counters = {"step": state.step, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    found = {"counters": counters} | {name: getattr(state, name) for name in _ARRAY_ITEMS if name != "counters"}
    return {name: found[name] for name in _ARRAY_ITEMS if jax.tree.leaves(found[name])}


class Checkpoints:
    """Writes and reads the steps under ``<run>/checkpoints``.

    Args:
      run: folder of the run.
      keep_last: how many of the latest steps stay.
      keep_best: how many of the best by held-out PSNR stay besides.
    """

    def __init__(self, run: str | pathlib.Path, keep_last: int = 2, keep_best: int = 1):
        self.folder = pathlib.Path(run).resolve() / _FOLDER
        kept = [policies.LatestN(n=keep_last)]
        if keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["psnr"], n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
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

    def save(self, state: TrainState, data: Mapping, meta: Mapping, psnr: float | None = None) -> None:
        """Starts writing the state; returns as soon as the arrays are copied.

        Args:
          state: the run after ``state.step`` steps.
          data: position and fingerprint of the data, JSON.
          meta: what else a reader needs to know, JSON.
          psnr: held-out PSNR of this state if it was measured, for keep-best.
        """
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        arguments |= {"data": ocp.args.JsonSave(dict(data)), "meta": ocp.args.JsonSave(dict(meta))}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(**arguments),
            metrics=None if psnr is None else {"psnr": float(psnr)},
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
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in _items(target).items()}
        arguments |= {"data": ocp.args.JsonRestore(), "meta": ocp.args.JsonRestore()}
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        except Exception as error:
            raise _damaged(self.folder / str(step), error, self.steps()) from error
        counters = found["counters"]
        arrays = {name: found[name] for name in _ARRAY_ITEMS if name != "counters" and name in arguments}
        return target.replace(**arrays, **counters), found["data"], found["meta"]

    def close(self) -> None:
        """Waits for the save in flight."""
        self._manager.wait_until_finished()
        self._manager.close()


def _damaged(folder: pathlib.Path, error: Exception, steps: list[int]) -> ValueError:
    others = [step for step in steps if str(step) != folder.name]
    remedy = (
        f"To go on from step {others[-1]}, move that folder away and run the same command again."
        if others
        else "There is no other step in this run: start anew with another --workdir."
    )
    summary = " ".join(str(error).split())[:600]
    return ValueError(
        f"the checkpoint {folder} cannot be read: it is truncated, or was written by another model or version. {remedy} "
        f"Cause: {type(error).__name__}: {summary}"
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
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        step = manager.latest_step() if step is None else step
        if step is None:
            raise ValueError(f"{folder} holds no complete checkpoint; let the run reach its first save.")
        try:
            found = manager.restore(
                step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in target.items()})
            )
        except Exception as error:
            raise _damaged(folder / str(step), error, sorted(manager.all_steps())) from error
    return {name: found[name] for name in target}


def read_config(run: str | pathlib.Path) -> dict:
    """The resolved config that `train.loop` saved with the run."""
    path = pathlib.Path(run) / "config.json"
    if not path.is_file():
        raise ValueError(f"{run} has no config.json: it is not a run of train.py.")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not readable JSON ({error}); restore it from a backup or start another run."
        ) from error
