"""Where the time of a family goes, operation by operation of its compiled program, as XLA's profiler sees it.

    python benchmarks/profile_ops.py --family kl-vae --part train [--size 128 128] [--frames 9] [--batch 1] [--top 20]

One table by kind (convolutions and matrix products forward and backward, reductions, fused elementwise operations,
copies), then the slowest operations with their result and the line of the model they come from. Operations that run
at the same time count twice, so shares are of the sum, which is printed next to the time of the clock.
"""

import argparse
import collections
import glob
import re
import tempfile

import jax
from families import FAMILIES, forward, seconds, train

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\S+(?:, \S+)*?) ([\w-]+)\(")
_SOURCE = re.compile(r'op_name="([^"]*)"')
# They contain others, which are measured on their own.
CONTAINERS = ("while", "call", "conditional")


def instructions(program):
    """``{name: (kind, result, where it comes from)}`` of the compiled program."""
    found = {}
    for line in program.as_text().splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            name, result, opcode = match.groups()
            source = _SOURCE.search(line)
            found[name] = (opcode, result.split("{")[0], source[1] if source else "")
    return found


def kind(opcode, source):
    if opcode in ("convolution", "dot"):
        return f"{opcode}, {'backward' if 'transpose(' in source else 'forward'}"
    return opcode


def nanoseconds(run):
    """``{operation: time}`` of one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
        spent = collections.Counter()
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op")
                    if operation and not event.name.startswith("end: "):
                        spent[operation] += event.duration_ns
    return spent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="kl-vae", choices=list(FAMILIES))
    parser.add_argument("--part", default="train", choices=("encode", "decode", "reconstruct", "train"))
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128))
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--top", type=int, default=20)
    options = parser.parse_args()
    variant, config = FAMILIES[options.family]
    source = train(config, options) if options.part == "train" else forward(variant, [options.part], options)
    ((_, shape, run, program, _, count),) = source
    jax.block_until_ready(run())
    clock = seconds(run)
    spent, known = nanoseconds(run), instructions(program)
    spent = {name: time for name, time in spent.items() if known.get(name, ("?",))[0] not in CONTAINERS}
    total = sum(spent.values())
    print(f"{options.family} {options.part} {'x'.join(map(str, shape))}: {1e3 * clock:.0f} ms, {count / 1e9:.0f} GFLOP")
    print(f"operations together {total / 1e6:.0f} ms\n\n| kind | ms | % |\n|---|---|---|")
    kinds = collections.Counter()
    for name, time in spent.items():
        opcode, _, where = known.get(name, ("unknown", "", ""))
        kinds[kind(opcode, where)] += time
    for name, time in kinds.most_common():
        print(f"| {name} | {time / 1e6:.0f} | {100 * time / total:.1f} |")
    print("\n| ms | operation | result | source |\n|---|---|---|---|")
    for name, time in collections.Counter(spent).most_common(options.top):
        _, result, where = known.get(name, ("", "", ""))
        print(f"| {time / 1e6:.1f} | {name} | {result} | {where} |")


if __name__ == "__main__":
    main()
