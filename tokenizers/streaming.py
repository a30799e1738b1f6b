"""Clips of any length in constant memory: causal video tokenizers encode and decode chunk after chunk.

What earlier chunks leave for later ones is the Linen collection ``stream`` (``nn/conv.py``): a pytree that goes into
one compiled function per chunk shape and comes out of it, so chunks of one length compile once (the first chunk, which
has no history, is a program of its own). Attention over the whole past keeps buffers that double when they are half
full: a program for each doubling of the length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from . import errors
from . import pixels as pixel_values
from .bands import InTiles, Run, lowered, quietly
from .nn.attention import with_room
from .nn.conv import STREAM
from .parallel import platform
from .parallel.constrain import constrain, whole
from .types import Array, Encoding, Spec

_NAMES = ("batch", "time", "height", "width", "channel")


def encode(
    module: nn.Module, name: str, run: Run, chunks: Iterable[Any], tile: tuple[int, int] | None = None
) -> Iterator[Encoding]:
    """See `api.Tokenizer.encode_stream`."""
    spec = _streaming_spec(module, name)
    step = functools.partial(_encode_whole, run, name) if tile is None else InTiles(module, name, run, tile).encode
    return _encodings(spec, step, _checked_pixels(spec, chunks))


def decode(
    module: nn.Module, name: str, run: Run, chunks: Iterable[Any], tile: tuple[int, int] | None = None
) -> Iterator[Array]:
    """See `api.Tokenizer.decode_stream`."""
    spec = _streaming_spec(module, name)
    step = functools.partial(_decode_whole, run, name) if tile is None else InTiles(module, name, run, tile).decode
    return _pixels(spec, step, _checked_latents(spec, name, chunks))


def _streaming_spec(module: nn.Module, name: str) -> Spec:
    spec = module.spec
    if not (spec.video and spec.causal and spec.tokens_per_item is None):
        what = "an image tokenizer" if not spec.video else "not causal"
        raise ValueError(f"{name} cannot stream: it is {what}. Use encode, decode or reconstruct on whole clips.")
    return spec


def _encodings(spec: Spec, step: Callable, chunks: Iterable[Any]) -> Iterator[Encoding]:
    state: dict[str, Any] = {}
    for pixels in regroup(chunks, int(spec.first_frame_alone), spec.compression[0]):
        encoding, state = step(state, pixels)
        yield encoding


def _pixels(spec: Spec, step: Callable, chunks: Iterable[Any]) -> Iterator[Array]:
    state: dict[str, Any] = {}
    for latents, last in _held_back(chunks, spec.lookahead):
        pixels, state = step(state, latents, last)
        yield pixels


def _encode_whole(run: Run, name: str, state: Any, pixels: Any) -> tuple[Encoding, Any]:
    encoding, state = quietly(run, _encode_chunk, state, pixels)
    return encoding, _kept(state, name)


def _decode_whole(run: Run, name: str, state: Any, latents: Any, last: bool) -> tuple[Array, Any]:
    pixels, state = quietly(run, _decode_last_chunk if last else _decode_chunk, state, latents)
    return pixels, state if last else _kept(state, name)


def _held_back(chunks: Iterable[Any], count: int) -> Iterator[tuple[Any, bool]]:
    """(latents, whether they are the last): ``count`` latent frames wait, so that the last ones are known as such.

    With a count of 0 nothing waits and no chunk is known to be the last.
    """
    if not count:
        yield from ((chunk, False) for chunk in chunks)
        return
    held = None
    for chunk in chunks:
        held = chunk if held is None else _joined(held, chunk)
        if held.shape[1] > count:
            yield held[:, :-count], False
            held = held[:, -count:]
    if held is not None:
        yield held, True


def _kept(state: Any, name: str) -> Any:
    if not state:
        raise ValueError(f"{name} cannot stream: its layers keep no history. Encode and decode whole clips.")
    return with_room(state)


@functools.partial(platform.jit, lean=True, static_argnums=0, donate_argnums=2)  # the state goes in and comes out
def _encode_chunk(module: nn.Module, variables, state, pixels):
    spec, size = module.spec, getattr(module, "input_size", None)
    # Frames fit already; in a later chunk their number is not that of a clip.
    shape = (*pixels.shape[:2], *pixel_values.fitted(spec, size, (1, *pixels.shape[2:]), strict=False)[1:])
    video = constrain(pixel_values.pad(pixel_values.to_float(pixels), shape), *_NAMES)
    return module.apply(dict(whole(variables)) | state, video, method="encode", mutable=[STREAM])


@functools.partial(platform.jit, lean=True, static_argnums=0, donate_argnums=2)  # the state goes in and comes out
def _decode_chunk(module: nn.Module, variables, state, latents):
    latents = _as_latents(module, variables, latents)
    return module.apply(dict(whole(variables)) | state, latents, method="decode", mutable=[STREAM])


@functools.partial(platform.jit, lean=True, static_argnums=0)
def _decode_last_chunk(module: nn.Module, variables, state, latents):
    # Layers that look ahead take a call that leaves no history for the last one.
    return module.apply(dict(whole(variables)) | state, _as_latents(module, variables, latents), method="decode"), {}


def later_chunks(
    module: nn.Module, variables: Any, size: tuple[int, int], frames: int, device: Any = None
) -> Iterator[tuple]:
    """The programs of a later chunk of a clip, lowered from shapes alone: what they need of a device is known unrun.

    Args:
      module: of a causal video tokenizer.
      variables: its variables or their shapes (`registry.abstract_variables`).
      size: height and width of the pixels.
      frames: of a chunk; the first one has one more where the first frame is alone.
      device: to compile for, also one of a `jax.experimental.topologies` description; ``None`` is the one that is here.

    Yields:
      (``"encode"``, its `jax.stages.Lowered`, bytes of the history that it gets), then the same of ``"decode"``.
    """
    spec = _streaming_spec(module, type(module).__name__)
    counts = (frames + int(spec.first_frame_alone), frames)
    first, later = (jax.ShapeDtypeStruct((1, count, *size, spec.channels), jnp.float32) for count in counts)
    for method, run in (("encode", _encode_chunk), ("decode", _decode_chunk)):
        shapes = functools.partial(jax.eval_shape, functools.partial(run, module), variables)
        start, state = shapes({}, first)
        state = jax.eval_shape(with_room, state)
        yield method, *lowered(run, (module,), variables, state, later, device)
        if method == "encode":
            following, _ = shapes(state, later)
            first, later = start.latents, following.latents


def _as_latents(module: nn.Module, variables, latents):
    if jnp.issubdtype(latents.dtype, jnp.integer):
        latents = module.apply(whole(variables), latents, method="indices_to_latents")
    return constrain(latents, *_NAMES)


def _checked_pixels(spec: Spec, chunks: Iterable[Any]) -> Iterator[Any]:
    expected = None
    for chunk in chunks:
        chunk = chunk if hasattr(chunk, "shape") else np.asarray(chunk)
        pixel_values.check(chunk, spec.channels)
        expected = _same_clip(chunk, expected, f"(B, T, H, W, {spec.channels})")
        yield chunk


def _checked_latents(spec: Spec, name: str, chunks: Iterable[Any]) -> Iterator[Any]:
    expected = None
    for chunk in chunks:
        chunk = chunk.latents if isinstance(chunk, Encoding) else chunk
        chunk = chunk if hasattr(chunk, "shape") else np.asarray(chunk)
        if np.issubdtype(chunk.dtype, np.integer):
            check_indices(spec, name, chunk)
            expected = _same_clip(chunk, expected, "(B, T', H', W') indices", rank=4 + (spec.codebooks > 1))
        else:
            expected = _same_clip(chunk, expected, f"(B, T', H', W', {spec.latent_channels}) latents")
        yield chunk


def _same_clip(chunk, expected: tuple | None, accepted: str, rank: int = 5) -> tuple:
    """(batch, everything but time) of a chunk, which must be that of the chunk before."""
    shape = tuple(chunk.shape)
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"a chunk has shape {shape}; accepted: {accepted}.")
    found = (shape[0], *shape[2:])
    if expected not in (None, found):
        before = (expected[0], "T", *expected[1:])
        raise ValueError(f"a chunk has shape {shape}, the chunks before it {before}: only T may change.")
    return found


def check_indices(spec: Spec, name: str, indices) -> None:
    """Refuses indices of a continuous tokenizer, other dtypes than integers, and concrete ones outside the codebook."""
    if spec.codebook_size is None:
        raise ValueError(f"{name} is continuous: it has no indices. Use decode(latents).")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise errors.unknown("dtype of indices", str(indices.dtype), ("int32", "any other integer"))
    if isinstance(indices, jax.core.Tracer) or not indices.size:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= spec.codebook_size:
        raise ValueError(f"indices range from {low} to {high}; those of {name} lie in [0, {spec.codebook_size}).")


def regroup(chunks: Iterable[Any], first: int, group: int) -> Iterator[Any]:
    """Frames in other portions: ``first + k * group`` of them, then ``k * group`` each, as soon as they are there.

    Args:
      chunks: arrays ``(B, t, ...)`` of any lengths t.
      first: frames that come before the first group, 0 or 1.
      group: frames that make one latent frame.

    Yields:
      Arrays ``(B, t', ...)``. An incomplete last group is filled by repeating the last frame. Fewer than ``group``
      frames are ever held back.
    """
    held, lead = None, first
    for chunk in chunks:
        held = chunk if held is None or not held.shape[1] else _joined(held, chunk)
        ready = lead + (held.shape[1] - lead) // group * group
        if ready > 0 and held.shape[1] >= lead:
            yield held[:, :ready]
            held, lead = held[:, ready:], 0
    if held is not None and held.shape[1]:
        missing = -(held.shape[1] - lead) % group
        yield _joined(held, *[held[:, -1:]] * missing)


def _joined(*parts):
    if len(parts) == 1:
        return parts[0]
    library = np if all(isinstance(part, np.ndarray) for part in parts) else jnp
    return library.concatenate(parts, axis=1)
