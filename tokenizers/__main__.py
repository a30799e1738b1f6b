"""The command line: ``python -m tokenizers <command>``; ``--help`` after a command says more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import media


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors in the input are one line on stderr and exit status 2."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m tokenizers", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="command")
    listing = _command(commands, "list", _list, "names of the released variants")
    listing.add_argument("--table", action="store_true", help="with input, compression, latents and paper")
    describe = _command(commands, "describe", _describe, "facts about one of them")
    describe.add_argument("name")
    convert = _command(commands, "convert", _convert, "an official weight file, or a run, to a folder that loads fast")
    convert.add_argument("checkpoint", help="an official weight file, or a run of train.py (its EMA weights)")
    convert.add_argument("target", help="a new folder; or a new .safetensors file, for the authors' own code to load")
    convert.add_argument("--model", help="variant of an official weight file")
    for name, run, text in (
        ("encode", _encode, "pictures and videos to .npz or .safetensors files with indices or latents"),
        ("decode", _decode, "files of encode back to pictures and videos"),
        ("reconstruct", _reconstruct, "encode and decode; videos lose their sound"),
    ):
        command = _command(commands, name, run, text)
        command.add_argument("source", help="a file, a folder of files, or numbered pictures of a video: in/%%05d.png")
        command.add_argument("target", help="a file, a folder, or out/%%05d.png")
        _add_tokenizer(command)
        command.add_argument(
            "--chunk_frames",
            type=_positive,
            default=16,
            help="frames of a video that are in memory at once, for causal video and for image tokenizers (default 16)",
        )
        tiles = {"nargs": 2, "type": _positive, "metavar": ("HEIGHT", "WIDTH")}
        command.add_argument("--tile", help="large frames in overlapping tiles of that size: approximate", **tiles)
        command.add_argument("--tile_overlap", type=int, default=64, help="pixels that tiles share (default 64)")
        if name == "encode":
            endings = ("npz", "safetensors")
            command.add_argument("--format", choices=endings, default=endings[0], help="of files in a target folder")
        if name == "reconstruct":
            command.add_argument("--side_by_side", action="store_true", help="input left, reconstruction right")
    _add_dataset(commands)
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run)
    return command


def _add_tokenizer(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", required=True, help="a run of train.py, a saved folder, or a weight file")
    command.add_argument("--model", help="variant of an official weight file")
    command.add_argument("--precision", default="float32", help="float32 (default), bfloat16, or auto")


def _add_dataset(commands) -> None:
    text = "all items of a folder, tar, Parquet or ArrayRecord files to shards of tokens; resumes where it stopped"
    command = _command(commands, "tokenize-dataset", _tokenize_dataset, text)
    command.add_argument("source", help="a folder, a file, or a glob pattern")
    command.add_argument("target", help="a new folder, or that of the same command, interrupted")
    _add_tokenizer(command)
    command.add_argument("--kind", default="auto", help="images, videos, captions, tar, parquet, array_record, auto")
    size = {"nargs": 2, "type": _positive, "metavar": ("HEIGHT", "WIDTH")}
    command.add_argument("--size", required=True, help="items are resized to cover it and cropped to it", **size)
    command.add_argument("--frames", type=_positive, default=1, help="of the clip at the start of every video")
    command.add_argument("--fps", type=float, default=0.0, help="frame rate of clips; 0 (default) is their own")
    command.add_argument("--stride", type=_positive, default=1, help="take every n-th frame")
    command.add_argument("--batch_size", type=_positive, default=16)
    command.add_argument("--shard_items", type=_positive, default=1024)
    command.add_argument("--workers", type=int, default=0, help="processes that decode files; 0 (default) is threads")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _list(arguments) -> None:
    from . import registry

    names = registry.available()
    if not arguments.table:
        print("\n".join(names))
        return
    print("| name | input | compression (t, h, w) | latents | paper |\n|---|---|---|---|---|")
    for name, (_, variant) in sorted(registry.variants().items()):
        spec = registry.build(name).spec
        tokens = f"{spec.tokens_per_item} tokens, " if spec.tokens_per_item else ""
        kind = f"{spec.codebook_size} codes" if spec.codebook_size else f"{spec.latent_channels} channels"
        seen = "images, clips" if spec.video else "images"
        compression = "x".join(map(str, spec.compression))
        print(f"| {name} | {seen} | {compression} | {tokens}{kind} | {variant.paper} |")


def _describe(arguments) -> None:
    from . import registry

    for key, value in registry.describe(arguments.name).items():
        print(f"{key:16} {value}")


def _load(arguments):
    from . import loading
    from .parallel import platform

    dtype = platform.compute_dtype(arguments.precision)
    tokenizer = loading.load(arguments.checkpoint, model=arguments.model).cast(dtype)
    if getattr(arguments, "tile", None):
        return tokenizer.tiled(tuple(arguments.tile), arguments.tile_overlap)
    return tokenizer


def _convert(arguments) -> None:
    from . import loading

    tokenizer = loading.load(arguments.checkpoint, model=arguments.model)
    if arguments.target.endswith(".safetensors"):
        tokenizer.export_official(arguments.target)
    else:
        tokenizer.save(arguments.target)
    print(f"{arguments.target}: {tokenizer}")


def _encode(arguments) -> None:
    from .commands import files

    tokenizer = _load(arguments)

    def work(source, target):
        files.encode(tokenizer, source, target, arguments.chunk_frames)

    files.run(arguments.source, arguments.target, media.SUFFIXES, lambda path: f".{arguments.format}", work)


def _decode(arguments) -> None:
    from .commands import files

    tokenizer = _load(arguments)

    def work(source, target):
        files.decode(tokenizer, source, target, arguments.chunk_frames)

    def ending(source) -> str:
        return ".mp4" if len(files.stored_facts(source)["shape"]) == 4 else ".png"

    files.run(arguments.source, arguments.target, files.STORED, ending, work)


def _reconstruct(arguments) -> None:
    from .commands import files

    tokenizer = _load(arguments)

    def work(source, target):
        files.reconstruct(tokenizer, source, target, arguments.chunk_frames, arguments.side_by_side)

    def ending(source) -> str:
        return ".mp4" if media.is_video(source) else ".png"

    files.run(arguments.source, arguments.target, media.SUFFIXES, ending, work)


def _tokenize_dataset(arguments) -> None:
    from .commands import dataset

    data = dataset.pipeline(
        arguments.source,
        arguments.kind,
        tuple(arguments.size),
        arguments.frames,
        arguments.fps,
        arguments.stride,
        arguments.batch_size,
        arguments.workers,
    )
    made = dataset.tokenize(_load(arguments), data, arguments.target, arguments.shard_items)
    print(f"{arguments.target}: {made['items']} items in {made['shards']} shards, {made['unusable']} unusable")


def _start() -> int:
    from .parallel import platform

    platform.enable_compilation_cache("~/.cache/tokenizers/compiled")
    return main()


if __name__ == "__main__":
    sys.exit(_start())
