"""Where the weights of LPIPS and its trunks are in the published files.

Three layouts hold the same tensors: torchvision's trunk (``features.0.weight``), the package's or taming's whole
network (``net.slice1.0.weight`` and ``lin0.model.1.weight``), the package's linear layers alone. The tables speak
torchvision's and the linear layers' names; `torchvision_names` brings a file to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from ..errors import pick
from .engine import Rule, squeeze

# The classifier of a trunk, constants of the code, and the second name of the same linear layers.
IGNORE = (r"classifier\..*", r"scaling_layer\..*", r"lins\..*")

LIN_RULE = Rule(r"params/lin(\d)", r"lin\1.model.1.weight", squeeze(0, 2, 3))

_CONVOLUTIONS = {
    "vgg": {
        "conv1_1": 0, "conv1_2": 2, "conv2_1": 5, "conv2_2": 7, "conv3_1": 10, "conv3_2": 12, "conv3_3": 14,
        "conv4_1": 17, "conv4_2": 19, "conv4_3": 21, "conv5_1": 24, "conv5_2": 26, "conv5_3": 28,
    },
    "alex": {"conv1": 0, "conv2": 3, "conv3": 6, "conv4": 8, "conv5": 10},
    "squeeze": {"conv1": 0},
}  # fmt: skip

# Sums of the published linear layers, by version and trunk: enough to tell which file one has been given.
PUBLISHED_LIN_SUMS: dict[tuple[str, str], tuple[float, ...]] = {
    ("0.0", "vgg"): (3.64161, 1.96011, 1.1231, 20.1063, 25.6896),
    ("0.0", "alex"): (2.56589, 10.2574, 22.4343, 16.3139, 13.9345),
    ("0.0", "squeeze"): (5.30184, 1.14521, 8.88509, 38.1125, 22.9905, 15.4387, 13.0548),
    ("0.1", "vgg"): (6.92599, 8.85833, 17.515, 51.5213, 47.0349),
    ("0.1", "alex"): (2.34953, 16.143, 39.2684, 27.1972, 20.3172),
    ("0.1", "squeeze"): (5.6901, 1.18528, 16.3266, 71.0126, 37.3707, 24.2629, 17.5906),
}


def trunk_table(net: str, prefix: str = "params/") -> tuple[Rule, ...]:
    """Rules of one trunk, ``net`` of vgg, alex, squeeze; ``prefix`` is where its parameters are in our tree."""
    places = pick("LPIPS trunk", net, _CONVOLUTIONS)
    rules = [Rule(rf"{prefix}{ours}/\w+", f"features.{place}.{{leaf}}") for ours, place in places.items()]
    if net == "squeeze":
        rules.append(Rule(rf"{prefix}fire(\d+)/(\w+)/\w+", r"features.\1.\2.{leaf}"))
    return tuple(rules)


# VGG-16 up to its last hidden layer.
VGG_HIDDEN = (
    *trunk_table("vgg", "params/trunk/"),
    Rule(r"params/fc1/\w+", "classifier.0.{leaf}"),
    Rule(r"params/fc2/\w+", "classifier.3.{leaf}"),
)


def table(net: str) -> tuple[Rule, ...]:
    """Rules of the whole LPIPS network."""
    return (*trunk_table(net, "params/trunk/"), LIN_RULE)


def torchvision_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The package's names ``net.slice1.0.weight`` as torchvision's ``features.0.weight``; others stay.

    Linear layers of networks built without dropout are ``lin0.model.0.weight``; they become ``lin0.model.1.weight``.
    """
    renamed = {}
    for name, value in state_dict.items():
        name = re.sub(r"^net\.slice\d+\.", "features.", name)
        renamed[re.sub(r"^lin(\d)\.model\.0\.", r"lin\1.model.1.", name)] = value
    return renamed


def check_published_lin(state_dict: Mapping[str, np.ndarray], net: str, version: str) -> None:
    """Refuses the published linear layers of another version or trunk: their names and shapes may be the same.

    Layers that nobody published (trained by the user) pass.
    """
    names = sorted(name for name in state_dict if re.fullmatch(r"lin\d\.model\.1\.weight", name))
    sums = [float(np.sum(state_dict[name], dtype=np.float64)) for name in names]
    for known, published in PUBLISHED_LIN_SUMS.items():
        same = len(sums) == len(published) and np.allclose(sums, published, rtol=1e-4, atol=0)
        if same and known != (version, net):
            raise ValueError(
                f"These are the published LPIPS layers of version {known[0]!r} for {known[1]!r}, not of version "
                f"{version!r} for {net!r}. Give the right file, or ask for version={known[0]!r}, net={known[1]!r}."
            )
