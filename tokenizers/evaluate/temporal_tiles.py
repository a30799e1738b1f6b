"""VidTok v1.1 as its authors evaluate it: long clips in tiles of time, which depart from the whole clip."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from .. import errors
from ..parallel import platform
from ..types import Array, Encoding

_STREAM = "stream"
_TILES = {("causal-v1.1", True): "causal-v1.1-overlap", ("causal-v1.1", False): "causal-v1.1-separate"}
_TILES |= {("causal-v1.1-nearest", overlap): "causal-v1.1-nearest" for overlap in (True, False)}


def temporal_tiles(
    module: nn.Module, variables: Mapping[str, Any], pixels: Array, chunk: int = 16, overlap: bool = True
) -> tuple[Array, Encoding]:
    """Reconstruction and encoding as v1.1's own code computes them with ``use_tiling``; its published numbers do.

    Decoding departs from that of the whole clip: a little near the start with ``overlap`` (whatever the chunk), a lot
    and everywhere without, which is the official default. `Tokenizer.encode_stream` and ``decode_stream`` need as
    little memory and are exact. With nearest interpolation all agree.

    Args:
      module: a v1.1 model.
      variables: its variables.
      pixels: ``(B, T, H, W, 3)`` in [-1, 1]. The first tile has one frame. The last one may be shorter; unless it is a
        multiple of f, it is filled in front, amid the clip, and shifts what follows.
      chunk: frames of a tile, ``t_chunk_enc``; at least f.
      overlap: ``use_overlap``.

    Returns:
      (pixels of the shape of the input, `Encoding` of all tiles, losses averaged over them).
    """
    module = module.clone(time=errors.pick("family and overlap", (module.time, overlap), _TILES))
    if chunk < module.spec.compression[0]:
        raise ValueError(f"chunk={chunk} must be at least {module.spec.compression[0]} frames.")
    frames, state, parts = pixels.shape[1], {}, []
    for start, stop in _tiles(frames, 1, chunk):
        part, state = _encode_tile(module, variables, state, pixels[:, start:stop])
        parts.append(part)
    losses = {name: sum(part.losses[name] for part in parts) / len(parts) for name in parts[0].losses}
    parts = [part.replace(losses={}) for part in parts]
    encoding = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts).replace(losses=losses)

    latents, state, decoded = encoding.latents, {}, []
    if module.time == "causal-v1.1-overlap" and latents.shape[1] > 1:
        _, state = _decode_tile(module, False, variables, state, latents[:, :2])
        seams = {path: value for path, value in traverse_util.flatten_dict(state).items() if path[-1] == "seam"}
        state = traverse_util.unflatten_dict(seams)
    for start, stop in _tiles(latents.shape[1], 1, chunk // module.spec.compression[0]):
        last = stop == latents.shape[1]
        part, state = _decode_tile(module, last, variables, state, latents[:, start:stop])
        decoded.append(part)
    return jnp.concatenate(decoded, axis=1)[:, -frames:], encoding


def _tiles(count: int, first: int, step: int) -> list[tuple[int, int]]:
    edges = [0, *range(first, count, step), count]
    return list(zip(edges, edges[1:], strict=False))


@functools.partial(platform.jit, static_argnums=0)
def _encode_tile(module: nn.Module, variables, state, pixels):
    return module.apply(dict(variables) | state, pixels, method="encode", mutable=[_STREAM])


@functools.partial(platform.jit, static_argnums=(0, 1))
def _decode_tile(module: nn.Module, last: bool, variables, state, latents):
    decoded = module.apply(dict(variables) | state, latents, method="decode", mutable=not last and [_STREAM])
    return (decoded, {}) if last else decoded
