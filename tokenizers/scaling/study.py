"""A study: for every point a run of train.py, then what eval.py says of it, each in a process of its own.

What is finished is not done again; what fails is written down with its last words, and the study goes on without it.
"""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import errors
from ..train.config import to_dict, write_atomically
from . import curves
from .points import Point, flags, points

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FAILED = "failed.txt"


def run(config: Mapping, folder: str | pathlib.Path, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Runs what is missing of a study, and gathers what there is.

    Args:
      config: as in ``configs/scaling_shapes.py``.
      folder: of the study; a folder for each point in it.
      say: where lines for a person go.

    Returns:
      One record per point: ``{"name", "values", "flops", "parameters", "scores": {name: value}, "failed": why or ""}``.

    Raises:
      ValueError: when the folder holds another study.
    """
    config = to_dict(config)
    folder = pathlib.Path(folder).expanduser().resolve()
    every = points(config["axes"], config["seeds"])
    _claim(folder, config)
    for number, point in enumerate(every, 1):
        began, place = time.perf_counter(), folder / point.name
        if _finished(place, config):
            continue
        say(f"[{number}/{len(every)}] {point.name}")
        failed = _do(point, place, config)
        what = f"failed: {curves.last_line(failed)}" if failed else "done"
        say(f"[{number}/{len(every)}] {point.name}: {what}, {time.perf_counter() - began:.0f} s")
    return gather(config, folder)


def gather(config: Mapping, folder: str | pathlib.Path) -> list[dict[str, Any]]:
    """The records of all points, finished or not; see `run`."""
    config, folder = to_dict(config), pathlib.Path(folder).expanduser()
    return [_record(point, folder / point.name, config) for point in points(config["axes"], config["seeds"])]


def _claim(folder: pathlib.Path, config: Mapping) -> None:
    """A study may grow, by values of its axes and by seeds; its other fields stay."""
    path = folder / "study.json"
    fixed = {name: config[name] for name in ("training", "overrides", "judges")}
    if path.is_file():
        saved = json.loads(path.read_text())
        changed = [name for name in fixed if saved.get(name) != fixed[name]]
        if changed:
            raise ValueError(
                f"{folder} holds another study: {', '.join(changed)} changed. Choose another --workdir, or go on with "
                "the config it was started with; axes and seeds may grow."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is neither empty nor a study; choose another --workdir.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(fixed | {"axes": config["axes"], "seeds": config["seeds"]}, indent=2) + "\n")


def _do(point: Point, place: pathlib.Path, config: Mapping) -> str:
    """Trains and judges one point; what went wrong, if anything."""
    place.mkdir(parents=True, exist_ok=True)
    (place / FAILED).unlink(missing_ok=True)
    changes = dict(config["overrides"]) | point.overrides
    commands = [
        [
            "train.py", f"--config={config['training']}", f"--workdir={place / 'run'}",
            *flags(changes), "--config.evaluation.final_report=False",
        ]
    ]  # fmt: skip
    for name, judge in config["judges"].items():
        if not (place / name / judge["result"]).is_file():
            commands.append(
                [
                    "eval.py", f"--config={judge['config']}", f"--checkpoint={place / 'run'}", f"--out={place / name}",
                    *flags(judge["overrides"]),
                ]
            )  # fmt: skip
    for command in commands:
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, check=False, **both)
        with (place / "log.txt").open("a") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
        if done.returncode:
            failed = f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-4000:]}"
            write_atomically(place / FAILED, failed)
            return failed
    return ""


def _finished(place: pathlib.Path, config: Mapping) -> bool:
    """Whether there is a verdict of every judge."""
    return all((place / name / judge["result"]).is_file() for name, judge in config["judges"].items())


def _record(point: Point, place: pathlib.Path, config: Mapping) -> dict[str, Any]:
    failed = place / FAILED
    record = {"name": point.name, "values": dict(point.values), "flops": None, "scores": {}}
    record["failed"] = failed.read_text() if failed.is_file() else "" if _finished(place, config) else "not run yet"
    curve = place / "run" / "metrics.jsonl"
    if curve.is_file():
        lines = [json.loads(line) for line in curve.read_text().splitlines()]
        record["flops"] = max((line["flops"] for line in lines if "flops" in line), default=None)
    for name, judge in config["judges"].items():
        path = place / name / judge["result"]
        if path.is_file():
            found = json.loads(path.read_text())
            for score, where in judge["scores"].items():
                record["scores"][score] = _number(found, where, path)
    return record


def _number(found: Any, where: Sequence[str], path: pathlib.Path) -> float | None:
    """The number there, or ``None`` where it says why there is none."""
    for key in where:
        if not isinstance(found, Mapping):
            raise ValueError(f"{path} has no {'/'.join(where)}: {key!r} is not in {found!r}.")
        found = errors.pick(f"key of {path.name}", key, found)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        return None
    return float(found)
