"""The command line: ``python -m tokenizers list | describe | encode | decode | reconstruct``."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
import tqdm

from . import media


def main(argv: list[str] | None = None) -> int:
    """Runs one command; errors in the input are one line on stderr and exit status 2."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tokenizers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("list", help="names of the released variants").set_defaults(run=_list)
    describe = commands.add_parser("describe", help="facts about one of them")
    describe.add_argument("name")
    describe.set_defaults(run=_describe)
    for name, run, text in (
        ("encode", _encode, "pictures and videos to .npz files with indices or latents"),
        ("decode", _decode, ".npz files back to pictures and videos"),
        ("reconstruct", _reconstruct, "encode and decode"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("source", help="a file, or a folder of files")
        command.add_argument("target", help="a file, or a folder")
        command.add_argument("--checkpoint", required=True, help="a run of train.py, a saved folder, or a weight file")
        command.add_argument("--model", help="variant of an official weight file")
        if name == "reconstruct":
            command.add_argument("--side_by_side", action="store_true", help="input left, reconstruction right")
        command.set_defaults(run=run)
    return parser


def _list(arguments) -> None:
    from . import registry

    for name in registry.available():
        print(name)


def _describe(arguments) -> None:
    from . import registry

    for key, value in registry.describe(arguments.name).items():
        print(f"{key:16} {value}")


def _load(arguments):
    from . import api

    return api.load(arguments.checkpoint, model=arguments.model)


def _pairs(arguments, suffix: str | None = None) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """(input file, output file) of a command; a folder keeps its structure."""
    source, target = pathlib.Path(arguments.source), pathlib.Path(arguments.target)
    if not source.exists():
        raise ValueError(f"{source} does not exist.")
    if source.is_file():
        yield source, target / (source.stem + (suffix or source.suffix)) if target.is_dir() else target
        return
    accepted = (".npz",) if arguments.run is _decode else media.SUFFIXES
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in accepted)
    if not files:
        raise ValueError(f"{source} holds no file with one of the endings {', '.join(accepted)}.")
    for path in tqdm.tqdm(files, unit="file", disable=not sys.stderr.isatty()):
        yield path, target / path.relative_to(source).with_suffix(suffix or path.suffix)


def _encode(arguments) -> None:
    tokenizer = _load(arguments)
    for source, target in _pairs(arguments, ".npz"):
        item = media.read(source)
        encoding = tokenizer.encode(item.pixels[None])
        stored = "latents" if encoding.indices is None else "indices"
        facts = {"shape": item.pixels.shape, "fps": item.fps, "checkpoint": str(arguments.checkpoint)}
        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez(target, **{stored: np.asarray(getattr(encoding, stored)[0])}, facts=json.dumps(facts))


def _decode(arguments) -> None:
    tokenizer = _load(arguments)
    for source, target in _pairs(arguments):
        try:
            with np.load(source) as stored:
                arrays = {name: stored[name] for name in stored.files}
            facts = json.loads(str(arrays["facts"]))
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"{source} was not written by `python -m tokenizers encode` ({error}).") from error
        if "indices" in arrays:
            pixels = tokenizer.decode_indices(arrays["indices"][None])[0]
        else:
            pixels = tokenizer.decode(arrays["latents"][None])[0]
        pixels = pixels[tuple(slice(0, size) for size in facts["shape"][:-1])]
        if target.suffix == ".npz":
            target = target.with_suffix(".png" if len(facts["shape"]) == 3 else ".mp4")
        media.write(target, media.to_uint8(np.asarray(pixels)), facts["fps"])


def _reconstruct(arguments) -> None:
    tokenizer = _load(arguments)
    for source, target in _pairs(arguments):
        item = media.read(source)
        pixels = media.to_uint8(np.asarray(tokenizer.reconstruct(item.pixels[None])[0]))
        if arguments.side_by_side:
            pixels = np.concatenate([item.pixels, pixels], axis=-2)
        media.write(target, pixels, item.fps)


if __name__ == "__main__":
    sys.exit(main())
