"""Several processes: starting them, agreeing among them, and leaving in time when the machine is taken away."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping

import jax
from jax.experimental import multihost_utils


def initialize(config: Mapping) -> None:
    """Joins the processes of a distributed run; call before anything touches a device.

    Args:
      config: ``config.distributed``: ``mode`` is ``off``, ``auto`` (TPU pods, SLURM, ... : JAX finds the others) or
        ``manual`` with ``coordinator`` ("host:port"), ``processes`` and ``process``.
    """
    mode = config["mode"]
    if mode == "auto":
        jax.distributed.initialize()
    elif mode == "manual":
        jax.distributed.initialize(config["coordinator"], config["processes"], config["process"])
    elif mode != "off":
        raise ValueError(f"unknown config.distributed.mode {mode!r}. Accepted: off, auto, manual.")


def is_main() -> bool:
    """Whether this process writes logs and reports."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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

    In a distributed run JAX's own preemption service catches SIGTERM and agrees on a step.
    """
    request = StopRequest()
    watched = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
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
