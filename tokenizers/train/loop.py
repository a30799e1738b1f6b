"""The training loop. One law of order: evaluate and save a state before the batch of the next step is taken."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ..data.pipeline import Pipeline
from ..parallel import flops, multihost, platform
from ..parallel import mesh as meshes
from . import build, checkpoint, preview, summary
from . import config as configs
from .log import RunLog
from .state import TrainState
from .step import Trainable, make_step

_SHOWN = ("loss/generator", "psnr", "loss/discriminator", "seconds_per_step", "frames_per_second")


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run is made of and does not change while it lasts."""

    config: Mapping[str, Any]
    folder: pathlib.Path
    mesh: jax.sharding.Mesh
    stop: multihost.StopRequest
    data: Pipeline
    recipe: Trainable
    checkpoints: checkpoint.Checkpoints
    log: RunLog
    began: float


def run(config: Mapping, workdir: str | pathlib.Path) -> bool:
    """Trains what the config describes, or goes on where the run in ``workdir`` stopped.

    Returns:
      Whether the last step was reached (not when the run was asked to stop).

    Raises:
      ValueError: for a config that does not fit, a folder that holds another run, or a damaged checkpoint.
      FloatingPointError: after ``config.stop_after_skipped`` steps in a row whose loss was not finite.
    """
    began = time.perf_counter()
    config = configs.to_dict(config)
    configs.check_numbers(config)
    config = build.kind(config).resolve(config)
    multihost.initialize(config["distributed"])
    platform.enable_compilation_cache(config["compilation_cache"])
    folder = pathlib.Path(workdir).expanduser()
    mesh = meshes.from_config(config["mesh"])
    with jax.set_mesh(mesh), multihost.stop_on_signal() as stop:
        index, count = meshes.batch_share(mesh)
        data = build.data(config, index, count)
        recipe = build.recipe(config)
        build.check_batches(data.shapes, recipe, mesh)
        multihost.on_main(lambda: configs.claim_folder(folder, config))
        return _train(config, folder, mesh, stop, data, recipe, began)


def _train(config, folder, mesh, stop, data: Pipeline, recipe: Trainable, began: float) -> bool:
    keep = config["checkpoint"]
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(checkpoint.Checkpoints(folder, keep["keep_last"], keep["keep_best"]))
        state, position = _first_state(config, recipe, mesh, data, checkpoints)
        frozen = jax.device_put(dict(recipe.networks), meshes.replicated(mesh))
        log = RunLog(
            folder, position["batches"], config["steps"], config["log"], multihost.is_main(), position["frames"]
        )
        stack.callback(log.close)
        if multihost.is_main():
            summary.write_summary(folder, config, recipe, mesh, data, log.message)
        profiler = stack.enter_context(_Profiler(config["profile"], folder))
        batches = stack.enter_context(contextlib.closing(_device_batches(data, recipe, mesh, position["batches"])))
        everything = _Run(config, folder, mesh, stop, data, recipe, checkpoints, log, began)
        finished = _steps(everything, state, frozen, position, batches, profiler)
        checkpoints.wait()
        return finished


def _first_state(config, recipe, mesh, data: Pipeline, checkpoints: checkpoint.Checkpoints):
    """(state, position): the latest checkpoint, laid out over this mesh, or a new run."""
    if checkpoints.latest() is None:
        return build.initial_state(config, recipe, mesh), {"batches": 0, "frames": 0, "best": []}
    state, position, _ = checkpoints.restore(build.abstract_state(config, recipe, mesh))
    if position["fingerprint"] != data.fingerprint:
        raise ValueError(
            f"the data of this run has changed since its checkpoint at step {position['batches']} (fingerprint "
            f"{position['fingerprint']} -> {data.fingerprint}); restore the files, or start a new run from its weights "
            "with another --workdir and --config.init_from=<this run>."
        )
    return state, position


def _steps(run: _Run, state: TrainState, frozen, position: Mapping, batches: Iterator, profiler: _Profiler) -> bool:
    config, log, last = run.config, run.log, run.config["steps"]
    program = _Programs(run, state)
    watch = _Watch(config["stop_after_skipped"])
    held_out = _held_out(run)
    frames, operations, best = position["frames"], position.get("flops", 0.0), list(position["best"])
    metrics = None
    for step in range(position["batches"], last):
        profiler.before(step - position["batches"])
        inputs, seconds = _timed(batches)
        if metrics is not None and all(value.is_ready() for value in metrics.values()):
            log.waited(seconds)  # else the devices were still busy with earlier steps
        compiled, cost = program(step, state, frozen, inputs)
        state, metrics = compiled(state, frozen, inputs)
        done, operations = step + 1, operations + cost
        if step == position["batches"]:
            jax.block_until_ready(metrics)
            log.message(f"first step after {time.perf_counter() - run.began:.1f} s, imports not counted")
        frames += run.recipe.frames(inputs)
        watch.add(done, metrics)
        log.progress(done)
        if log.due(done):
            values = watch.flush() | log.speed(done, frames)
            log.scalars(
                done, values | {"frames": frames, "flops": operations, "unusable_files": run.data.skipped.count}, _SHOWN
            )
        ending = run.stop(done) or done == last
        score, good = None, False
        if held_out is not None and (done == last or _due(done, config["evaluation"]["every"])):
            watch.flush()
            score = _evaluate(log, done, held_out, state)
            best = sorted([*best, score], reverse=True)[: config["checkpoint"]["keep_best"]]
            good = score in best
        if ending or good or _due(done, config["checkpoint"]["every"]):
            watch.flush()
            where = {
                "batches": done,
                "frames": frames,
                "flops": operations,
                "best": best,
                "fingerprint": run.data.fingerprint,
            }
            run.checkpoints.save(state, where, {"model": config["model"]}, score)
        if ending and done < last:
            run.checkpoints.wait()
            log.message(f"asked to stop: saved step {done}; the same command goes on from there.")
            return False
    return True


