"""Next to PyTorch, side by side: same machine, same run, same dtype, same number of threads.

    pip install torch diffusers dall-e taming-transformers-rom1504 phenaki-pytorch opencv-python-headless \
        vector-quantize-pytorch
    python benchmarks/pytorch.py [--cases kl-f8 cosmos-cv8x8x8] [--parts encode decode train] [--size 256 256]
        [--frames 17] [--rounds 5] [--dtype float32] [--compile] [--json out.json]

Every round runs each PyTorch mode (eager, channels last, with --compile torch.compile) and ours, one after the other,
each twice, of which the second counts. Printed are the median time of each and the median over rounds of (best PyTorch
mode / ours): above 1, ours is faster. Where the weights can be converted both sides have the same, and the largest
difference of the results is printed; otherwise both have random weights, on which speed does not depend. Training
(`torch_training.py`) is VQGAN's step on both sides: L1, PatchGAN with hinge loss, adaptive weight by the gradients of
the last layer, two Adams.
"""

import argparse
import copy
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks share a GPU's memory
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))  # behind Hugging Face's package `tokenizers`

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch_training  # noqa: E402
from torch_cases import CASES  # noqa: E402
from vistok.parallel import platform  # noqa: E402
from vistok.quantize.fsq import FSQ  # noqa: E402
from vistok.quantize.lfq import LFQ  # noqa: E402
from vistok.quantize.vq import VectorQuantizer  # noqa: E402

DTYPES = ("float32", "bfloat16")


def theirs_modes(pair, dtype, compiled):
    """``{mode: {part: function of a tensor}}`` and the device."""
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    model = pair.theirs.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)

    def mode(model, layout, wrap=lambda function: function):
        def run(function, x):
            with torch.inference_mode():
                y = function(model, x.contiguous(memory_format=layout) if layout else x)
                if device == "cuda":
                    torch.cuda.synchronize()
                return y

        return {name: functools.partial(run, wrap(function)) for name, function in pair.parts.items()}

    modes = {"eager": mode(model, None)}
    if not any(p.ndim == 5 for p in model.parameters()):
        modes["channels last"] = mode(copy.deepcopy(model).to(memory_format=torch.channels_last), torch.channels_last)
    if compiled:
        modes["compiled"] = mode(model, None, torch.compile)
    return modes, device


def to_torch(x, device, dtype):
    import torch

    return torch.from_numpy(np.moveaxis(np.asarray(x, np.float32), -1, 1).copy()).to(device, getattr(torch, dtype))


def from_torch(y):
    return np.moveaxis(y.float().cpu().numpy(), 1, -1)


def untraced(function, x):
    """Calls it and drops the result, a tensor, which is no array of JAX."""
    function(x)


def interleaved(runs, rounds):
    """``{name: seconds of each round}`` of functions, which take turns.

    Each is called twice in its turn, and the second call counts: steps and batches come one after another. The first
    one pays for memory that was given back to the system meanwhile, in a virtual machine up to a fifth of its time.
    """
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            jax.block_until_ready(run())
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return times


def summary(case, part, shape, dtype, times):
    """Medians, and the median over rounds of the ratio to the best of theirs in that round."""
    theirs = [name for name in times if name != "ours"]
    ratios = [min(times[name][i] for name in theirs) / ours for i, ours in enumerate(times["ours"])]
    gpu = jax.default_backend() == "gpu"
    return {
        "case": case,
        "part": part,
        "shape": shape,
        "dtype": dtype,
        "device": jax.devices()[0].device_kind if gpu else f"cpu, {os.cpu_count()} cores",
        "milliseconds": {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()},
        "ratio": statistics.median(ratios),
    }


def forward(name, options):
    """Encoding and decoding."""
    pair = CASES[name][1](options.size)
    ours = pair.ours if options.dtype == "float32" else pair.ours.cast(options.dtype)
    shape = (options.batch, *((options.frames,) if ours.spec.video else ()), *options.size, 3)
    pixels = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    latents = jax.block_until_ready(ours.encode(pixels).latents)
    # On the device already: what is timed is the network.
    parts = {"encode": (lambda x: ours.encode(x).latents, jnp.asarray(pixels)), "decode": (ours.decode, latents)}
    modes, device = theirs_modes(pair, options.dtype, options.compile)
    for part in (part for part in parts if part in options.parts):
        run, x = parts[part]
        tensor = to_torch(x, device, options.dtype)
        outputs = {mode: from_torch(functions[part](tensor)) for mode, functions in modes.items()}
        expected = np.asarray(run(x), np.float32)
        runs = {mode: functools.partial(untraced, functions[part], tensor) for mode, functions in modes.items()}
        times = interleaved(runs | {"ours": functools.partial(run, x)}, options.rounds)
        result = summary(name, part, shape, options.dtype, times)
        if pair.same and part == "encode" and ours.spec.codebook_size:
            other = (np.abs(outputs["eager"] - expected) > 1e-3).any(-1)
            result["note"] = (
                f"{other.mean():.2%} of the codes differ"  # of random weights: codes are close to each other
            )
        elif pair.same:
            apart = np.linalg.norm(outputs["eager"] - expected) / np.linalg.norm(expected)
            result["note"] = f"results differ by {apart:.1e} (relative L2)"
        yield result


