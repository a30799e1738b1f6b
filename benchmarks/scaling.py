"""Weak scaling of a training step, as far as a CPU can show it: the same work for each of 1, 2, 4 and 8 devices.

    python benchmarks/scaling.py [--config configs/quickstart.py] [--set model.channels=16] [--stream image]
        [--size 64 64] [--frames 9] [--batch 4] [--axis data] [--devices 1 2 4 8] [--processes 2] [--steps 5]
        [--json out.json]

Every number of devices runs in a process of its own, as virtual devices of the CPU, and then two processes with one
device each, joined by `jax.distributed`. Along `data` and `fsdp` the batch grows with the devices, along `height`,
`width` and `time` the pixels do. All share the cores of the machine, so n devices cannot be faster than n times the
time of one: printed is how much slower they are. Columns:

    s, CPU s      of a step; by the clock (median), and of all cores (mean): user + system
    wall, CPU     time(n) / (n * time(1)) of both; below 1: one device alone left caches or cores unused. CPU time
                  hardly depends on what else the machine does
    unused        share of the cores' time in which the step did not run: it waited, or others had them
    collectives   operations that send, in a step, and MiB that a device receives by kind
    MiB           memory of a device

The last two are read from the compiled program, and are those of any machine with that mesh, but for what its compiler
does otherwise. System time of two processes is that of gloo, the library between processes of CPUs: its thread polls
the socket while data are on their way, for as long as other programs keep the cores from whoever should read them.
"""

import argparse
import ast
import importlib
import json
import os
import pathlib
import resource
import socket
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = "--xla_force_host_platform_device_count={} --xla_cpu_collective_call_terminate_timeout_seconds=600"
PIXELS = ("time", "height", "width")  # axes of a mesh that split the pixels, in their order


def load(options):
    """The config of ``configs/quickstart.py[:argument]`` with the changes that were asked for."""
    file, _, argument = options.config.partition(":")
    name = ".".join(pathlib.Path(file).resolve().relative_to(ROOT).with_suffix("").parts)
    config = importlib.import_module(name).get_config(*filter(None, [argument]))
    for change in options.set:
        field, _, value = change.partition("=")
        *places, last = field.split(".")
        part = config
        for place in places:
            part = part[place]
        part.update({last: ast.literal_eval(value)})
    return config


def on_mesh(config, options, devices):
    """The config of so many devices, and the shape of its batch."""
    name = options.stream or next(iter(config.data.streams))
    stream = config.data.streams[name]
    batch, clip = options.batch, [options.frames or stream.frames, *(options.size or stream.resolutions[0])]
    if options.axis in PIXELS:
        clip[PIXELS.index(options.axis)] *= devices
        config.mesh.update({"data": 1, "fsdp": 1, "context": devices, "split": options.axis})
    else:
        batch *= devices
        config.mesh.update({"data": 1, "fsdp": 1, "context": 1, options.axis: devices})
    stream.update({"frames": clip[0], "resolutions": (tuple(clip[1:]),), "batch_size": batch})
    config.data.streams = {name: stream}
    config.precision, config.accumulate = "float32", 1
    return config, (batch, *clip, 3)


def measure(options):
    """One process's share of one row of the table; runs in a process of its own."""
    sys.path.append(str(ROOT))
    import jax
    from training import Step
    from vistok.parallel import multihost, traffic

    joined = {"coordinator": options.coordinator, "processes": options.processes, "process": options.process}
    multihost.initialize(joined | {"mode": "manual" if options.processes > 1 else "off"})
    config, shape = on_mesh(load(options), options, jax.device_count())
    step = Step(config, lambda _: shape)
    jax.block_until_ready(step())  # sets up
    seconds, before = [], resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(options.steps):
        began = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - began)
    after, found = resource.getrusage(resource.RUSAGE_SELF), traffic.transfers(step.program)
    return {
        "processes": options.processes,
        "devices": jax.device_count(),
        "shape": shape,
        "seconds": statistics.median(seconds),
        "mean_seconds": statistics.mean(seconds),
        "user": (after.ru_utime - before.ru_utime) / options.steps,
        "system": (after.ru_stime - before.ru_stime) / options.steps,
        "collectives": sum(transfer.times for transfer in found),
        "sent": traffic.bytes_by_kind(found),
        "peak": traffic.peak_bytes(step.program),
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
    return parts[0] | {name: sum(part[name] for part in parts) for name in ("user", "system")}


HEADER = """\
| devices | processes | pixels | s | wall | CPU s | CPU | unused, % | collectives | MiB sent | MiB |
|---|---|---|---|---|---|---|---|---|---|---|"""


def report(found, one):
    """A line of the table; ``one`` is the first row."""
    work = found["devices"] / one["devices"]
    found["cpu"] = found["user"] + found["system"]
    found["wall_overhead"] = found["seconds"] / (work * one["seconds"])
    found["cpu_overhead"] = found["cpu"] / (work * one["cpu"])
    found["unused"] = 1 - found["cpu"] / (found["mean_seconds"] * len(os.sched_getaffinity(0)))
    sent = ", ".join(f"{kind} {size / 2**20:.2f}" for kind, size in sorted(found["sent"].items())) or "nothing"
    print(
        f"| {found['devices']} | {found['processes']} | {'x'.join(map(str, found['shape'][:-1]))} "
        f"| {found['seconds']:.3f} | {found['wall_overhead']:.2f} | {found['user']:.3f} + {found['system']:.3f} "
        f"| {found['cpu_overhead']:.2f} | {100 * found['unused']:.0f} | {found['collectives']} | {sent} "
        f"| {found['peak'] / 2**20:.1f} |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py", help="a file of configs/, with an :argument")
    parser.add_argument("--set", nargs="+", default=[], help="fields of it to change: name=value, as Python writes it")
    parser.add_argument("--stream", default="", help="of its data; the first one, unless told")
    parser.add_argument("--size", type=int, nargs=2, help="height and width of the pixels of a device")
    parser.add_argument("--frames", type=int, help="of a clip")
    parser.add_argument("--batch", type=int, default=4, help="items per device")
    parser.add_argument("--axis", choices=("data", "fsdp", *PIXELS), default="data", help="of the mesh, that grows")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--processes", type=int, default=2, help="of one device each, in the last row; 1: no such row")
    parser.add_argument("--steps", type=int, default=5, help="timed")
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
