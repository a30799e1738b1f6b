"""The photographs that every scikit-image installation carries: data for a first run, without a download."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator

import numpy as np

from .decode import decode_image
from .records import Record

# In the wheels of scikit-image 0.25 and 0.26. Diagrams, scanned text and silhouettes are left out.
TRAIN = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
# Two colour photographs (a cat; a cup on a table) of subjects that no training photograph shows.
HELD_OUT = ("chelsea.png", "coffee.png")


def _folder() -> str:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the embedded data set is in scikit-image, which is not installed: pip install scikit-image")
    return os.path.join(spec.submodule_search_locations[0], "data")


@functools.lru_cache(maxsize=len(TRAIN) + len(HELD_OUT))
def photograph(name: str) -> np.ndarray:
    """One photograph as read-only uint8 RGB ``(H, W, 3)``, decoded once per process (all together: 20 MB)."""
    pixels = decode_image(os.path.join(_folder(), name))
    pixels.setflags(write=False)
    return pixels


class EmbeddedSource:
    """The training photographs, or the held-out ones."""

    kind = "image"
    has_captions = has_labels = False
    any_size = False
    classes = ()
    # Fixed evaluation views of a photograph: its centre and four corners, or clips of as many virtual cameras.
    views = 5

    def __init__(self, *, held_out: bool = False):
        self._names = HELD_OUT if held_out else TRAIN
        self.dropped: list[tuple[str, str]] = []
        self.description = f"{len(self._names)} embedded photographs ({'held out' if held_out else 'train'})"
        missing = [name for name in self._names if not os.path.isfile(os.path.join(_folder(), name))]
        if missing:
            raise ValueError(f"this scikit-image installation lacks {', '.join(missing)} in {_folder()}")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def __getitem__(self, index: int) -> Record:
        return Record("image", photograph(self._names[index]), f"scikit-image/{self._names[index]}")

    def manifest(self) -> Iterator[tuple[str, int]]:
        for name in self._names:
            yield name, os.path.getsize(os.path.join(_folder(), name))