def train(name, options):
    """One step of the generator and one of the discriminator."""
    pair = CASES[name][1](options.size)
    shape = (options.batch, 1, *options.size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    runs = torch_training.steps(pair.theirs, name, pixels, options.dtype)
    runs["ours"] = torch_training.ours(name, pixels, options.dtype)
    yield summary(name, "train", shape, options.dtype, interleaved(runs, options.rounds))


QUANTIZERS = {
    "vq 1024x256": (
        lambda v: v.VectorQuantize(dim=256, codebook_size=1024),
        lambda: VectorQuantizer(codebook_size=1024, code_dim=256),
        256,
    ),
    "vq 16384x8": (
        lambda v: v.VectorQuantize(dim=8, codebook_size=16384),
        lambda: VectorQuantizer(codebook_size=16384, code_dim=8),
        8,
    ),
    "fsq 64000": (lambda v: v.FSQ([8, 8, 8, 5, 5, 5]), lambda: FSQ((8, 8, 8, 5, 5, 5)), 6),
    "lfq 2^18": (lambda v: v.LFQ(dim=18, codebook_size=2**18), lambda: LFQ(18), 18),
}


def quantizers(options):
    """The bottlenecks alone, at evaluation, on a batch of 16 grids of 32x32 vectors."""
    import torch
    import vector_quantize_pytorch

    gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    for name, (theirs, ours, width) in QUANTIZERS.items():
        z = np.random.default_rng(0).normal(size=(16, 1024, width)).astype(np.float32)
        module, tensor = theirs(vector_quantize_pytorch).eval(), torch.from_numpy(z)
        module, tensor = (module.cuda(), tensor.cuda()) if gpu else (module, tensor)
        bottleneck, x = ours(), jnp.asarray(z)
        variables = bottleneck.init(jax.random.key(0), x[:1])
        run = jax.jit(lambda v, x, b=bottleneck: b.apply(v, x).indices, compiler_options=platform.compiler_options())

        def eager(module=module, tensor=tensor):
            with torch.inference_mode():
                module(tensor)
                if gpu:
                    torch.cuda.synchronize()

        runs = {"eager": eager, "ours": functools.partial(run, variables, x)}
        yield summary(name, "quantize", z.shape, "float32", interleaved(runs, options.rounds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [*CASES, "quantizers"]
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases)
    parser.add_argument("--parts", nargs="+", default=("encode", "decode"), choices=("encode", "decode", "train"))
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), help="height and width")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--json", type=pathlib.Path, help="write the results there too")
    options = parser.parse_args()
    trained = torch_training.RECIPES
    if "train" in options.parts and not {*options.cases} <= {*trained}:
        parser.error(f"--parts train is there for {' and '.join(trained)} alone: say --cases {' '.join(trained)}")
    wanted = {name: package for name, (package, _) in CASES.items()} | {"quantizers": "vector_quantize_pytorch"}
    missing = [name for name in {"torch", *map(wanted.get, options.cases)} if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"these cases need {' and '.join(sorted(missing))}: see the top of this file")
    import torch

    torch.set_num_threads(os.cpu_count())
    found = []
    for name in options.cases:
        sources = [quantizers(options)] if name == "quantizers" else []
        if name in CASES and {"encode", "decode"} & {*options.parts}:
            sources.append(forward(name, options))
        if "train" in options.parts:
            sources.append(train(name, options))
        for result in itertools.chain(*sources):
            found.append(result)
            times = ", ".join(f"{mode} {value:.4g}" for mode, value in result["milliseconds"].items())
            note = f"; {result['note']}" if "note" in result else ""
            shape = "x".join(map(str, result["shape"]))
            print(
                f"{result['case']} {result['part']} {shape} {options.dtype} on {result['device']}: ms {times}; "
                f"ratio {result['ratio']:.2f}{note}",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
