"""Memory of one device, from programs that are compiled and never run, against budgets.

A budget is what was measured (`benchmarks/memory.py`), rounded up by a tenth: a change that needs more is seen here.
"""

import importlib

import jax
import jax.numpy as jnp
import pytest

from tokenizers import bands, registry, streaming
from tokenizers.parallel import platform, traffic
from tokenizers.train import dryrun

GIB = 2**30


def peak(function, *args, **options):
    run = jax.jit(function, compiler_options=platform.run_once_options(), **options)
    return traffic.peak_bytes(run.trace(*args).lower().compile())


def test_encoding_keeps_no_activations():
    """Stable Diffusion's encoder, a picture of 256x256: three arrays of 128 channels, and 130 MiB of parameters."""
    module = registry.build("kl-f8")
    variables = registry.abstract_variables(module)
    pixels = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    used = peak(lambda v, x: module.apply(v, x, method="encode").latents, variables, pixels)
    assert used < 340 * 2**20


def test_recomputing_keeps_less_for_the_backward_pass():
    """Behind every residual block of a small encoder and decoder there is its input, and little else."""
    kept = {}
    for remat in (False, True):
        module = registry.build("kl-f8", widths=(32, 32), blocks=1, middle_attention=False, remat=remat)
        pixels = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
        params = registry.abstract_variables(module)["params"]
        kept[remat] = traffic.kept_bytes(lambda p, x, module=module: module.apply({"params": p}, x)[0], params, pixels)
    assert kept[True] < 0.25 * kept[False]


# Between chunks buffers of keys grow, so those of one chunk have another shape than those of the next.
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "encode", "decode"),
    [
        ("cosmos-1.0-cv8x8x8", (1080, 1920), 4.7, 5.4),
        ("cosmos-1.0-dv8x16x16", (2160, 3840), 10.4, 13.9),
        ("cosmos-1.0-cv8x8x8", (2160, 3840), 12.7, 16.0),
    ],
)
def test_a_chunk_of_a_large_video_fits_16_gib(name, size, encode, decode):
    """At the released sizes, in chunks of eight frames; one after the other, so the larger one counts."""
    module = registry.build(name, dtype=jnp.bfloat16)
    programs = streaming.later_chunks(module, registry.abstract_variables(module), size, 8)
    options = platform.run_once_options()
    encoding, decoding = (traffic.peak_bytes(lowered.compile(options)) for _, lowered, _ in programs)
    assert encoding < encode * GIB
    assert decoding < decode * GIB
    assert max(encode, decode) <= 16


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.slow
@pytest.mark.parametrize(("size", "encode", "decode"), [((1080, 1920), 5.5, 12.3), ((2160, 3840), 6.8, 13.1)])
def test_a_chunk_of_a_large_video_fits_16_gib_in_tiles(size, encode, decode):
    """VidTok, which needs 54 GiB for whole frames of 1080p, four frames at a time in tiles of at most 640x768."""
    module = registry.build("vidtok-kl-causal-488-4chn", dtype=jnp.bfloat16)
    needed = {"encode": 0, "decode": 0}
    for method, _, lowered, _ in bands.later_parts(module, registry.abstract_variables(module), size, 4, (640, 768)):
        needed[method] = max(needed[method], traffic.peak_bytes(lowered.compile(platform.run_once_options())))
    assert needed["encode"] < encode * GIB
    assert needed["decode"] < decode * GIB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "frames", "budget"),
    [
        ("kl_f8", (256, 256), 1, 5.8),
        ("cosmos_cv8x8x8", (256, 256), 17, 10.4),
    ],
)
def test_training_steps_fit_their_budget(name, size, frames, budget, one_device):
    """One picture or clip of the published recipe on one device, everything switched on."""
    config = importlib.import_module(f"configs.{name}").get_config()
    (stream,) = config.data.streams.values()
    stream.update({"batch_size": 1, "resolutions": (size,), "frames": frames})
    config.accumulate = 1
    config.mesh.update({"data": 1, "fsdp": 1, "context": 1})
    (program,) = dryrun.compile_steps(config)
    assert 0.8 * budget * GIB < program.peak < budget * GIB
