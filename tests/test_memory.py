"""Memory of one device, from programs that are compiled and never run, against budgets.

A budget is what was measured (`benchmarks/memory.py`), rounded up by a tenth: a change that needs more is seen here.
"""

import importlib

import jax
import jax.numpy as jnp
import pytest

from tokenizers import registry
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


def stream_peaks(name, size, chunk):
    """Bytes of encoding and of decoding a later chunk of a clip, history included."""
    module = registry.build(name, dtype=jnp.bfloat16)

    def run(variables, x, method):
        return module.apply(variables, x, method=method, mutable=["stream"])

    def shapes(variables, x, method):
        return jax.eval_shape(lambda v, x: run(v, x, method), variables, x)

    variables = registry.abstract_variables(module)
    first = jax.ShapeDtypeStruct((1, chunk + module.spec.first_frame_alone, *size, 3), jnp.float32)
    later = jax.ShapeDtypeStruct((1, chunk, *size, 3), jnp.float32)
    start, history = shapes(variables, first, "encode")
    yield peak(lambda v, state, x: run(dict(v) | state, x, "encode"), variables, history, later, donate_argnums=1)
    following, _ = shapes(dict(variables) | history, later, "encode")
    _, history = shapes(variables, start.latents, "decode")
    latents = following.latents
    yield peak(lambda v, state, z: run(dict(v) | state, z, "decode"), variables, history, latents, donate_argnums=1)


# Between chunks buffers of keys grow, so those of one chunk have another shape than those of the next.
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "encode", "decode"),
    [
        ("cosmos-1.0-cv8x8x8", (1080, 1920), 5.5, 7.9),
        ("cosmos-1.0-dv8x16x16", (2160, 3840), 15.2, 16.0),
    ],
)
def test_videos_of_any_length_stream_within_16_gib(name, size, encode, decode):
    """At the released sizes, in chunks of eight frames; one after the other, so the larger one counts."""
    encoding, decoding = stream_peaks(name, size, 8)
    assert encoding < encode * GIB
    assert decoding < decode * GIB
    assert max(encode, decode) <= 16


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
