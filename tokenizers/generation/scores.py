"""How far generated pictures are from real ones: Frechet distances in several spaces, and what a classifier sees.

A space whose network has no weights is reported as such; nothing takes its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..evaluate import distances
from ..evaluate.collect import Value, not_computed
from ..evaluate.distances import GaussianStatistics
from ..evaluate.features import FID_INPUT
from ..networks import foundation, inception, weights
from ..parallel import mesh as meshes
from ..parallel import multihost, platform
from ..pixels import IMAGENET_MEAN, IMAGENET_STD
from ..types import Array
from .judge import Judge

CELLS = 4  # of the grid of `pixel_statistics`, along each side
# Of the pictures that a foundation network sees; DINOv2 takes them at 14/16 of it. The distance is close to FD-DINOv2
# (https://arxiv.org/abs/2306.04675), whose pictures are resized in one step: compare it here only.
FOUNDATION_SIDE = 256


def pixel_statistics(pictures: Array) -> Array:
    """uint8 ``(B, H, W, 3)`` -> ``(B, 64)``: on a grid of 4 x 4 cells, the mean of each colour and the spread of grey.

    Values are of pixels in [0, 1]. A distance of these says whether colours, their places and the amount of detail are
    right, and nothing about shapes. It needs no network, and is defined here alone.
    """
    x = pictures.astype(jnp.float32) / 255
    cells = [jnp.array_split(row, CELLS, axis=2) for row in jnp.array_split(x, CELLS, axis=1)]
    flat = [cell.reshape(cell.shape[0], -1, 3) for row in cells for cell in row]
    means = [cell.mean(axis=1) for cell in flat]
    spreads = [cell.mean(axis=2).std(axis=1, keepdims=True) for cell in flat]
    return jnp.concatenate(means + spreads, axis=1)


@dataclasses.dataclass(frozen=True)
class Space:
    """Where sets are compared: ``features(variables, pictures) -> {name: (B, ...)}``, of which "features" is one."""

    features: Callable[[Any, Array], dict[str, Array]]
    variables: Any = ()


def _inception_space(path: str | None) -> Space:
    weights.find("inception_fid", path)
    module, variables = inception.load(path)

    def features(variables, pictures):
        found = module.apply(variables, FID_INPUT["torch-fidelity"](pictures.astype(jnp.float32)))
        return {"features": found["2048"], "inception_logits": found["logits_unbiased"]}

    return Space(features, variables)


def _foundation_space(name: str, path: str | None) -> Space:
    module, variables = foundation.load(name, path)

    def features(variables, pictures):
        shape = (pictures.shape[0], FOUNDATION_SIDE, FOUNDATION_SIDE, 3)
        x = jax.image.resize(pictures.astype(jnp.float32) / 255, shape, "bicubic", antialias=True)
        x = (x - IMAGENET_MEAN) / IMAGENET_STD
        return {"features": module.apply(variables, x, method="tokens")[0][:, 0].astype(jnp.float32)}

    return Space(features, variables)


def _judge_space(judge: Judge) -> Space:
    def features(variables, pictures):
        logits, found = judge.module.apply(variables, pictures)
        return {"features": found, "guess": logits.argmax(axis=-1)}

    return Space(features, judge.variables)


# space -> heading of its distance
DISTANCES = {"inception": "gfid", "foundation": "fd_foundation", "judge": "fd_judge", "pixels": "fd_pixels"}


class Spaces:
    """The spaces that there are weights for, over a mesh.

    Args:
      files: paths of ``inception`` and ``foundation``; empty looks in ``$TOKENIZERS_WEIGHTS``.
      network: which foundation network, one of `foundation.FOUNDATION`.
      judge: of data that have one.
      mesh: devices.

    Attributes:
      missing: space -> what it needs.
    """

    def __init__(self, files: Mapping[str, str], network: str, judge: Judge | None, mesh: jax.sharding.Mesh | None):
        self.missing: dict[str, str] = {}
        self._mesh, self._spaces = mesh, {"pixels": Space(lambda _, x: {"features": pixel_statistics(x)})}
        makers = {
            "inception": lambda: _inception_space(files["inception"] or None),
            "foundation": lambda: _foundation_space(network, files["foundation"] or None),
        }
        for name, make in makers.items():
            try:
                self._spaces[name] = make()
            except weights.MissingWeights as error:
                self.missing[name] = f"{str(error).split(' is needed')[0]}: give its path or set {weights.VARIABLE}"
        if judge is None:
            self.missing["judge"] = "labelled data that are drawn without end (shapes), for a classifier of them"
        else:
            self._spaces["judge"] = _judge_space(judge)
        place = jax.local_devices()[0] if mesh is None else meshes.replicated(mesh)
        variables = jax.device_get({name: space.variables for name, space in self._spaces.items()})
        self._variables = jax.device_put(variables, place)
        self._run = platform.jit(
            lambda variables, pictures: {
                name: space.features(variables[name], pictures) for name, space in self._spaces.items()
            }
        )

    def __call__(self, pictures: Array) -> dict[str, dict[str, np.ndarray]]:
        """Of uint8 pictures ``(B, H, W, 3)`` on the devices: space -> name -> rows, on the host of every process."""
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            return multihost.gather(self._run(self._variables, pictures))


class Collected:
    """What is kept of a set of pictures: statistics in every space, and how often the classifier agreed."""

    def __init__(self):
        self.statistics: dict[str, GaussianStatistics] = {}
        self._logits: list[np.ndarray] = []
        self._right, self._guesses = 0, 0

    def add(self, found: Mapping[str, Mapping[str, np.ndarray]], valid: np.ndarray, labels: np.ndarray) -> None:
        """Rows of a batch, of which the ``valid`` ones count."""
        for name, values in found.items():
            more = GaussianStatistics.of(values["features"][valid])
            self.statistics[name] = more if name not in self.statistics else self.statistics[name].merge(more)
            if "inception_logits" in values:
                self._logits.append(values["inception_logits"][valid])
            if "guess" in values:
                self._right += int((values["guess"] == labels)[valid].sum())
                self._guesses += int(valid.sum())

    @property
    def count(self) -> int:
        """Number of pictures."""
        return next((found.count for found in self.statistics.values()), 0)

    def compared(self, real: Collected, missing: Mapping[str, str]) -> dict[str, Value]:
        """Scores of this set against real pictures: a number, or a text that says what it needs."""
        scores: dict[str, Value] = {"pictures": self.count}
        for name, heading in DISTANCES.items():
            if name in missing:
                scores[heading] = not_computed(missing[name])
            elif min(self.count, real.count) < 2:
                scores[heading] = not_computed(f"at least 2 pictures, got {min(self.count, real.count)}")
            else:
                scores[heading] = distances.frechet_distance(self.statistics[name], real.statistics[name])
        scores["inception_score"] = (
            distances.inception_score(np.concatenate(self._logits), splits=1, shuffle_seed=None)[0]
            if self._logits
            else not_computed(missing["inception"])
        )
        scores["class_consistency"] = (
            self._right / self._guesses if self._guesses else not_computed(missing.get("judge", "at least one picture"))
        )
        return scores
