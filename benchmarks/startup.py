"""From a command to its first step, and what the depth of a transformer costs its compiler.

    python benchmarks/startup.py runs [--configs quickstart:smoke kl_f8:smoke ...] [--steps 24] [--json out.json]
    python benchmarks/startup.py depth [--depths 4 8 16 32] [--width 256] [--size 64 64]

``runs`` starts train.py twice in new folders, with an empty compilation cache and with the one that the first start has
left. Seconds from the command to the end of the first step, imports included; the CPU time of all cores until then,
which hardly depends on what else the machine does (Linux); what the log says of compiling the step; then the share of
the time in which the devices waited for a batch, from the log's later lines.

``depth`` compiles the gradient of a vision transformer's reconstruction (ViTok, encoder and decoder as deep as each
other) with its layers scanned, as they are, and one after the other.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ("quickstart:smoke", "vqvae_imagenet:smoke", "kl_f8:smoke", "titok_l32_stage2:smoke", "cosmos_cv8x8x8:smoke")
LOG = 4  # steps per line


def cpu_seconds(process):
    """Of a running process and its threads."""
    stat = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def start(config, folder, cache, steps):
    """{"first", "cpu": seconds to the first step, "compiled": seconds, "wait": share of the time} of one run."""
    name, _, argument = config.partition(":")
    fields = {
        "steps": steps,
        "compilation_cache": cache,
        "log.every": LOG,
        "evaluation.every": 0,
        "evaluation.final_report": False,
        "checkpoint.every": 0,
        "data.held_out": "",
    }
    command = [sys.executable, "-u", "train.py", f"--config=configs/{name}.py{':' * bool(argument)}{argument}"]
    command += [f"--workdir={folder}", *(f"--config.{field}={value}" for field, value in fields.items())]
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    began, found, said = time.perf_counter(), {"compiled": 0.0}, []
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as run:
        for line in run.stdout:
            said.append(line)
            if "first" in found:
                continue
            if match := re.search(r"compiled the step .* in ([\d.]+) s", line):
                found["compiled"] += float(match[1])
            if "first step after" in line:
                found |= {"first": time.perf_counter() - began, "cpu": cpu_seconds(run)}
    if run.returncode:
        sys.exit("".join(said))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    later = [line["input_wait"] for line in lines if line["step"] > LOG and "input_wait" in line]
    return found | {"wait": statistics.mean(later)}


HEADER = """\
| config | cold: first step, s | CPU, s | compiling, s | warm: first step, s | CPU, s | compiling, s | wait, % |
|---|---|---|---|---|---|---|---|"""


def runs(options):
    print(HEADER, flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, config in enumerate(options.configs):
            place = pathlib.Path(folder) / str(number)
            cold, warm = (start(config, place / name, place / "cache", options.steps) for name in ("cold", "warm"))
            rows.append({"config": config, "cold": cold, "warm": warm})
            told = " | ".join(f"{run[name]:.1f}" for run in (cold, warm) for name in ("first", "cpu", "compiled"))
            print(f"| {config} | {told} | {50 * (cold['wait'] + warm['wait']):.2f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def compiling(model, depth, options):
    """(CPU seconds of tracing and lowering, of compiling; seconds of compiling) of a gradient."""
    import jax
    import jax.numpy as jnp

    from tokenizers import registry
    from tokenizers.parallel import platform

    sizes = (options.width, depth, options.width // 64)
    module = registry.build(model, latent_channels=16, patch=(1, 8, 8), encoder=sizes, decoder=sizes)
    variables = registry.abstract_variables(module)
    pixels = jax.ShapeDtypeStruct((1, *options.size, 3), jnp.float32)

    def loss(variables, x):
        latents = module.apply(variables, x, method="encode").latents
        return jnp.square(module.apply(variables, latents, method="decode") - x).mean()

    began = time.process_time()
    lowered = jax.jit(jax.grad(loss), compiler_options=platform.compiler_options()).lower(variables, pixels)
    traced, clock = time.process_time(), time.perf_counter()
    lowered.compile()
    return traced - began, time.process_time() - traced, time.perf_counter() - clock


def depth(options):
    sys.path.insert(0, str(ROOT))
    import jax
    from flax import linen

    jax.config.update("jax_enable_compilation_cache", False)
    scan = linen.scan
    print("| layers of each | | tracing, CPU s | compiling, CPU s | compiling, s |\n|---|---|---|---|---|")
    for layers in options.depths:
        for how, unroll in (("scanned", 1), ("one by one", layers)):
            linen.scan = functools.partial(scan, unroll=unroll)
            traced, compiled, seconds = compiling("vitok", layers, options)
            print(f"| {layers} | {how} | {traced:.1f} | {compiled:.1f} | {seconds:.1f} |", flush=True)
            jax.clear_caches()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("runs", "depth"))
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="files of configs/, with an :argument")
    parser.add_argument("--steps", type=int, default=24, help="of a run")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), help="height and width")
    parser.add_argument("--json", type=pathlib.Path, help="write the results there too")
    options = parser.parse_args()
    {"runs": runs, "depth": depth}[options.what](options)


if __name__ == "__main__":
    main()
