"""Times XLA's own convolution against the lowering that `tokenizers.nn.conv` picks, interleaved.

    python benchmarks/conv_lowering.py [--rounds 5] [--small]

Prints milliseconds, the minimum over rounds, and native / picked: of the forward pass, of the gradient of the kernel
alone, and of forward and backward pass.
"""

import argparse
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tokenizers.nn.conv import convolve  # noqa: E402
from tokenizers.parallel import platform  # noqa: E402

# Kernel ([time,] height, width), its channels in and out, input ([frames,] height, width). Of one channel in, every
# channel is convolved alone.
CASES = [
    ((1, 3, 3), 128, 128, (5, 64, 64)),
    ((1, 3, 3), 512, 512, (5, 16, 16)),
    ((3, 1, 1), 128, 128, (5, 64, 64)),
    ((3, 1, 1), 512, 512, (5, 16, 16)),
    ((3, 3, 3), 3, 128, (5, 64, 64)),
    ((3, 3, 3), 32, 32, (5, 64, 64)),
    ((3, 3, 3), 128, 128, (5, 64, 64)),
    ((3, 3, 3), 512, 512, (5, 16, 16)),
    ((3, 3, 3), 128, 3, (5, 64, 64)),
    ((3, 3), 128, 128, (128, 128)),
    ((3, 3), 256, 256, (64, 64)),
    ((3, 3), 512, 512, (16, 16)),
    ((4, 4), 64, 128, (64, 64)),
    ((4, 4), 1, 512, (64, 64)),
    ((7, 7), 1, 96, (56, 56)),
]
PASSES = ("forward", "kernel", "both")


def programs(kernel_size, groups, part):
    *time, _, _ = kernel_size
    pads = (*((size - 1, 0) for size in time), *((size // 2, size // 2) for size in kernel_size[-2:]))

    def forward(x, kernel, lowering):
        return convolve(x, kernel, padding=pads, groups=groups, lowering=lowering)

    def of_kernel(x, kernel, lowering):
        return jax.grad(lambda kernel: forward(x, kernel, lowering).sum())(kernel)

    def both(x, kernel, lowering):
        y, pull = jax.vjp(functools.partial(forward, lowering=lowering), x, kernel)
        return y, pull(y)

    function = {"forward": forward, "kernel": of_kernel, "both": both}[part]
    return {name: platform.jit(functools.partial(function, lowering=name)) for name in ("native", "auto")}


def milliseconds(run, *args):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return 1e3 * (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a quarter of the height and width")
    options = parser.parse_args()
    print(f"platform {jax.default_backend()}, ms, minimum of {options.rounds} interleaved rounds")
    print(f"{'kernel':>8} {'in':>4} {'out':>4} {'pass':>8} {'native':>9} {'picked':>9} {'ratio':>6}")
    for kernel_size, inputs, outputs, (*t, h, w) in CASES:
        shrink = 4 if options.small else 1
        groups = outputs if inputs == 1 else 1
        x = jnp.ones((1, *t, h // shrink, w // shrink, groups * inputs))
        kernel = jnp.ones((*kernel_size, inputs, outputs))
        for label in PASSES:
            runs = programs(kernel_size, groups, label)
            best = {name: float("inf") for name in runs}
            for run in runs.values():
                jax.block_until_ready(run(x, kernel))
            for _ in range(options.rounds):
                for name, run in runs.items():
                    best[name] = min(best[name], milliseconds(run, x, kernel))
            size = "x".join(map(str, kernel_size))
            ratio = best["native"] / max(best["auto"], 1e-6)
            print(
                f"{size:>8} {inputs:>4} {outputs:>4} {label:>8} {best['native']:9.1f} {best['auto']:9.1f} {ratio:6.2f}"
            )


if __name__ == "__main__":
    main()
