"""Several processes: starting them, agreeing among them, and leaving in time when the machine is taken away."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from .. import errors

_MODES = ("off", "auto", "manual")


def initialize(config: Mapping) -> None:
    """Joins the processes of a distributed run; call before anything touches a device.

    Args:
      config: ``config.distributed``: ``mode`` is ``off``, ``auto`` (TPU pods, SLURM, ... : JAX finds the others) or
        ``manual`` with ``coordinator`` ("host:port"), ``processes`` and ``process``.
    """
    mode = config["mode"]
    if mode not in _MODES:
        raise errors.unknown("config.distributed.mode", mode, _MODES)
    if mode == "off" or jax.distributed.is_initialized():
        return
    if mode == "auto":
        jax.distributed.initialize()
        return
    if not config["coordinator"]:
        raise ValueError("config.distributed.mode='manual' needs config.distributed.coordinator='host:port'.")
    jax.distributed.initialize(config["coordinator"], config["processes"], config["process"])


def is_main() -> bool:
    """Whether this process writes logs and reports."""
    return jax.process_index() == 0


def on_main(action: Callable[[], None]) -> None:
    """Runs ``action`` on the first process while the others wait; where it fails, every process raises.

    Raises:
      ValueError: what ``action`` raised, or, on the other processes, that it did.
    """
    error = None
    if is_main():
        try:
            action()
        except ValueError as refused:
            error = refused
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
    if failed:
        raise error or ValueError("the first process of this run stopped; its message says why.")


def gather(tree: Any) -> Any:
    """Arrays spread over the devices of all processes, whole on the host of each."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


def wait(for_what: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(for_what)


class StopRequest:
    """Whether the run should save and end, the same answer at the same step on every process."""

    def __init__(self):
        self.requested = False

    def __call__(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns SIGTERM (preemption) and the first SIGINT into a `StopRequest`; a second Ctrl-C interrupts at once.

    In a distributed run JAX's own preemption service catches SIGTERM and agrees on a step, and Ctrl-C interrupts.
    """
    request = StopRequest()
    watched = () if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
    previous = {}

    def handle(number, frame):
        request.requested = True
        signal.signal(number, previous[number])

    for number in watched:
        previous[number] = signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