def _held_out(run: _Run) -> build.HeldOut | None:
    if build.kind(run.config).held_out is None:
        return None
    if preview.has_held_out(run.config["data"]) or run.config["evaluation"]["final_report"]:
        return build.held_out(run.config, run.recipe, run.mesh)
    run.log.message("config.data.held_out is empty: nothing is measured while training")
    return None


def _timed(batches: Iterator) -> tuple[Any, float]:
    """The next one, and the seconds that it took to come."""
    began = time.perf_counter()
    return next(batches), time.perf_counter() - began


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate(log: RunLog, step: int, held_out: build.HeldOut, state: TrainState) -> float:
    with log.untimed():
        score, scores, pictures, clips = held_out(state)
        log.scalars(step, scores, tuple(scores))
        log.media(step, pictures, clips)
    return score


def _device_batches(data: Pipeline, recipe: Trainable, mesh, start: int) -> Iterator[dict[str, jax.Array]]:
    """What steps read of batches, on the devices, one ahead; closing it ends the processes that decode."""
    ready: collections.deque = collections.deque()
    with data.batches(start=start) as batches:
        for batch in batches:
            inputs = recipe.inputs(batch)
            ready.append({name: meshes.global_batch(mesh, array) for name, array in inputs.items()})
            if len(ready) > 1:
                yield ready.popleft()


class _Programs:
    """The compiled step of every shape of batches and program of the recipe, compiled when it is first needed."""

    def __init__(self, run: _Run, state: TrainState):
        self._run, self._compiled = run, {}
        self._placed = build.out_shardings(state, run.mesh)

    def __call__(self, step: int, state: TrainState, frozen, inputs: Mapping[str, jax.Array]):
        recipe = self._run.recipe.at(step)
        shapes = tuple((name, array.shape) for name, array in sorted(inputs.items()))
        key = shapes, recipe.program
        if key not in self._compiled:
            began = time.perf_counter()
            with self._run.log.untimed():
                program = platform.jit(make_step(recipe), donate_argnums=0, out_shardings=self._placed)
                traced = program.trace(state, frozen, inputs)
                self._compiled[key] = traced.lower().compile(), flops.count(traced.jaxpr)
            seconds = time.perf_counter() - began
            what = ", ".join([*(f"{name} {shape}" for name, shape in shapes), *recipe.told()])
            self._run.log.message(summary.compile_message(*self._compiled[key], what, seconds))
        return self._compiled[key]


class _Watch:
    """Reads metrics two steps late, so that the devices never wait, and stops a run that only produces NaN."""

    def __init__(self, patience: int):
        self._patience = patience
        self._pending: collections.deque = collections.deque()
        self._latest: dict[str, float] = {}
        self._lost: list[str] = []

    def add(self, step: int, metrics: Mapping) -> None:
        self._pending.append((step, metrics))
        if len(self._pending) > 2:
            self._read(*self._pending.popleft())

    def flush(self) -> dict[str, float]:
        """The metrics of the newest step."""
        while self._pending:
            self._read(*self._pending.popleft())
        return dict(self._latest)

    def _read(self, step: int, metrics: Mapping) -> None:
        self._latest = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name, value in self._latest.items() if not np.isfinite(value)]
        self._lost = bad or self._lost
        if self._latest["skipped_in_a_row"] >= self._patience:
            raise FloatingPointError(
                f"{self._patience} steps in a row, up to step {step}, had a loss or gradient that is not finite. Their "
                f"updates were skipped; the run stops here. Not finite: {', '.join(self._lost)}. The same command goes "
                "on from the last checkpoint; to change the recipe (a lower learning rate, a later discriminator, "
                "float32), start another --workdir with --config.init_from=<this run>."
            )


class _Profiler:
    """Traces ``config.profile.steps`` steps from ``config.profile.start`` on (counted from this start of the run)."""

    def __init__(self, config: Mapping, folder: pathlib.Path):
        self._first, self._steps, self._folder = config["start"], config["steps"], folder / "profile"
        self._running = False

    def before(self, step: int) -> None:
        """Called before each step with the number of steps since this start."""
        if self._steps and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step == self._first + self._steps:
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()

    def __enter__(self) -> _Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()
