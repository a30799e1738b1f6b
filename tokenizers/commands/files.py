"""Pictures and videos, file by file: encode, decode, reconstruct.

Long videos pass in chunks, so that memory stays bounded.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tqdm

from .. import media, pixels
from ..api import Tokenizer
from ..types import Encoding, Spec

STORED = (".npz", ".safetensors")
_ARRAYS = ("indices", "latents")

Work = Callable[[pathlib.Path, pathlib.Path], None]


def run(source: str, target: str, accepted: tuple[str, ...], ending: Callable[[pathlib.Path], str], work: Work) -> None:
    """Calls ``work(input, output)`` for a file, or for every file of a folder (its structure is kept).

    Args:
      source: a file or a folder.
      target: a file, or a folder; what does not exist and has no ending becomes a folder.
      accepted: endings of the files to take from a folder.
      ending: output ending for an input file.
      work: raises ValueError for a file it cannot use; in a folder the others are done all the same.

    Raises:
      ValueError: nothing to do, an output that would overwrite an input, or the first file that failed.
    """
    source_path, target_path = pathlib.Path(source), pathlib.Path(target)
    if media.is_sequence(source_path):
        media.sequence(source_path)  # or an error that says what is not there
        work(source_path, target_path)
        return
    if not source_path.exists():
        raise ValueError(f"{source_path} does not exist.")
    if source_path.is_file():
        folder = target_path.is_dir() or (not target_path.exists() and not target_path.suffix)
        output = target_path / (source_path.stem + ending(source_path)) if folder else target_path
        work(source_path, _other_than(source_path, output))
        return
    files = sorted(path for path in source_path.rglob("*") if path.is_file() and path.suffix.lower() in accepted)
    if not files:
        raise ValueError(f"{source_path} holds no file with one of the endings {', '.join(accepted)}.")
    failed: list[str] = []
    stems = Counter(path.with_suffix("") for path in files)
    for path in tqdm.tqdm(files, unit="file", disable=None):
        # Files that differ only in their ending keep it: a.jpg and a.png do not both become a.npz.
        name = path.name if stems[path.with_suffix("")] > 1 else path.stem
        try:
            output = target_path / path.relative_to(source_path).with_name(name + ending(path))
            work(path, _other_than(path, output))
        except (ValueError, OSError) as error:
            failed.append(str(error))
            tqdm.tqdm.write(f"left out: {error}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(files)} files were left out, the first: {failed[0]}")


def _other_than(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the input itself; choose another output.")
    return target


def facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokens must have in common with the tokenizer that decodes them."""
    spec = tokenizer.spec
    return {
        "name": tokenizer.name,
        "compression": list(spec.compression),
        "codebook_size": spec.codebook_size,
        "latent_channels": spec.latent_channels,
    }


def encode(tokenizer: Tokenizer, source: pathlib.Path, target: pathlib.Path, chunk_frames: int) -> None:
    """Writes the indices (or continuous latents) of a picture or video, with what `decode` needs to know."""
    if target.suffix not in STORED:
        raise ValueError(f"{target}: tokens are written to files that end in {' or '.join(STORED)}.")
    stored = _ARRAYS[0] if tokenizer.spec.codebook_size else _ARRAYS[1]
    if media.is_video(source):
        with media.open_video(source) as video:
            frames = _Counted(_progress(video))
            parts = [getattr(e, stored)[0] for e in _encodings(tokenizer.spec, tokenizer, frames, chunk_frames)]
            shape, fps = [frames.count, *frames.shape], video.fps
        array = parts[0] if len(parts) == 1 else np.concatenate([np.asarray(part) for part in parts])
    else:
        picture = media.read_image(source)
        array, shape, fps = getattr(tokenizer.encode(picture[None]), stored)[0], list(picture.shape), 0.0
    about = {"shape": shape, "fps": fps, "tokenizer": facts(tokenizer)}
    save(target, {stored: np.asarray(array)}, json.dumps(about))


