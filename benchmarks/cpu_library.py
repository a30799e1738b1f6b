"""What XLA's CPU library (YNNPACK) does to training: the quickstart's step with and without it, and its sums.

    python benchmarks/cpu_library.py [--rounds 6] [--seconds 30]

The first part times the step of the quickstart's images and clips, interleaved, with XLA's defaults and with
`tokenizers.parallel.platform.compiler_options`. The second adds up one broadcast array again and again while two other
processes keep the cores busy, and counts the different results.
"""

import argparse
import collections
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import quickstart  # noqa: E402
from tokenizers.parallel import mesh as meshes  # noqa: E402
from tokenizers.parallel import platform  # noqa: E402
from tokenizers.train import build  # noqa: E402
from tokenizers.train import config as configs  # noqa: E402
from tokenizers.train.step import make_step  # noqa: E402

OPTIONS = {"XLA's defaults": {}, "ours": platform.compiler_options()}
BUSY = """
import jax, jax.numpy as jnp
x, f = jnp.ones((512, 512)), jax.jit(lambda x: jnp.tanh(x @ x))
while True: x = f(x)
"""


def steps():
    """{(options, frames): a function that runs one step}."""
    config = configs.to_dict(quickstart.get_config())
    mesh = meshes.from_config(config["mesh"])
    recipe = build.recipe(config)
    with jax.set_mesh(mesh):
        state = build.initial_state(config, recipe, mesh)
        for stream in config["data"]["streams"].values():
            shape = (stream["batch_size"], stream["frames"], *stream["resolutions"][0], 3)
            pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            for name, options in OPTIONS.items():
                program = jax.jit(make_step(recipe.at(config["steps"])), compiler_options=options)
                compiled = program.lower(state, {}, {"pixels": pixels}).compile()
                yield (name, stream["frames"]), lambda run=compiled, pixels=pixels: run(state, {}, {"pixels": pixels})


def seconds(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def sums(options, limit: float) -> collections.Counter:
    x = jax.random.normal(jax.random.key(0), (3, 3, 128, 192))
    total = jax.jit(lambda x: jnp.sum(jnp.square(jnp.broadcast_to(x, (3, *x.shape)))), compiler_options=options)
    found, start = collections.Counter(), time.perf_counter()
    while time.perf_counter() - start < limit:
        found[float(total(x))] += 1
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    programs = dict(steps())
    best = {key: min(seconds(run) for _ in range(2)) for key, run in programs.items()}
    for _ in range(arguments.rounds):
        for key, run in programs.items():
            best[key] = min(best[key], seconds(run))
    for (name, frames), value in best.items():
        print(f"step of {frames} frame(s), {name}: {value:.3f} s")
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2)]
    try:
        for name, options in OPTIONS.items():
            found = sums(options, arguments.seconds)
            calls = sum(found.values())
            print(f"sums, {name}: {len(found)} different results, {calls - max(found.values())} of {calls} calls off")
    finally:
        for other in others:
            other.kill()


if __name__ == "__main__":
    main()
