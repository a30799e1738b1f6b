"""Streaming against one pass over the whole clip: worst difference, and peak memory by length.

    python benchmarks/streaming.py --model=cosmos-cv8x8x8 [--size 64 64] [--frames 32 512] [--chunks 8 16]

Random weights: neither memory nor agreement depends on them. Every length is encoded and decoded chunk by chunk in a
process of its own, whose peak resident memory is printed; frames are made as they are needed. The comparison encodes
and decodes one clip both ways.
"""

import argparse
import pathlib
import resource
import subprocess
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tokenizers  # noqa: E402


def video(frames, size, chunk, first):
    """Chunks of a smooth moving pattern, ``(1, t, H, W, 3)``; the first one holds ``first`` frames more."""
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
    start = 0
    while start < frames:
        stop = min(start + chunk + first * (start == 0), frames)
        clip = [np.sin(0.05 * rows + 0.11 * t) * np.cos(0.07 * columns - 0.05 * t) for t in range(start, stop)]
        yield np.repeat(np.stack(clip)[None, ..., None], 3, axis=-1)
        start = stop


def stream(tok, frames, size, chunk):
    """(encodings, pixels) chunk by chunk."""
    first = int(tok.spec.first_frame_alone)

    def remembered(encodings, seen):
        for encoding in encodings:
            seen.append(encoding)
            yield encoding

    seen = []
    for pixels in tok.decode_stream(remembered(tok.encode_stream(video(frames, size, chunk, first)), seen)):
        yield seen, pixels
        seen.clear()


def compare(tok, frames, size, chunks):
    """Prints the worst differences between streaming in chunks of those lengths and one pass."""
    whole = np.concatenate(list(video(frames, size, frames, 0)), axis=1)
    encoding = tok.encode(whole)
    restored = np.asarray(tok.decode(encoding.latents))
    scale = np.abs(restored).max()
    for chunk in chunks:
        latents, pixels = [], []
        for seen, part in stream(tok, frames, size, chunk):
            latents += [np.asarray(encoded.latents) for encoded in seen]
            pixels.append(np.asarray(part))
        latents, pixels = np.concatenate(latents, axis=1), np.concatenate(pixels, axis=1)
        worst = np.abs(latents - np.asarray(encoding.latents)).max()
        print(
            f"{frames} frames in chunks of {chunk}: latents differ by at most {worst:.1e}, pixels by "
            f"{np.abs(pixels - restored[:, -pixels.shape[1] :]).max() / scale:.1e} of their range"
        )


def measure(tok, frames, size, chunk):
    """Prints the peak resident memory of this process after streaming that many frames."""
    count = 0
    for _, part in stream(tok, frames, size, chunk):
        count += part.shape[1]
        jax.block_until_ready(part)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{frames} frames in chunks of {chunk}: {count} decoded, peak resident memory {peak:.0f} MiB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="causal3d-fsq-488-16777216")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64))
    parser.add_argument("--frames", type=int, nargs="+", default=(32, 512))
    parser.add_argument("--chunks", type=int, nargs="+", default=(8, 16))
    parser.add_argument("--compare", type=int, default=33, help="frames of the clip that is done both ways; 0 = none")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        measure(tokenizers.create(arguments.model), arguments.measure, arguments.size, arguments.chunks[0])
        return
    print(f"{arguments.model}, {arguments.size[0]}x{arguments.size[1]} pixels, {jax.default_backend()}, float32")
    if arguments.compare:
        compare(tokenizers.create(arguments.model), arguments.compare, arguments.size, arguments.chunks)
    options = [f"--model={arguments.model}", "--size", *map(str, arguments.size), "--chunks", str(arguments.chunks[-1])]
    for frames in arguments.frames:
        subprocess.run([sys.executable, __file__, *options, f"--measure={frames}"], check=True)


if __name__ == "__main__":
    main()
