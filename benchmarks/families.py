"""Every family at its released size: time, memory, compile time and arithmetic of encoding, decoding and training.

    python benchmarks/families.py [--families kl-vae cosmos ...] [--parts encode decode reconstruct train]
        [--size 256 256] [--frames 17] [--batch 1] [--dtype float32] [--rounds 3] [--json out.json]

Random weights: speed does not depend on them. Training is the whole step of the family's published recipe (generator,
discriminator where it has one, adaptive weight, moving average, optimizers) with every part switched on, at the size
asked for; frozen networks have random weights too. Columns:

    ms          median over rounds, without transfers
    frames/s    of pixels
    MiB         peak of one device, from the compiled program: arguments, results, what lies between
    compile     seconds
    GFLOP       of matrix products and convolutions, counted in the jaxpr; two per multiplication
    GFLOP/s, %  achieved, and as a share of a square matrix product of the same dtype on this machine
    GB          bytes that the compiled program's operations read and write

Video families get ``--frames`` frames, or the next number that they take.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import Step, compiled  # noqa: E402
from vistok.parallel import platform, traffic  # noqa: E402
from vistok.pixels import fitted  # noqa: E402

import vistok  # noqa: E402

# Family: (released variant, config of its recipe).
FAMILIES = {
    "vq-vae": ("vqvae-f4-512", "vqvae_imagenet"),
    "vq-vae-2": ("vqvae2-f4-f8-512", "vqvae2_imagenet"),
    "dvae": ("dvae-dalle-f8-8192", "dvae_dalle"),
    "vqgan": ("vqgan-imagenet-f16-1024", "vqgan_imagenet_f16_1024"),
    "maskgit-vqgan": ("maskgit-vqgan-imagenet256-f16-1024", "maskgit_vqgan"),
    "kl-vae": ("kl-f8", "kl_f8"),
    "va-vae": ("vavae-f16d32-dinov2", "vavae_f16d32"),
    "eq-vae": ("eq-vae", "eqvae_f8"),
    "flux": ("flux1-vae", None),
    "titok": ("titok-l32", "titok_l32_stage2"),
    "omnitokenizer": ("omnitokenizer-imagenet-k600", "omnitokenizer_stage2"),
    "c-vivit": ("cvivit-phenaki", "cvivit"),
    "magvit": ("magvit-3dvq-b-1024", "magvit_3dvq"),
    "magvit-v2": ("open-magvit2-imagenet-256-262144", "open_magvit2_imagenet_256"),
    "magvit-v2-video": ("magvit2-video-causal-128-262144", "open_magvit2_video_128"),
    "ibq": ("ibq-imagenet-16384", "ibq_imagenet_16384"),
    "vitok": ("vitok-s-b-16", "vitok_image"),
    "vidtok": ("vidtok-kl-causal-488-4chn", "vidtok_kl_causal_488_4chn"),
    "cosmos-image": ("cosmos-ci8x8", "cosmos_ci8x8"),
    "cosmos": ("cosmos-1.0-cv8x8x8", "cosmos_cv8x8x8"),
    "vtp": ("vtp-large-f16d64", "vtp_large"),
}
PARTS = ("encode", "decode", "reconstruct", "train")


@dataclasses.dataclass(frozen=True)
class Row:
    family: str
    part: str
    shape: tuple[int, ...]
    dtype: str
    milliseconds: float
    frames_per_second: float
    milliseconds_per_frame: float
    peak_mib: float
    compile_seconds: float
    gflop: float
    gflop_per_second: float
    share_of_ceiling: float
    gigabytes: float


def ceiling(dtype, rounds):
    """Operations per second of a square matrix product."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a, compiler_options=platform.compiler_options())
    jax.block_until_ready(product(a))
    return 2 * side**3 / statistics.median(seconds(product, a) for _ in range(max(rounds, 5)))


def seconds(run, *args):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


def shape_of(module, options):
    """``(B, [T,] H, W, 3)`` of what the network takes, nearest to what is asked for."""
    video = (options.frames,) if module.spec.video else ()
    shape = (options.batch, *video, *options.size, 3)
    return fitted(module.spec, getattr(module, "input_size", None), shape, strict=False)


