"""Decoded frames per second of a data config, next to what the model consumes.

    python -m tokenizers.data.benchmark --path=/data/clips --frames=17 --height=256 --width=256
    python -m tokenizers.data.benchmark --config=configs/quickstart.py --run=/tmp/quickstart

Each line is one number of worker processes. Start-up is left out: the clock starts after the first batches.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from .pipeline import Pipeline


def measure(config: Any, workers: int, batches: int, seed: int = 0) -> dict[str, float]:
    """Frames, items and batches per second of ``batches`` batches, after warming up with ``workers + 1``.

    Also ``cpu_seconds_per_frame`` of this process, which is all of it without workers.
    """
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    pipeline = Pipeline({**plain, "workers": workers}, seed=seed)
    with pipeline.batches() as iterator:
        # What was prefetched during the warm-up would count as free: take it out first.
        for _ in range(workers + 1 + pipeline.settings.prefetch):
            next(iterator)
        frames = items = 0
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches):
            shape = next(iterator)["pixels"].shape
            frames, items = frames + shape[0] * shape[1], items + shape[0]
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {
        "frames_per_second": frames / seconds,
        "items_per_second": items / seconds,
        "batches_per_second": batches / seconds,
        "cpu_seconds_per_frame": cpu / frames,
        "skipped": pipeline.skipped.count,
    }


def model_rate(run: str) -> float:
    """The last "frames_per_second" in the JSONL metrics of a run folder (or in one file)."""
    files = [run] if os.path.isfile(run) else sorted(glob.glob(os.path.join(run, "*.jsonl")))
    rate = None
    for path in files:
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # The last line of a run that is still writing.
                rate = row.get("frames_per_second", rate) if isinstance(row, dict) else rate
    if rate is None:
        raise ValueError(f"no 'frames_per_second' in the *.jsonl metrics of {run!r}; give --model_frames_per_second")
    return float(rate)


def load_config(path: str) -> Any:
    """``get_config().data`` of a config file (``file.py`` or ``file.py:argument``)."""
    name, _, argument = path.partition(":")
    spec = importlib.util.spec_from_file_location("benchmarked_config", name)
    if spec is None or not os.path.isfile(name):
        raise ValueError(f"config {name!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return (module.get_config(argument) if argument else module.get_config()).data


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenizers.data.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="a config file; its data part is measured, the options below are not used")
    parser.add_argument("--source", default="", help="kind of data; default: found out from the path, or embedded")
    parser.add_argument("--path", default="")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--fps", type=float, default=0.0)
    parser.add_argument("--read_threads", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of worker processes to try")
    parser.add_argument("--batches", type=int, default=20, help="batches to time")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--model_frames_per_second", type=float)
    rate.add_argument("--run", help="run folder whose metrics say how fast the model is")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per number of workers."""
    given = _parse(arguments)
    if given.config:
        config = load_config(given.config)
    else:
        stream = {
            "frames": given.frames,
            "resolutions": ((given.height, given.width),),
            "batch_size": given.batch,
            "fps": given.fps,
        }
        config = {
            "source": given.source,
            "path": given.path,
            "virtual_camera": True,
            "read_threads": given.read_threads,
            "streams": {"benchmark": stream},
        }
    model = model_rate(given.run) if given.run else given.model_frames_per_second
    print(Pipeline(config).summary())
    for workers in given.workers:
        rates = measure(config, workers, given.batches)
        line = f"workers {workers}: {rates['frames_per_second']:.0f} frames/s, {rates['items_per_second']:.1f} items/s"
        if model:
            line += f"; the model consumes {model:.0f} frames/s: {rates['frames_per_second'] / model:.2f} x that"
        print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
