"""What tiles cost in accuracy: the difference to one pass over the whole frame, by tile and overlap.

    python benchmarks/tiling.py [--checkpoint=runs/quickstart | --model=<variant>] [--size 256 256] [--image=<file>]

Prints the root mean square difference between the tiled reconstruction and the whole one, relative to the
reconstruction error itself (0 = tiles make no difference) and in levels of 255. Random weights unless a checkpoint is
given; the numbers of trained weights are the ones that matter.
"""

import argparse
import pathlib
import sys

import numpy as np
import PIL.Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tokenizers  # noqa: E402
from tokenizers.data import embedded  # noqa: E402


def picture(path, size):
    """uint8 ``(1, H, W, 3)``: the file, or the embedded photograph of a cat, resized."""
    pixels = embedded.photograph("chelsea.png") if path is None else np.asarray(PIL.Image.open(path).convert("RGB"))
    return np.asarray(PIL.Image.fromarray(pixels).resize((size[1], size[0]), PIL.Image.Resampling.LANCZOS))[None]


def root_mean_square(a, b):
    return float(np.sqrt(np.mean(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)))) * 127.5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a run, a saved folder, or an official file (with --model)")
    parser.add_argument("--model", help="variant")
    parser.add_argument("--image", help="a picture file; default an embedded photograph")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), help="height and width it is resized to")
    parser.add_argument("--tiles", type=int, nargs="+", default=(64, 128))
    parser.add_argument("--overlaps", type=int, nargs="+", default=(0, 16, 32))
    arguments = parser.parse_args()
    if arguments.checkpoint is None:
        tok = tokenizers.create(arguments.model or "causal3d")
    else:
        tok = tokenizers.load(arguments.checkpoint, model=arguments.model)
    pixels = picture(arguments.image, arguments.size)
    whole = tok.reconstruct(pixels)
    error = root_mean_square(whole, pixels / 127.5 - 1)
    print(f"{tok}\n{arguments.size[0]}x{arguments.size[1]} pixels, reconstruction error {error:.2f} levels")
    print(f"{'tile':>5} {'overlap':>8} {'difference':>11} {'of the error':>13} {'error':>8}")
    for tile in arguments.tiles:
        for overlap in arguments.overlaps:
            tiled = tok.tiled(tile, overlap=overlap).reconstruct(pixels)
            difference, own = root_mean_square(tiled, whole), root_mean_square(tiled, pixels / 127.5 - 1)
            print(f"{tile:5} {overlap:8} {difference:11.2f} {difference / error:12.1%} {own:8.2f}")


if __name__ == "__main__":
    main()
