"""Reference cases: numbers computed with the original authors' code, inputs and weights rebuilt from their names.

A case is ``<system>/<case>.json`` + ``.npz``. Small ones are kept in ``tests/fixtures``; the rest is looked for in
``$TOKENIZERS_FIXTURES`` or in a folder ``shared/fixtures`` beside the checkout, and tests over it are skipped when
it is not there.
"""

from __future__ import annotations

import json
import os
import pathlib
import re

import numpy as np
import refweights

_HERE = pathlib.Path(__file__).resolve().parent
FOLDERS = [
    _HERE / "fixtures",
    pathlib.Path(os.environ.get("TOKENIZERS_FIXTURES", _HERE.parent.parent / "shared" / "fixtures")),
]


def cases(system: str, pattern: str = ".*") -> list[str]:
    """Names of the cases of a system that are present and whose whole name matches the pattern."""
    found = {path.stem for folder in FOLDERS for path in (folder / system).glob("*.json")}
    return sorted(name for name in found if re.fullmatch(pattern, name))


class Case:
    """One reference case: ``meta`` (the json), ``outputs`` (the npz), rebuilt ``inputs`` and official ``weights``."""

    def __init__(self, system: str, name: str):
        path = next(f / system / name for f in FOLDERS if (f / system / f"{name}.json").exists())
        self.meta = json.loads(path.with_suffix(".json").read_text())
        with np.load(path.with_suffix(".npz")) as stored:
            self.outputs = {key: stored[key] for key in stored.files}

    def input(self, key: str) -> np.ndarray:
        entry = self.meta["inputs"][key]
        if entry["fn"] == "literal":
            value = np.asarray(entry.get("value", entry.get("values")))
        else:
            make = {"image_like": refweights.image_like, "uniform": refweights.uniform, "normal": normal}[entry["fn"]]
            value = make(entry["seed_name"], tuple(entry["shape"]))
        for names, operation in ((("mul", "scale"), np.multiply), (("add", "offset"), np.add)):
            for name in names:
                if name in entry:
                    value = operation(value, np.float32(entry[name]))
        return value

    def weights(self, prefix: str = "") -> dict[str, np.ndarray]:
        """The official state dict (entries whose name starts with the prefix, the prefix removed)."""
        renamed = self.meta.get("seed_names_changed") or self.meta.get("weight_seed_names") or {}
        overrides = self.meta.get("weight_overrides", {})
        found = {}
        for name, shape, _ in self.meta["state_dict"]:
            if not name.startswith(prefix) or name in self.meta.get("buffers_computed", ()):
                continue
            seed_name = renamed.get(name, name)
            value = refweights.weight(seed_name, tuple(shape))
            for pattern, change in overrides.items():
                # Systems differ in which of the two names the pattern is written for.
                if re.search(pattern, name) or re.search(pattern, seed_name):
                    value = value * np.float32(change["scale"])
            found[name.removeprefix(prefix)] = value
        return found


def normal(name: str, shape) -> np.ndarray:
    """Box-Muller normal numbers from two uniform draws, float32."""
    u1 = refweights.uniform(name + "/u1", shape).astype(np.float64)
    u2 = refweights.uniform(name + "/u2", shape).astype(np.float64)
    p = (u1 + 1) / 2 * (1 - 2.0**-20) + 2.0**-21
    return (np.sqrt(-2 * np.log(p)) * np.cos(np.pi * (u2 + 1))).astype(np.float32)


def relative_l2(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-12))
