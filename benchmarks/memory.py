"""Memory of one device, from compiled programs: streaming at any size, and what recomputing saves in training.

    python benchmarks/memory.py stream [--models cosmos-1.0-cv8x8x8 ...] [--size 1080 1920] [--chunk 8]
        [--dtype bfloat16]
    python benchmarks/memory.py remat [--config kl_f8] [--values False True] [--size 128 128] [--frames 9] [--batch 1]
        [--rounds 3]

``stream`` compiles a later chunk of a clip, history and parameters included, and runs nothing: peak bytes do not grow
with the clip, except for models whose attention sees the whole past. ``remat`` compiles and times the training step of
a recipe for each value of ``config.model.remat``; with ``--rounds 0`` it only compiles. On a CPU, XLA keeps bfloat16
values in float32 here and there: what is printed is rather too much than too little.
"""

import argparse
import pathlib
import statistics
import sys
import warnings

import jax
import jax.numpy as jnp
from families import compiled, seconds, train

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tokenizers import pixels, registry  # noqa: E402
from tokenizers.parallel import traffic  # noqa: E402

STREAMED = ("cosmos-1.0-cv8x8x8", "cosmos-1.0-dv8x16x16", "vidtok-kl-causal-488-4chn", "vidtok-fsq-causal-488-32768")


def stream(options):
    """One line per model: GiB of encoding and of decoding a chunk."""
    # Between chunks buffers of keys grow, so those of one chunk have another shape than those of the next.
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    print("| model | pixels of a chunk | encode, GiB | decode, GiB |\n|---|---|---|---|")
    for name in options.models:
        module = registry.build(name, dtype=jnp.dtype(options.dtype))
        spec = module.spec
        shape = pixels.fitted(spec, None, (1, 1, *options.size, 3), strict=False)
        sizes = [(1, int(spec.first_frame_alone) + options.chunk, *shape[2:]), (1, options.chunk, *shape[2:])]
        first, later = (jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes)
        variables = registry.abstract_variables(module)

        def run(variables, x, method, module=module):
            return module.apply(variables, x, method=method, mutable=["stream"])

        def peak(first, later, method, variables=variables, run=run):
            """(GiB, results of the first and of a later chunk)."""
            result, history = jax.eval_shape(lambda v, x: run(v, x, method), variables, first)
            later_chunk = lambda v, history, x: run(dict(v) | history, x, method)  # noqa: E731
            program, *_ = compiled(later_chunk, variables, history, later, donate_argnums=1)
            following, _ = jax.eval_shape(lambda v, x: run(v, x, method), dict(variables) | history, later)
            return traffic.peak_bytes(program) / 2**30, result, following

        encoding, result, following = peak(first, later, "encode")
        decoding, *_ = peak(result.latents, following.latents, "decode")
        print(f"| {name} | {'x'.join(map(str, later.shape[1:4]))} | {encoding:.1f} | {decoding:.1f} |", flush=True)


def remat(options):
    """One line per value: MiB, milliseconds, operations."""
    print(f"configs/{options.config}.py\n\n| remat | MiB | ms | GFLOP | compile s |\n|---|---|---|---|---|")
    for text in options.values:
        value = {"True": True, "False": False}.get(text, text)
        for _, _, run, program, took, count in train(options.config, options, {"remat": value}):
            if options.rounds:
                jax.block_until_ready(run())
            median = statistics.median([seconds(run) for _ in range(options.rounds)] or [0.0])
            mib = traffic.peak_bytes(program) / 2**20
            print(f"| {value} | {mib:.0f} | {1e3 * median:.0f} | {count / 1e9:.0f} | {took:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stream", "remat"))
    parser.add_argument("--models", nargs="+", default=STREAMED)
    parser.add_argument("--config", default="kl_f8")
    parser.add_argument("--values", nargs="+", default=("False", "True"))
    parser.add_argument("--size", type=int, nargs=2, help="height and width; default 1080 1920, 128 128")
    parser.add_argument("--chunk", type=int, default=8, help="frames")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default bfloat16, float32")
    options = parser.parse_args()
    options.size = options.size or {"stream": (1080, 1920), "remat": (128, 128)}[options.what]
    options.dtype = options.dtype or {"stream": "bfloat16", "remat": "float32"}[options.what]
    {"stream": stream, "remat": remat}[options.what](options)


if __name__ == "__main__":
    main()
