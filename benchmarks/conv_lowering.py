"""Times XLA's own 3D convolution against the lowering that `tokenizers.nn.conv` picks, interleaved.

    python benchmarks/conv_lowering.py [--rounds 5] [--small]

Prints process CPU time (other jobs on the machine change it least), the minimum over rounds, and native / picked.
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

# Kernel (time, height, width), channels in and out, input (frames, height, width).
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
]


def programs(kernel_size, gradient):
    pads = ((kernel_size[0] - 1, 0), *((size // 2, size // 2) for size in kernel_size[1:]))

    def forward(x, kernel, lowering):
        return convolve(x, kernel, padding=pads, lowering=lowering)

    def forward_and_backward(x, kernel, lowering):
        y, pull = jax.vjp(functools.partial(forward, lowering=lowering), x, kernel)
        return y, pull(y)

    function = forward_and_backward if gradient else forward
    return {name: jax.jit(functools.partial(function, lowering=name)) for name in ("native", "auto")}


def milliseconds(run, *args):
    start = time.process_time()
    jax.block_until_ready(run(*args))
    return 1e3 * (time.process_time() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a quarter of the height and width")
    options = parser.parse_args()
    print(f"platform {jax.default_backend()}, CPU ms, minimum of {options.rounds} interleaved rounds")
    print(f"{'kernel':>8} {'in':>4} {'out':>4} {'pass':>8} {'native':>9} {'picked':>9} {'ratio':>6}")
    for kernel_size, inputs, outputs, (t, h, w) in CASES:
        shrink = 4 if options.small else 1
        x = jnp.ones((1, t, h // shrink, w // shrink, inputs))
        kernel = jnp.ones((*kernel_size, inputs, outputs))
        for gradient in (False, True):
            runs = programs(kernel_size, gradient)
            best = {name: float("inf") for name in runs}
            for run in runs.values():
                jax.block_until_ready(run(x, kernel))
            for _ in range(options.rounds):
                for name, run in runs.items():
                    best[name] = min(best[name], milliseconds(run, x, kernel))
            size, label = "x".join(map(str, kernel_size)), "fwd+bwd" if gradient else "fwd"
            ratio = best["native"] / max(best["auto"], 1e-6)
            print(
                f"{size:>8} {inputs:>4} {outputs:>4} {label:>8} {best['native']:9.1f} {best['auto']:9.1f} {ratio:6.2f}"
            )


if __name__ == "__main__":
    main()
