"""What TPUs and GPUs are given, read from the programs as they are lowered for them: nothing that is slow there."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from tokenizers import registry

# One released size per family.
FAMILIES = {
    "vqvae-f4-512": "convolutions",
    "dvae-dalle-f8-8192": "convolutions",
    "magvit-3dvq-b-1024": "convolutions",
    "maskgit-vqgan-imagenet256-f16-1024": "convolutions",
    "open-magvit2-imagenet-128-262144": "convolutions",
    "open-magvit2-video-128-262144": "convolutions",
    "kl-f8": "attention in the middle",
    "vqgan-imagenet-f16-1024": "attention in the middle",
    "flux1-vae": "attention in the middle",
    "ibq-imagenet-16384": "attention in the middle",
    "causal3d-fsq-488-16777216": "convolutions",
    "vidtok-kl-causal-488-4chn": "convolutions",
    "vidtok-fsq-causal-488-32768-v1.1": "convolutions",
    "cosmos-ci8x8": "attention in the middle",
    "cosmos-1.0-cv8x8x8": "attention in the middle",
    "titok-l32": "transformer",
    "omnitokenizer-imagenet-k600": "transformer",
    "cvivit-phenaki": "transformer",
    "vitok-s-b-16": "transformer",
    "vtp-small-f16d64": "transformer",
}
ALWAYS = ("kl-f8", "vidtok-fsq-causal-488-32768-v1.1", "vitok-s-b-16")
each_family = pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
_TENSOR = re.compile(r"tensor<((?:\d+x)*)(\w+)>")


@functools.cache
def lowered(name, dtype=jnp.bfloat16):
    """StableHLO of encoding and decoding, for TPUs; nothing is compiled or computed."""
    module = registry.build(name, dtype=dtype)
    variables = registry.abstract_variables(module)
    pixels = jax.ShapeDtypeStruct(registry.example_shape(module), jnp.float32)

    def roundtrip(variables, pixels):
        encoding = module.apply(variables, pixels, method="encode")
        return encoding, module.apply(variables, encoding.latents, method="decode")

    return jax.jit(roundtrip).trace(variables, pixels).lower(lowering_platforms=("tpu",)).as_text()


def shapes(line):
    return [tuple(int(side) for side in sides.split("x") if side) for sides, _ in _TENSOR.findall(line)]


def operations(text, name):
    return [line for line in text.splitlines() if f"stablehlo.{name}" in line]


@each_family
def test_no_double_precision_no_calls_to_the_host(name):
    text = lowered(name)
    assert not re.search(r"xf64|<f64|xi64>", re.sub(r"dense<[^>]*> : tensor<[^>]*>", "", text))
    calls = set(re.findall(r"custom_call @(\w+)", text))
    assert not {call for call in calls if "callback" in call or "host" in call.lower()}, calls


@each_family
def test_only_tables_are_looked_up(name):
    """Upsampling, pooling and padding repeat and slice: a gather of activations would be slow, and not shardable."""
    for line in operations(lowered(name), '"gather"') + operations(lowered(name), "gather("):
        assert len(shapes(line)[0]) <= 2, line


@pytest.mark.parametrize(
    "name",
    [
        name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow)
        for name, kind in FAMILIES.items()
        if kind != "transformer"
    ],
)
def test_convolutional_networks_transpose_no_activations(name):
    """Patches and depth-to-space (rank six and more) move elements by their nature; nothing else may.

    Attention has heads and positions to move: at most six arrays for each, which stand by their softmax.
    """
    text = lowered(name)
    moved = [line for line in operations(text, "transpose") if len(shapes(line)[0]) in (4, 5)]
    assert len(moved) <= 6 * len(operations(text, "exponential ")), "\n".join(moved)


@each_family
def test_the_network_computes_in_the_dtype_it_is_given(name):
    """All convolutions and nearly all products have bfloat16 operands: one in float32 would be eight times slower."""
    text = lowered(name)
    kinds = [[kind for _, kind in _TENSOR.findall(line)[:2]] for line in operations(text, "convolution")]
    wide = [line for line, kind in zip(operations(text, "convolution"), kinds, strict=True) if "f32" in kind]
    wide = [line for line in wide if max(shapes(line)[1][:-2]) > 1]  # dVAE's logits are float32, also its authors'
    assert not wide, "\n".join(wide)
    products = operations(text, "dot_general")
    wide = [line for line in products if "f32" in [kind for _, kind in _TENSOR.findall(line)[:2]]]
    wide = [line for line in wide if math.prod(shapes(line)[-1][:-1]) > 1]
    # Projections around a bottleneck and distances to codes are float32 on purpose, as are rotary tables.
    assert len(wide) <= 6, "\n".join(wide)