def save(path: pathlib.Path, arrays: dict[str, np.ndarray], facts: str | None = None) -> None:
    """Writes arrays, and a text about them, to an .npz or .safetensors file that is there whole or not at all."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        if path.suffix == STORED[1]:
            about = None if facts is None else {"facts": facts}
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial, about)
        else:
            with partial.open("wb") as file:
                np.savez(file, **arrays, **({} if facts is None else {"facts": np.asarray(facts)}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def stored_facts(source: pathlib.Path) -> dict[str, Any]:
    """What `encode` wrote beside the tokens.

    Raises:
      ValueError: for a file of another origin.
    """
    return _stored(source)[1]


def _stored(source: pathlib.Path) -> tuple[np.ndarray | None, dict[str, Any]]:
    from safetensors import SafetensorError

    try:
        arrays, facts = (_from_safetensors if source.suffix == STORED[1] else _from_npz)(source)
        about = json.loads(facts)
        array = next((arrays[name] for name in _ARRAYS if name in arrays), None)
        if array is None or not {"shape", "fps", "tokenizer"} <= set(about):
            raise ValueError("tokens or facts are missing")
        return array, about
    except (ValueError, KeyError, TypeError, OSError, EOFError, SafetensorError) as error:
        raise ValueError(f"{source} was not written by `python -m tokenizers encode` ({error}).") from error


def _from_npz(source: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    with np.load(source, allow_pickle=False) as file:
        return {name: file[name] for name in _ARRAYS if name in file.files}, str(file["facts"])


def _from_safetensors(source: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    from safetensors import safe_open

    with safe_open(source, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {})["facts"]  # noqa: SIM118


def decode(tokenizer: Tokenizer, source: pathlib.Path, target: pathlib.Path, chunk_frames: int) -> None:
    """Writes the picture or video that tokens stand for, with the size and frame count of the original."""
    array, about = _stored(source)
    _check_origin(source, tokenizer, about["tokenizer"])
    count, *size = about["shape"][:-1] if len(about["shape"]) == 4 else (1, *about["shape"][:-1])
    crop = tuple(slice(0, length) for length in size)
    if len(about["shape"]) == 3:
        media.check_target(target, video=False)
        picture = _decoded(tokenizer, array[None])[0]
        picture = picture[0] if picture.ndim == 4 else picture  # of a tokenizer of clips without a grid
        media.write(target, np.asarray(pixels.to_uint8(picture))[crop])
        return
    with media.VideoWriter(target, about["fps"]) as writer:
        for clip in _pixels(tokenizer, _portions(tokenizer.spec, array, chunk_frames)):
            frames = np.asarray(pixels.to_uint8(clip[0]))[:count]
            count -= len(frames)
            writer.add(frames[(slice(None), *crop)])


def _check_origin(source: pathlib.Path, tokenizer: Tokenizer, origin: dict[str, Any]) -> None:
    here = facts(tokenizer)
    for key in ("compression", "codebook_size", "latent_channels"):
        if origin.get(key) != here[key]:
            raise ValueError(
                f"{source} holds tokens of another tokenizer, {origin.get('name')!r}: its {key} is {origin.get(key)}, "
                f"that of the given one {here[key]}."
            )


def reconstruct(
    tokenizer: Tokenizer, source: pathlib.Path, target: pathlib.Path, chunk_frames: int, side_by_side: bool
) -> None:
    """Writes what is left of a picture or video after encoding and decoding it; beside the original, if wanted."""
    if not media.is_video(source):
        media.check_target(target, video=False)
        picture = media.read_image(source)
        media.write(target, _beside(picture, tokenizer.reconstruct(picture[None])[0], side_by_side))
        return
    with media.open_video(source) as video, media.VideoWriter(target, video.fps) as writer:
        waiting: collections.deque = collections.deque()
        frames = _kept(_progress(video), waiting)
        for clip in _pixels(tokenizer, _encodings(tokenizer.spec, tokenizer, frames, chunk_frames)):
            # Frames beyond those that went in have filled up the last group.
            for frame in np.asarray(clip[0])[: len(waiting)]:
                writer.add(_beside(waiting.popleft(), frame, side_by_side)[None])


def _beside(original: np.ndarray, restored, side_by_side: bool) -> np.ndarray:
    height, width = original.shape[:2]
    restored = np.asarray(pixels.to_uint8(restored[:height, :width]))
    return np.concatenate([original, restored], axis=1) if side_by_side else restored


# --- videos in chunks ------------------------------------------------------------------------------------------------


class _Counted:
    """Passes frames on, and counts them."""

    def __init__(self, frames: Iterable[np.ndarray]):
        self._frames, self.count, self.shape = frames, 0, ()

    def __iter__(self) -> Iterator[np.ndarray]:
        for frame in self._frames:
            self.count, self.shape = self.count + 1, frame.shape
            yield frame


def _kept(frames: Iterable[np.ndarray], waiting: collections.deque) -> Iterator[np.ndarray]:
    for frame in frames:
        waiting.append(frame)
        yield frame


def _progress(video: media.Video) -> Iterable[np.ndarray]:
    return tqdm.tqdm(video, total=video.frames or None, unit="frame", leave=False, disable=None)


def _streams(spec: Spec) -> bool:
    return spec.video and spec.causal and spec.tokens_per_item is None


def _sizes(spec: Spec, length: int) -> Iterator[int]:
    """Lengths of chunks: about ``length`` frames each; everything at once for tokenizers that need whole clips."""
    if spec.video and not _streams(spec):
        while True:
            yield 2**62
    step = spec.compression[0] if spec.video else 1
    length = -(-length // step) * step
    yield length + int(spec.video and spec.first_frame_alone)
    while True:
        yield length


def _encodings(spec: Spec, tokenizer: Tokenizer, frames: Iterable[np.ndarray], chunk_frames: int) -> Iterator[Encoding]:
    """The encodings of consecutive parts of a video."""
    chunks = _chunks(frames, _sizes(spec, chunk_frames))
    if _streams(spec):
        yield from tokenizer.encode_stream(chunks)
    else:
        yield from map(tokenizer.encode, chunks)


def _chunks(frames: Iterable[np.ndarray], sizes: Iterator[int]) -> Iterator[np.ndarray]:
    held, size = [], next(sizes)
    for frame in frames:
        held.append(frame)
        if len(held) == size:
            yield np.stack(held)[None]
            held, size = [], next(sizes)
    if held:
        yield np.stack(held)[None]


def _portions(spec: Spec, array: np.ndarray, chunk_frames: int) -> Iterator[np.ndarray]:
    """Tokens of a whole video in portions of about ``chunk_frames`` frames, with a batch axis."""
    if spec.video and not _streams(spec):
        yield array[None]
        return
    step = max(1, chunk_frames // (spec.compression[0] if spec.video else 1))
    first = step + int(spec.video and spec.first_frame_alone)
    yield array[None, :first]
    for start in range(first, len(array), step):
        yield array[None, start : start + step]


def _pixels(tokenizer: Tokenizer, parts: Iterable[Any]) -> Iterator[Any]:
    """Pixels of consecutive encodings, indices or latents."""
    if _streams(tokenizer.spec):
        spec = tokenizer.spec
        skip = spec.compression[0] - 1 if spec.fills_front else 0
        for clip in tokenizer.decode_stream(parts):
            yield clip[:, skip:]
            skip = 0
    else:
        for part in parts:
            yield _decoded(tokenizer, part.latents if isinstance(part, Encoding) else part)


def _decoded(tokenizer: Tokenizer, tokens):
    return (tokenizer.decode_indices if np.issubdtype(tokens.dtype, np.integer) else tokenizer.decode)(tokens)
