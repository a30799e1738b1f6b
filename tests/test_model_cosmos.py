"""The Cosmos tokenizers against the authors' code: every network, bottleneck and frame count."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FOLDERS, Case, cases, relative_l2

import tokenizers
from tokenizers import registry
from tokenizers.parallel import platform
from tokenizers.quantize.gaussian import reparameterize

SYSTEM = "cosmos"
# Sums in another order. Observed on CPU: see the table of the tests; the reconstruction amplifies what the latents
# differ by up to fifty times.
LATENTS, PIXELS = 1e-5, 1e-4


def marked(names):
    """Cases that the repository keeps run always, the others when slow tests do."""
    kept = {path.stem for path in (FOLDERS[0] / SYSTEM).glob("*.json")}
    return [pytest.param(name, marks=[] if name in kept else pytest.mark.slow) for name in names]


def stored(case, name, value):
    """The part of a value that a case keeps."""
    value = np.asarray(value)
    if f"{name}__stats" in case.outputs:
        mean, std, largest, *shape = case.outputs[f"{name}__stats"]
        assert tuple(int(n) for n in shape if n) == value.shape
        np.testing.assert_allclose([value.mean(), value.std()], [mean, std], atol=1e-4 * largest)
    places = case.meta["slices"].get(name, ())
    return value[tuple(slice(*place) for place in places)]


def scaled(case, key):
    """An input with the factor that the case multiplies it with."""
    factor = re.fullmatch(r"\*([\d.]+)", case.meta["inputs"][key].get("post", ""))
    return case.input(key) * np.float32(factor[1] if factor else 1)


def official(case):
    return tokenizers.from_official(SYSTEM, case.meta["config"], case.weights())


def assert_same(case, name, value, tolerance):
    error = relative_l2(stored(case, name, value), case.outputs[name])
    print(f"{name}: {error:.1e}")  # shown with -rP
    assert error < tolerance, (name, error)


def run_once(function, *args):
    return jax.jit(function, compiler_options=platform.run_once_options())(*args)


def check_autoencoder(case):
    tok = official(case)

    def both(variables, x, given):
        encoding = tok.module.apply(variables, x, method="encode")
        return encoding, tok.module.apply(variables, given, method="decode")

    for key in [name for name in case.meta["inputs"] if not name.endswith("_noise")]:
        given = next(
            case.outputs[name] for name in (f"latent_{key}", f"mean_{key}", f"codes_{key}") if name in case.outputs
        )
        encoding, decoded = run_once(both, tok.variables, case.input(key), given)
        assert_same(case, f"recon_{key}", decoded, PIXELS)
        if f"latent_{key}" in case.outputs:
            assert_same(case, f"latent_{key}", encoding.latents, LATENTS)
        elif f"mean_{key}" in case.outputs:
            assert_same(case, f"mean_{key}", encoding.mean, LATENTS)
            assert_same(case, f"logvar_{key}", encoding.logvar, LATENTS)
            sample = reparameterize(encoding.mean, encoding.logvar, scaled(case, f"{key}_noise"))
            assert_same(case, f"sample_{key}", sample, LATENTS)
        else:
            indices = case.outputs[f"indices_{key}"]
            if tok.spec.codebooks > 1:  # their quantizers are axis 1
                indices = np.moveaxis(indices, 1, -1)
            assert case.outputs[f"margin_{key}"].min() > 1e-3  # no position is fragile
            np.testing.assert_array_equal(encoding.indices, indices)
            np.testing.assert_allclose(tok.indices_to_latents(indices), given, atol=1e-6)


@pytest.mark.parametrize("name", marked(cases(SYSTEM, "small_.*")))
def test_small_networks_compute_the_authors_numbers(name):
    check_autoencoder(Case(SYSTEM, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(SYSTEM, "full_.*"))
def test_released_sizes_compute_the_authors_numbers(name):
    check_autoencoder(Case(SYSTEM, name))


# Millions, without the convolutions that the code of 0.1 stores and never uses (counted from the authors' modules).
PARAMETERS = {
    "cosmos-ci8x8": 76.79,
    "cosmos-ci16x16": 81.51,
    "cosmos-di8x8": 79.00,
    "cosmos-di16x16": 83.72,
    "cosmos-cv4x8x8": 73.19,
    "cosmos-cv8x8x8": 105.65,
    "cosmos-cv8x16x16": 110.90,
    "cosmos-dv4x8x8": 104.67,
    "cosmos-dv8x8x8": 105.65,
    "cosmos-dv8x16x16": 110.90,
    "cosmos-1.0-cv8x8x8": 105.65,
    "cosmos-1.0-dv8x16x16": 110.90,
    "cosmos-tokenize1-cv8x8x8-720p": 105.65,
    "cosmos-tokenize1-dv8x16x16-720p": 110.90,
    "cosmos-tokenize1-cv4x8x8-360p": 110.21,
    "cosmos-tokenize1-dv4x8x8-360p": 112.62,
    "cosmos-tokenize1-ci8x8-360p": 81.38,
    "cosmos-tokenize1-ci16x16-360p": 84.33,
    "cosmos-tokenize1-di8x8-360p": 83.60,
    "cosmos-tokenize1-di16x16-360p": 86.55,
}


def test_every_release_is_there():
    assert set(PARAMETERS) == {name for name in registry.available() if name.startswith("cosmos-")}


@pytest.mark.parametrize("name", PARAMETERS)
def test_released_sizes_have_the_published_number_of_parameters(name):
    module = registry.build(name)
    assert registry.parameter_count(module) == pytest.approx(PARAMETERS[name] * 1e6, abs=0.006e6)
    size = name.removeprefix("cosmos-").removesuffix("-360p").removesuffix("-720p").split("-")[-1]
    steps = tuple(int(number) for number in size[2:].split("x"))
    assert module.spec.compression == ((1, *steps) if size[1] == "i" else steps)
    assert module.spec.codebook_size == (64000 if size[0] == "d" else None)


def test_images_and_clips_have_the_documented_shapes():
    for name, shape, latents in [
        ("cosmos-di16x16", (1, 64, 96, 3), (1, 4, 6, 6)),
        ("cosmos-dv8x16x16", (1, 17, 64, 96, 3), (1, 3, 4, 6, 6)),
        ("cosmos-cv4x8x8", (1, 1, 64, 96, 3), (1, 1, 8, 12, 16)),
    ]:
        module = registry.build(name)
        shapes = registry.abstract_variables(module)
        reconstruction, encoding = jax.eval_shape(module.apply, shapes, jax.ShapeDtypeStruct(shape, jnp.float32))
        assert (reconstruction.shape, encoding.latents.shape) == (shape, latents)