def forward(variant, parts, options):
    """(part, shape, timed function, program, compile seconds, operations) of encoding and decoding."""
    tok = vistok.create(variant)
    tok = tok if options.dtype == "float32" else tok.cast(options.dtype)
    shape = shape_of(tok.module, options)
    pixels = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, shape), jnp.float32)

    def encode(variables, x):
        return tok.module.apply(variables, x, method="encode").latents

    def decode(variables, z):
        return tok.module.apply(variables, z, method="decode")

    def reconstruct(variables, x):
        return decode(variables, encode(variables, x))

    encoder = compiled(encode, tok.variables, pixels)
    args = dict.fromkeys(("encode", "reconstruct"), (tok.variables, pixels))
    args["decode"] = (tok.variables, encoder[0](tok.variables, pixels))
    functions = {"decode": decode, "reconstruct": reconstruct}
    for part in parts:
        program, took, count = encoder if part == "encode" else compiled(functions[part], *args[part])
        yield part, shape, functools.partial(program, *args[part]), program, took, count


def train(config_name, options, model=()):
    """The same of a training step; ``model`` are fields of ``config.model`` to change."""
    config = importlib.import_module(f"configs.{config_name}").get_config()
    config.model.update(dict(model))
    for stream in config.data.streams.values():  # what a discriminator is made for
        stream.resolutions = (tuple(options.size),)
    config.precision = options.dtype
    config.accumulate = 1
    config.mesh.update({"data": 1, "fsdp": 1, "context": 1})
    if "pretraining" in config:  # each picture serves every objective; the recipe's shares need a larger batch
        config.pretraining.distillation.masks.group = 2 * options.batch
        config.pretraining.distillation.every = config.pretraining.reconstruction.every = 1

    def shape(module):
        fitting = shape_of(module, options)
        return fitting if len(fitting) == 5 else (fitting[0], 1, *fitting[1:])

    step = Step(config, shape)
    yield "train", step.shape, step, step.program, step.compile_seconds, step.operations


def rows(family, options, peak):
    variant, config = FAMILIES[family]
    parts = [part for part in options.parts if part != "train"]
    sources = [forward(variant, parts, options)] if parts else []
    sources += [train(config, options)] if "train" in options.parts and config else []
    for source in sources:
        for part, shape, run, program, took, count in source:
            jax.block_until_ready(run())
            median = statistics.median(seconds(run) for _ in range(options.rounds))
            frames = shape[0] * (shape[1] if len(shape) == 5 else 1)
            yield Row(
                family=family,
                part=part,
                shape=shape,
                dtype=options.dtype,
                milliseconds=1e3 * median,
                frames_per_second=frames / median,
                milliseconds_per_frame=1e3 * median / frames,
                peak_mib=traffic.peak_bytes(program) / 2**20,
                compile_seconds=took,
                gflop=count / 1e9,
                gflop_per_second=count / median / 1e9,
                share_of_ceiling=count / median / peak,
                gigabytes=program.cost_analysis().get("bytes accessed", 0) / 1e9,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), help="height and width")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=pathlib.Path, help="write the results there too")
    options = parser.parse_args()
    peak = ceiling(options.dtype, options.rounds)
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores; matrix products reach {peak / 1e9:.0f} GFLOP/s "
        f"({options.dtype})\n\n| family | part | shape | ms | frames/s | MiB | compile s | GFLOP | GFLOP/s | % | GB |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )
    found = []
    for family in options.families:
        for row in rows(family, options, peak):
            found.append(dataclasses.asdict(row))
            print(
                f"| {row.family} | {row.part} | {'x'.join(map(str, row.shape))} | {row.milliseconds:.0f} | "
                f"{row.frames_per_second:.1f} | {row.peak_mib:.0f} | {row.compile_seconds:.0f} | {row.gflop:.0f} | "
                f"{row.gflop_per_second:.0f} | {100 * row.share_of_ceiling:.0f} | {row.gigabytes:.1f} |",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))
        jax.clear_caches()


if __name__ == "__main__":
    main()
