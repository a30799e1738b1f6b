"""Encoding and decoding next to PyTorch, side by side: same machine, same run, same dtype, same number of threads.

    pip install torch diffusers
    python benchmarks/pytorch.py [--cases kl-f8 cosmos-cv8x8x8] [--size 256 256] [--frames 9] [--rounds 5]
        [--dtype float32] [--compile] [--json out.json]

Every round runs each PyTorch mode (eager, channels last, with --compile torch.compile) and ours once, one after the
other; printed are the median time of each and the median over rounds of (best PyTorch mode / ours): above 1, ours is
faster. Where the weights can be converted both sides have the same, and the largest difference of the results is
printed; otherwise both have random weights, on which speed does not depend.
"""

import argparse
import functools
import importlib.util
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

import vistok  # noqa: E402

DTYPES = ("float32", "bfloat16")


def kl_f8():
    """Stable Diffusion's autoencoder, the same weights on both sides."""
    import diffusers

    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    config = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    state = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    ours = vistok.from_official("ldm_kl", {"_class_name": "AutoencoderKL", **config}, state)
    return theirs, ours, True


def cosmos_cv8x8x8():
    """Cosmos' continuous video tokenizer; diffusers has other names for its weights, so both are random."""
    import diffusers

    theirs = diffusers.AutoencoderKLCosmos(
        encoder_block_out_channels=(128, 256, 512, 512),
        decode_block_out_channels=(256, 512, 512, 512),
        temporal_compression_ratio=8,
        spatial_compression_ratio=8,
    )
    return theirs, vistok.create("cosmos-1.0-cv8x8x8"), False


CASES = {"kl-f8": kl_f8, "cosmos-cv8x8x8": cosmos_cv8x8x8}


def cast(tok, dtype):
    return tok if dtype == "float32" else tok.cast(dtype)


def theirs_modes(model, dtype, compiled):
    """``{name: (encode, decode)}``, functions of a tensor that give the mode of the posterior and the pixels."""
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)

    def encode(model, x):
        return model.encode(x).latent_dist.mode()

    def decode(model, z):
        return model.decode(z).sample

    def mode(model, layout, wrap=lambda function: function):
        def run(function, x):
            with torch.inference_mode():
                y = function(model, x.contiguous(memory_format=layout) if layout else x)
                if device == "cuda":
                    torch.cuda.synchronize()
                return y

        return tuple(functools.partial(run, wrap(function)) for function in (encode, decode))

    modes = {"eager": mode(model, None)}
    if not any(p.ndim == 5 for p in model.parameters()):
        import copy

        modes["channels last"] = mode(copy.deepcopy(model).to(memory_format=torch.channels_last), torch.channels_last)
    if compiled:
        modes["compiled"] = mode(model, None, torch.compile)
    return modes, device


def to_torch(x, device, dtype):
    import torch

    return torch.from_numpy(np.moveaxis(np.asarray(x, np.float32), -1, 1).copy()).to(device, getattr(torch, dtype))


def from_torch(y):
    return np.moveaxis(y.float().cpu().numpy(), 1, -1)


def seconds(run, x):
    start = time.perf_counter()
    jax.block_until_ready(run(x))
    return time.perf_counter() - start


def measure(name, options):
    theirs, ours, same = CASES[name]()
    ours = cast(ours, options.dtype)
    video = ours.spec.video
    shape = (options.batch, *((options.frames,) if video else ()), *options.size, 3)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, shape).astype(np.float32)
    start = time.perf_counter()
    latents = jax.block_until_ready(ours.encode(pixels).latents)
    restored = jax.block_until_ready(ours.decode(latents))
    compiling = time.perf_counter() - start
    # In their own dtype, on the device already: what is timed is the network.
    inputs = jnp.asarray(pixels), jnp.asarray(latents)
    parts = {"encode": (lambda x: ours.encode(x).latents, inputs[0]), "decode": (ours.decode, inputs[1])}
    modes, device = theirs_modes(theirs, options.dtype, options.compile)
    results = []
    for index, (part, (run, x)) in enumerate(parts.items()):
        tensor = to_torch(x, device, options.dtype)
        outputs = {mode: from_torch(functions[index](tensor)) for mode, functions in modes.items()}
        expected = np.asarray((latents, restored)[index], np.float32)
        times = {mode: [] for mode in (*modes, "ours")}
        for _ in range(options.rounds):
            for mode, functions in modes.items():
                times[mode].append(seconds(lambda y, f=functions[index]: (f(y), None)[1], tensor))
            times["ours"].append(seconds(run, x))
        ratios = [min(times[mode][i] for mode in modes) / times["ours"][i] for i in range(options.rounds)]
        result = {
            "case": name,
            "part": part,
            "shape": shape,
            "dtype": options.dtype,
            "device": jax.devices()[0].device_kind if device == "cuda" else f"cpu, {os.cpu_count()} cores",
            "milliseconds": {mode: 1e3 * statistics.median(t) for mode, t in times.items()},
            "ratio": statistics.median(ratios),
            "compile_seconds": compiling,
        }
        if same:
            apart = np.linalg.norm(outputs["eager"] - expected) / np.linalg.norm(expected)
            result["relative_difference"] = float(apart)
        results.append(result)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), help="height and width")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--json", type=pathlib.Path, help="write the results there too")
    options = parser.parse_args()
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"this comparison needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    import torch

    torch.set_num_threads(os.cpu_count())
    found = []
    for name in options.cases:
        for result in measure(name, options):
            found.append(result)
            times = ", ".join(f"{mode} {value:.0f}" for mode, value in result["milliseconds"].items())
            apart = result.get("relative_difference")
            note = "" if apart is None else f"; results differ by {apart:.1e} (relative L2)"
            print(
                f"{name} {result['part']} {result['shape']} {options.dtype} on {result['device']}: ms {times}; "
                f"ratio {result['ratio']:.2f}{note}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
