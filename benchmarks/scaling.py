"""Weak scaling of a training step, as far as a CPU can show it: the same work for each of 1, 2, 4 and 8 devices.

    python benchmarks/scaling.py [--config configs/quickstart.py] [--stream image] [--batch 4] [--axis data]
        [--devices 1 2 4 8] [--processes 2] [--steps 5] [--json out.json]

Every number of devices runs in a process of its own, as virtual devices of the CPU, and then two processes with one
device each, joined by `jax.distributed`. They share the cores of the machine, so n devices cannot be faster than n
times the time of one: printed is how much slower they are. `overhead` is time(n) / (n * time(1)), and `CPU overhead`
the same of CPU time, which does not depend on what else the machine does. 1.0 is none; less means that one device alone
left cores or caches unused. What a step sends and the memory it needs are read from the compiled program, and are those
of any machine with that mesh, but for what its compiler does otherwise.
"""

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = "--xla_force_host_platform_device_count={} --xla_cpu_collective_call_terminate_timeout_seconds=600"


def load(path):
    """``configs/quickstart.py[:argument]``."""
    import importlib

    file, _, argument = path.partition(":")
    name = ".".join(pathlib.Path(file).resolve().relative_to(ROOT).with_suffix("").parts)
    return importlib.import_module(name).get_config(*filter(None, [argument]))


def measure(options):
    """One process's share of one row of the table; runs in a process of its own."""
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tokenizers.parallel import mesh as meshes
    from tokenizers.parallel import multihost, platform, traffic
    from tokenizers.train import build, dryrun
    from tokenizers.train.config import to_dict
    from tokenizers.train.step import make_step

    joined = {"coordinator": options.coordinator, "processes": options.processes, "process": options.process}
    multihost.initialize(joined | {"mode": "manual" if options.processes > 1 else "off"})
    config = load(options.config)
    config.precision = "float32"
    config = dryrun.compilable(to_dict(config))
    streams = config["data"]["streams"]
    name = options.stream or next(iter(streams))
    stream = streams[name] | {"batch_size": options.batch * jax.device_count()}
    config["data"]["streams"] = {name: stream}
    mesh = meshes.make_mesh(**{"data": 1, "fsdp": 1, options.axis: jax.device_count()})
    with jax.set_mesh(mesh):
        recipe = build.recipe(config)
        state = build.initial_state(config, recipe, mesh)
        networks = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), dict(recipe.networks))
        networks = jax.device_put(networks, meshes.replicated(mesh))
        shape = (stream["batch_size"], stream["frames"], *stream["resolutions"][0], 3)
        count, rng = meshes.batch_share(mesh)[1], np.random.default_rng(0)
        inputs = {
            key: meshes.global_batch(
                mesh, rng.integers(0, 200, (leaf.shape[0] // count, *leaf.shape[1:])).astype(leaf.dtype)
            )
            for key, leaf in recipe.inputs_of(shape).items()
        }
        last = recipe.at(config["steps"])
        program = platform.jit(make_step(last), donate_argnums=0, out_shardings=build.out_shardings(state, mesh))
        compiled = program.lower(state, networks, inputs).compile()
        seconds, cpu = [], []
        for _ in range(options.steps + 1):
            began, used = time.perf_counter(), time.process_time()
            state, metrics = compiled(state, networks, inputs)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - used)
    found = traffic.transfers(compiled)
    return {
        "processes": options.processes,
        "devices": jax.device_count(),
        "shape": shape,
        "seconds": statistics.median(seconds[1:]),  # the first one sets up
        "cpu_seconds": statistics.median(cpu[1:]),
        "sent": traffic.bytes_by_kind(found),
        "peak": traffic.peak_bytes(compiled),
    }


def row(options, devices, processes=1):
    """A row of the table, from the processes that it takes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = " ".join(filter(None, [FLAGS.format(devices // processes), os.environ.get("XLA_FLAGS")]))
    command = [sys.executable, __file__, *sys.argv[1:], "--coordinator", coordinator, "--processes", str(processes)]
    started = [
        subprocess.Popen([*command, "--process", str(i)], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"{devices} devices in {processes} processes failed; see above.")
    parts = [json.loads(output.splitlines()[-1]) for output in outputs]
    return parts[0] | {"cpu_seconds": sum(part["cpu_seconds"] for part in parts)}


HEADER = """\
| devices | processes | batch | s per step | overhead | CPU overhead | sent per device and step, MiB | MiB per device |
|---|---|---|---|---|---|---|---|"""


def report(found, one):
    """A line of the table; ``one`` is the first row."""
    for name in ("seconds", "cpu_seconds"):
        found[f"overhead_{name}"] = found[name] / (found["devices"] / one["devices"] * one[name])
    sent = ", ".join(f"{kind} {size / 2**20:.2f}" for kind, size in sorted(found["sent"].items())) or "nothing"
    print(
        f"| {found['devices']} | {found['processes']} | {found['shape'][0]} | {found['seconds']:.3f} "
        f"| {found['overhead_seconds']:.2f} | {found['overhead_cpu_seconds']:.2f} | {sent} "
        f"| {found['peak'] / 2**20:.1f} |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py", help="a file of configs/, with an :argument")
    parser.add_argument("--stream", default="", help="of its data; the first one, unless told")
    parser.add_argument("--batch", type=int, default=4, help="items per device")
    parser.add_argument("--axis", choices=("data", "fsdp"), default="data", help="of the mesh, that grows")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--processes", type=int, default=2, help="of one device each, in the last row; 1: no such row")
    parser.add_argument("--steps", type=int, default=5, help="timed; the median counts")
    parser.add_argument("--json", type=pathlib.Path, help="write the results there too")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is not None:
        print(json.dumps(measure(options)))
        return
    print(HEADER, flush=True)
    rows = []
    plan = [(count, 1) for count in options.devices] + [(options.processes,) * 2] * (options.processes > 1)
    for devices, processes in plan:
        rows.append(row(options, devices, processes))
        report(rows[-1], rows[0])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
