"""The training loop. One law of order: evaluate and save a state before the batch of the next step is taken."""

from __future__ import annotations

import collections
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ..data.pipeline import Pipeline
from ..parallel import mesh as meshes
from ..parallel import multihost, platform
from . import build, checkpoint, config as configs, preview
from .log import RunLog
from .step import make_step

_SHOWN = ("loss/generator", "psnr", "loss/discriminator", "seconds_per_step", "frames_per_second")


def run(config: Mapping, workdir: str | pathlib.Path) -> bool:
    """Trains what the config describes, or goes on where the run in ``workdir`` stopped.

    Returns:
      Whether the last step was reached (not when the run was asked to stop).

    Raises:
      ValueError: for a config that does not fit, a folder that holds another run, or a damaged checkpoint.
      FloatingPointError: after ``config.stop_after_skipped`` steps in a row whose loss was not finite.
    """
    config = configs.to_dict(config)
    multihost.initialize(config["distributed"])
    platform.enable_compilation_cache(config["compilation_cache"])
    folder = pathlib.Path(workdir).expanduser()
    if multihost.is_main():
        configs.claim_folder(folder, config)
    multihost.barrier("run folder")
    mesh = meshes.from_config(config["mesh"])
    with jax.set_mesh(mesh), multihost.stop_on_signal() as stop:
        return _train(config, folder, mesh, stop)


def _train(config: Mapping, folder: pathlib.Path, mesh, stop: multihost.StopRequest) -> bool:
    data = Pipeline(
        config["data"], seed=config["seed"], process_index=jax.process_index(), process_count=jax.process_count()
    )
    recipe = build.recipe(config)
    checkpoints = checkpoint.Checkpoints(folder, config["checkpoint"]["keep_last"], config["checkpoint"]["keep_best"])
    state, start = _first_state(config, recipe, mesh, data, checkpoints)
    frozen = jax.device_put(dict(recipe.objective.frozen), meshes.replicated(mesh))
    log = RunLog(folder, start, config["steps"], config["log"], writes=multihost.is_main())
    try:
        if multihost.is_main():
            build.write_summary(folder, config, recipe, mesh, data, log.message)
        return _steps(config, folder, mesh, stop, data, recipe, checkpoints, state, frozen, log)
    finally:
        checkpoints.close()
        log.close()


def _first_state(config, recipe, mesh, data: Pipeline, checkpoints: checkpoint.Checkpoints):
    """(state, steps done): the latest checkpoint, laid out over this mesh, or a new run."""
    if checkpoints.latest() is None:
        return build.initial_state(config, recipe, mesh), 0
    state, position, _ = checkpoints.restore(build.abstract_state(config, recipe, mesh))
    if position["fingerprint"] != data.fingerprint:
        raise ValueError(
            f"the data of this run has changed since its checkpoint at step {position['batches']} (fingerprint "
            f"{position['fingerprint']} -> {data.fingerprint}); restore the files, or start a new run from its weights "
            "with another --workdir and --config.init_from=<this run>."
        )
    return state, int(state.step)


def _steps(config, folder, mesh, stop, data, recipe, checkpoints, state, frozen, log: RunLog) -> bool:
    start, last = int(state.step), config["steps"]
    step_function = jax.jit(make_step(recipe), donate_argnums=0, out_shardings=build.out_shardings(state, mesh))
    compiled: dict[tuple, Any] = {}
    watch = _Watch(config["stop_after_skipped"])
    held_out = preview.HeldOut(config, recipe, mesh)
    frames, batches = 0, _device_batches(data, mesh, start)
    for step in range(start, last):
        _profile(config["profile"], folder, step - start)
        pixels = next(batches)
        if pixels.shape not in compiled:
            began = time.perf_counter()
            compiled[pixels.shape] = step_function.lower(state, frozen, pixels).compile()
            log.message(build.compile_message(compiled[pixels.shape], pixels.shape, time.perf_counter() - began, mesh))
        state, metrics = compiled[pixels.shape](state, frozen, pixels)
        done = step + 1
        frames += pixels.shape[0] * pixels.shape[1]
        watch.add(done, metrics)
        log.progress(done)
        if log.due(done):
            values = watch.flush() | log.speed(done, frames)
            log.scalars(done, values | {"frames": frames, "unusable_files": data.skipped.count}, _SHOWN)
        ending = done == last or stop(done)
        psnr = None
        if done == last or done % config["evaluation"]["every"] == 0:
            watch.flush()
            scores, pictures, clips = held_out(state)
            psnr = scores["held_out/psnr"]
            log.scalars(done, scores, tuple(scores))
            log.media(done, pictures, clips)
        if ending or done % config["checkpoint"]["every"] == 0:
            watch.flush()
            position = {"batches": done, "fingerprint": data.fingerprint}
            checkpoints.save(state, position, {"model": configs.to_dict(config["model"])}, psnr)
        if ending and done < last:
            log.message(f"asked to stop: saved step {done}; the same command goes on from there.")
            return False
    return True


def _device_batches(data: Pipeline, mesh, start: int) -> Iterator[jax.Array]:
    """Batches on the devices, one ahead of the step that uses it."""
    ready: collections.deque = collections.deque()
    for batch in data.batches(start=start):
        ready.append(meshes.global_batch(mesh, np.ascontiguousarray(batch["pixels"])))
        if len(ready) > 1:
            yield ready.popleft()
    while ready:
        yield ready.popleft()


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
                f"{self._patience} steps in a row, up to step {step}, had a loss or gradient that is not finite; their "
                f"updates were skipped, and the run stops here. Not finite: {', '.join(self._lost) or 'gradients'}. Lower "
                "the learning rate, start the discriminator later, or compute in float32, and resume from the last "
                "checkpoint."
            )


def _profile(config: Mapping, folder: pathlib.Path, step: int) -> None:
    """Traces ``config.profile.steps`` steps from ``config.profile.start`` on (counted from this start of the run)."""
    if not config["steps"]:
        return
    if step == config["start"]:
        jax.profiler.start_trace(str(folder / "profile"))
    elif step == config["start"] + config["steps"]:
        jax.profiler.stop_trace()


def last_metrics(folder: pathlib.Path) -> dict[str, float]:
    """The newest value of every name in ``metrics.jsonl``."""
    values: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values |= json.loads(line)
    return values
