"""LPIPS, and the features behind rFID, the inception score and FVD, as the protocol wants them.

The networks come from `tokenizers.networks`, with published weights or not at all: what has no weights gives a reason
instead of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..errors import pick, unknown
from ..networks import i3d, inception, lpips, weights
from ..parallel import mesh as meshes
from ..parallel import platform
from .protocols import Protocol, levels

NETWORKS = ("lpips", "inception", "i3d")


def _clean(levels_255: jax.Array) -> jax.Array:
    # `inception.preprocess_clean` on the device: the same antialiased Keys cubic (a = -0.5) as Pillow's.
    shape = (levels_255.shape[0], inception.SIZE, inception.SIZE, levels_255.shape[-1])
    resized = jax.image.resize(levels_255, shape, "cubic", antialias=True)
    return (jnp.clip(resized, 0, 255) - 128) / 128


# All take float32 levels in [0, 255]: pictures (B, H, W, 3) for Inception, clips (B, T, H, W, 3) for I3D.
FID_INPUT: dict[str, Callable[[jax.Array], jax.Array]] = {
    "torch-fidelity": inception.preprocess_tensorflow,
    "pytorch-fid": lambda x: inception.preprocess_pytorch(x / 255),
    "clean": _clean,
}
FVD_INPUT: dict[str, Callable[[jax.Array], jax.Array]] = {
    "styleganv": lambda x: i3d.preprocess_cropped(x / 255),
    "videogpt": lambda x: i3d.preprocess_truncated(x / 255),
    "omnitokenizer": i3d.preprocess_squash,
}


class Networks:
    """The frozen networks that the requested metrics need.

    ``networks(reference, reconstruction)`` takes uint8 and float [-1, 1] arrays ``(B, T, H, W, 3)`` and returns
    ``(found, reasons)``: ``found`` may hold ``lpips`` ``(B,)``, ``inception`` (pair of ``(B, T, 2048)``), ``logits``
    ``(B, T, 1008)`` of the reconstruction and ``i3d`` (pair of ``(B, 400)``); ``reasons`` says what the others need.

    Args:
      protocol: trunk and preprocessing.
      metrics: names; those of other modules are none of this one's business.
      paths: network -> weight file or files (``lpips`` may have two), keys of `NETWORKS`; the rest is looked for in
        ``$TOKENIZERS_WEIGHTS``.
      mesh: devices that the weights are copied to.
    """

    def __init__(self, protocol: Protocol, metrics: tuple[str, ...], paths: Mapping[str, Any], mesh: Mesh | None):
        for name in paths:
            if name not in NETWORKS:
                raise unknown("network", name, NETWORKS)
        self._protocol, self._wanted = protocol, [name for name in _NEEDS if name in metrics]
        self._networks: dict[str, tuple[Any, Any]] = {}
        self._missing: dict[str, str] = {}
        loaders = {
            "lpips": lambda path: lpips.load(path, protocol.lpips),
            "inception": inception.load,
            "i3d": i3d.load,
        }
        for network in dict.fromkeys(_NEEDS[name] for name in self._wanted):
            try:
                for name in _files(network, protocol, paths.get(network)):
                    weights.find(name, paths.get(network))  # cheaper than finding out after building the network
                module, variables = loaders[network](paths.get(network))
            except weights.MissingWeights as error:
                self._missing[network] = _what(error)
                continue
            place = jax.local_devices()[0] if mesh is None else meshes.replicated(mesh)
            self._networks[network] = (module, jax.device_put(variables, place))

    def __call__(self, reference: jax.Array, reconstruction: jax.Array) -> tuple[dict[str, Any], dict[str, str]]:
        """Features of a batch, and why others are missing."""
        frames, *size = reference.shape[1:4]
        found, reasons = {}, {}
        for metric in self._wanted:
            network = _NEEDS[metric]
            smallest = lpips.TRUNKS[self._protocol.lpips][2]
            if network in self._missing:
                reasons[metric] = self._missing[network]
            elif network == "i3d" and frames < i3d.SHORTEST:
                reasons[metric] = f"clips of at least {i3d.SHORTEST} frames, got {frames}"
            elif network == "lpips" and min(size) < smallest:
                reasons[metric] = f"at least {smallest} pixels on the shorter side, got {size[0]}x{size[1]}"
            elif network not in found:
                module, variables = self._networks[network]
                found[network] = _FUNCTIONS[network](module, self._protocol, variables, reference, reconstruction)
        if "inception" in found:
            # jit leaves out the classifier when nobody asks for it, but a gathered array is paid for.
            found["inception"], logits = found["inception"]
            if "inception_score" in self._wanted:
                found["logits"] = logits
            if "rfid" not in self._wanted:
                del found["inception"]
        return found, reasons


_NEEDS = {"lpips": "lpips", "rfid": "inception", "inception_score": "inception", "fvd": "i3d"}


def _files(network: str, protocol: Protocol, path: Any) -> tuple[str, ...]:
    if network == "lpips":
        # Given files may hold both the trunk and the linear layers: only the loader can tell.
        return () if path is not None else (lpips.TRUNKS[protocol.lpips][1], f"lpips_{protocol.lpips}")
    return ("inception_fid",) if network == "inception" else ("i3d_kinetics400",)


def _what(error: weights.MissingWeights) -> str:
    # "<what> (<name>) is needed. <where it was looked for> ...": a table has room for the first part.
    return f"{str(error).split(' is needed')[0]}: give its path or set {weights.VARIABLE}"


def _over_frames(function: Callable, *videos: jax.Array) -> Any:
    # One frame of every item at a time: T times less memory, and the batch stays laid out as it is.
    results = jax.lax.map(lambda frames: function(*frames), tuple(jnp.moveaxis(video, 1, 0) for video in videos))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), results)


def _lpips(module, protocol: Protocol, variables, reference, reconstruction) -> jax.Array:
    first = reference.astype(jnp.float32) / 127.5 - 1
    second = levels(reconstruction, protocol.pixels) / 127.5 - 1
    with jax.default_matmul_precision("float32"):
        return _over_frames(lambda x, y: module.apply(variables, x, y), first, second).mean(axis=1)


def _inception(module, protocol: Protocol, variables, reference, reconstruction):
    prepare = pick("FID preprocessing", protocol.fid, FID_INPUT)

    def extract(first, second):
        real, fake = (module.apply(variables, prepare(frames)) for frames in (first, second))
        return (real["2048"], fake["2048"]), fake["logits_unbiased"]

    return _over_frames(extract, reference.astype(jnp.float32), levels(reconstruction, protocol.fid_pixels))


def _i3d(module, protocol: Protocol, variables, reference, reconstruction):
    prepare = pick("FVD preprocessing", protocol.fvd, FVD_INPUT)
    pair = (reference.astype(jnp.float32), levels(reconstruction, protocol.pixels))
    return tuple(module.apply(variables, prepare(clip))["logits"] for clip in pair)


_FUNCTIONS = {
    name: platform.jit(function, static_argnums=(0, 1))
    for name, function in (("lpips", _lpips), ("inception", _inception), ("i3d", _i3d))
}
