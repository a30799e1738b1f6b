"""Memory of one device, from compiled programs: streaming at any size, and what recomputing saves in training.

    python benchmarks/memory.py stream [--models cosmos-1.0-cv8x8x8 ...] [--size 1080 1920] [--chunk 8]
        [--tile 640 768] [--dtype bfloat16] [--tpu v5p:2x2x1]
    python benchmarks/memory.py remat [--config kl_f8] [--values False True] [--size 128 128] [--frames 9] [--batch 1]
        [--rounds 3] [--only_kept]

``stream`` compiles a later chunk of a clip, history and parameters included, and runs nothing: peak bytes do not grow
with the clip, except for models whose attention sees the whole past. With ``--tile``, models that can be streamed in
tiles have a second line, for the larger of their programs (a tile, the rest). ``remat`` says, for each value of
``config.model.remat``, what a recipe's model keeps for its backward pass, and compiles and times the training step;
``--rounds 0`` only compiles, ``--only_kept`` does not even that.

With ``--tpu`` the numbers are those of XLA's compiler for TPUs, which needs ``pip install libtpu`` and no TPU, and
takes minutes; without, those of the compiler of this machine.
"""

import argparse
import importlib
import pathlib
import statistics
import sys
import warnings

import jax
import jax.numpy as jnp
from families import seconds, shape_of, train
from jax.experimental import topologies

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from vistok.parallel import platform, traffic  # noqa: E402
from vistok.train import build, dryrun  # noqa: E402
from vistok.train.config import to_dict  # noqa: E402

from vistok import bands, pixels, registry, streaming  # noqa: E402

STREAMED = ("cosmos-1.0-cv8x8x8", "cosmos-1.0-dv8x16x16", "vidtok-kl-causal-488-4chn", "vidtok-fsq-causal-488-32768")


def stream(options):
    """One line per model: GiB of encoding and of decoding a later chunk, and of the history, which is part of both."""
    # Between chunks buffers of keys grow, so those of one chunk have another shape than those of the next.
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    print("| model | pixels of a chunk | encode, GiB | of it history | decode, GiB | of it history |")
    print("|---|---|---|---|---|---|")
    device = options.tpu and topologies.get_topology_desc(options.tpu, platform="tpu").devices[0]
    options_of_compiler = {} if options.tpu else platform.run_once_options()
    for name in options.models:
        module = registry.build(name, dtype=jnp.dtype(options.dtype))
        variables = registry.abstract_variables(module)
        size = pixels.fitted(module.spec, None, (1, 1, *options.size, 3), strict=False)[2:4]
        ways = {"": streaming.later_chunks(module, variables, size, options.chunk, device)}
        if options.tile and getattr(module, "halo", None):
            parts = bands.later_parts(module, variables, size, options.chunk, options.tile, device)
            ways |= {f" in tiles of {options.tile[0]}x{options.tile[1]}": parts}
        for way, programs in ways.items():
            needed = {"encode": [(0, 0)], "decode": [(0, 0)]}
            for method, *_, lowered, history in programs:
                needed[method].append((traffic.peak_bytes(lowered.compile(options_of_compiler)), history))
            numbers = [f"{count / 2**30:.1f}" for both in needed.values() for count in max(both)]
            print(f"| {name} | {options.chunk}x{size[0]}x{size[1]}{way} | {' | '.join(numbers)} |", flush=True)


def kept(config_name, options, value):
    """Bytes that the model of a recipe keeps from its forward to its backward pass; nothing is compiled."""
    config = importlib.import_module(f"configs.{config_name}").get_config()
    config.model.update({"remat": value})
    config.precision = options.dtype
    module = build.recipe(dryrun.compilable(to_dict(config))).model
    variables = registry.abstract_variables(module)
    rest = {name: leaves for name, leaves in variables.items() if name != "params"}

    def run(params, rest, x, key):
        rngs = {"bottleneck": key, "dropout": key}
        return module.apply(rest | {"params": params}, x, train=True, rngs=rngs, mutable=list(rest))

    batch = jax.ShapeDtypeStruct(shape_of(module, options), jnp.float32)
    return traffic.kept_bytes(run, variables["params"], rest, batch, jax.random.key(0))


def remat(options):
    """One line per value: MiB kept for the backward pass, MiB of the whole step, milliseconds, operations."""
    print(f"configs/{options.config}.py\n\n| remat | kept for the backward pass, MiB | MiB | ms | GFLOP | compile s |")
    print("|---|---|---|---|---|---|")
    for text in options.values:
        value = {"True": True, "False": False}.get(text, text)
        line = f"| {value} | {kept(options.config, options, value) / 2**20:.0f} |"
        if options.only_kept:
            print(line, flush=True)
            continue
        for _, _, run, program, took, count in train(options.config, options, {"remat": value}):
            if options.rounds:
                jax.block_until_ready(run())
            median = statistics.median([seconds(run) for _ in range(options.rounds)] or [0.0])
            mib = traffic.peak_bytes(program) / 2**20
            print(f"{line} {mib:.0f} | {1e3 * median:.0f} | {count / 1e9:.0f} | {took:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stream", "remat"))
    parser.add_argument("--models", nargs="+", default=STREAMED)
    parser.add_argument("--config", default="kl_f8")
    parser.add_argument("--values", nargs="+", default=("False", "True"))
    parser.add_argument("--size", type=int, nargs=2, help="height and width; default 1080 1920, 128 128")
    parser.add_argument("--chunk", type=int, default=8, help="frames")
    parser.add_argument("--tile", type=int, nargs=2, help="height and width of tiles in pixels, halo included")
    parser.add_argument("--tpu", help="compile for a TPU that need not be here, e.g. v5p:2x2x1; needs libtpu")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only_kept", action="store_true", help="compile nothing")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default bfloat16, float32")
    options = parser.parse_args()
    options.size = options.size or {"stream": (1080, 1920), "remat": (128, 128)}[options.what]
    options.dtype = options.dtype or {"stream": "bfloat16", "remat": "float32"}[options.what]
    {"stream": stream, "remat": remat}[options.what](options)


if __name__ == "__main__":
    main()
