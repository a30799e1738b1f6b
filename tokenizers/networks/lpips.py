"""LPIPS, the learned perceptual image distance, https://arxiv.org/abs/1801.03924 (package ``lpips``, taming's copy)."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..convert.engine import to_tree
from ..convert.files import read_state_dict
from ..convert.lpips import IGNORE, check_published_lin, table, torchvision_names
from ..errors import pick, unknown
from . import weights
from .alexnet import AlexNet
from .squeezenet import SqueezeNet
from .vgg import VGG16, standardize

Array = jax.Array

# Trunk, name of its published weights, smallest image whose last tap has a pixel.
TRUNKS = {"vgg": (VGG16, "vgg16", 16), "alex": (AlexNet, "alexnet", 31), "squeeze": (SqueezeNet, "squeezenet1_1", 17)}
VERSIONS = ("0.0", "0.1")

# Added to the norm, outside the root, as the authors do. It decides the result where features almost vanish.
EPSILON = 1e-10


class LPIPS(nn.Module):
    """Distance between two images: weighted squared differences of unit-length deep features, averaged over space.

    ``module.apply(variables, x, y)`` is the distance (B,). The methods `per_layer`, `spatial_map` and `features` are
    reached by ``module.apply(variables, ..., method="per_layer")``.

    Attributes:
      net: ``vgg`` (the usual loss), ``alex`` (the usual metric) or ``squeeze``.
      lin: weight the channels by the learned layers; without it every channel counts one.
      version: ``0.1``, or ``0.0``, the first release, which skips the input standardization and has its own layers.
      dtype: compute dtype of the trunk; norms, differences and means are float32.
    """

    net: str = "vgg"
    lin: bool = True
    version: str = "0.1"
    dtype: Any = jnp.float32

    def setup(self):
        trunk, _, _ = pick("LPIPS trunk", self.net, TRUNKS)
        if self.version not in VERSIONS:
            raise unknown("LPIPS version", self.version, VERSIONS)
        self.trunk = trunk(dtype=self.dtype)

    @nn.compact
    def terms(self, x: Array, y: Array) -> tuple[Array, ...]:
        """One map per tap, (B, h, w), float32: weighted sums over channels of the squared differences.

        x, y: (B, H, W, 3) in [-1, 1].
        """
        maps = []
        for i, (fx, fy) in enumerate(zip(self.features(x), self.features(y), strict=True)):
            difference = jnp.square(_unit(fx) - _unit(fy))
            if self.lin:
                # Initial values only give the shape; `load` fills in the learned ones.
                channels = self.param(f"lin{i}", nn.initializers.ones, (fx.shape[-1],), jnp.float32)
                difference = difference * channels
            maps.append(difference.sum(-1))
        return tuple(maps)

    def __call__(self, x: Array, y: Array) -> Array:
        """Distances (B,), float32, of images x and y (B, H, W, 3) in [-1, 1]."""
        return self.per_layer(x, y).sum(-1)

    def per_layer(self, x: Array, y: Array) -> Array:
        """The terms of the distance, (B, number of taps)."""
        _check(x, y, self.net)
        return jnp.stack([term.mean((1, 2)) for term in self.terms(x, y)], axis=-1)

    def spatial_map(self, x: Array, y: Array) -> Array:
        """Where the images differ: (B, H, W, 1), the terms brought to the image's size (bilinear) and summed."""
        _check(x, y, self.net)
        maps = [jax.image.resize(term, x.shape[:3], "bilinear", antialias=False) for term in self.terms(x, y)]
        return sum(maps)[..., None]

    def features(self, x: Array) -> tuple[Array, ...]:
        """The taps of the trunk for images (B, H, W, 3) in [-1, 1]."""
        return self.trunk(standardize(x) if self.version == "0.1" else x)


def _unit(features: Array) -> Array:
    """Features of length one along the channels, float32, with a gradient that is finite where all are zero."""
    features = features.astype(jnp.float32)
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    some = squares > 0
    norm = jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0)
    return features / (norm + EPSILON)


def _check(x: Array, y: Array, net: str) -> None:
    smallest = TRUNKS[net][2]
    if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < smallest:
        raise ValueError(
            f"LPIPS ({net}) compares two arrays (B, H, W, 3) of one shape, H and W at least {smallest}; "
            f"got {x.shape} and {y.shape}."
        )


def load(
    path: str | pathlib.Path | Sequence[str | pathlib.Path] | None = None,
    net: str = "vgg",
    *,
    lin: bool = True,
    version: str = "0.1",
    dtype: Any = jnp.float32,
) -> tuple[LPIPS, dict]:
    """LPIPS with published weights, as ``(module, variables)``.

    Args:
      path: a file with everything (the package's or taming's state dict), or trunk and linear files in any order; what
        they do not hold is looked for in ``$TOKENIZERS_WEIGHTS``, and so is everything for ``None``. A folder stands
        for that variable.
      net, lin, version, dtype: see `LPIPS`.

    Raises:
      MissingWeights: a file is needed and not there.
      ValueError: a file holds other tensors than this network's.
    """
    module = LPIPS(net=net, lin=lin, version=version, dtype=dtype)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    target = jax.eval_shape(module.init, jax.random.key(0), image, image)
    if path == weights.SHAPES:
        return module, target

    paths = [] if path is None else [path] if isinstance(path, str | pathlib.Path) else list(path)
    folder = next((p for p in paths if pathlib.Path(p).is_dir()), None)
    state: dict[str, np.ndarray] = {}
    for file in paths:
        if file is not folder:
            state |= torchvision_names(read_state_dict(file))

    lin_name = f"lpips_{net}" + ("" if version == "0.1" else f"_v{version}")
    needs = [(TRUNKS[net][1], r"features\..*")] + [(lin_name, r"lin\d\..*")] * lin
    for name, pattern in needs:
        if not any(re.fullmatch(pattern, key) for key in state):
            found = torchvision_names(read_state_dict(weights.find(name, folder)))
            state |= {key: value for key, value in found.items() if key not in state}
    check_published_lin(state, net, version)
    return module, to_tree(table(net), target, state, ignore=IGNORE if lin else (*IGNORE, r"lin\d\..*"))
