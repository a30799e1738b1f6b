"""EQ-VAE against the authors' code: autoencoder, decoding of transformed latents, configs."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, cases, relative_l2
from regularized_training import Training, TrainingCase, check_step, run

import tokenizers
from tokenizers import registry
from tokenizers.convert import eqvae
from tokenizers.losses.equivariance import Draw, Transform
from tokenizers.quantize.gaussian import reparameterize

# Summation orders differ in float32. Observed on CPU: 2e-6.
OUTPUT = 1e-4


def marked(names):
    """The full size takes about 30 s to compile and run on two cores."""
    return [pytest.param(name, marks=pytest.mark.slow if name.startswith("full_") else ()) for name in names]


def transform_of(entry):
    scale = entry["scale"]
    return Transform(tuple(scale) if isinstance(scale, list) else (scale, scale), entry["angle"])


def stored(case, key, value):
    """The part of a value that the case keeps."""
    return np.asarray(value)[tuple(slice(*part) for part in case.meta["reduce"].get(key, ()))]


@functools.lru_cache(maxsize=1)
def official(name):
    case = Case("eqvae", name)
    return case, tokenizers.from_official("eqvae", case.meta["config"], case.weights())


@pytest.mark.parametrize("name", marked(cases("eqvae", "(small|full)_.*")))
def test_transformed_latents_decode_to_what_the_original_does(name):
    case, tok = official(name)
    expected, pixels = case.outputs, jnp.asarray(case.input("image"))
    encoding = tok.encode(pixels, strict=True)
    assert relative_l2(encoding.mean, expected["mean"]) < OUTPUT
    assert relative_l2(encoding.logvar, expected["logvar"]) < OUTPUT
    assert relative_l2(tok.decode(encoding.latents), expected["recon_mode"]) < OUTPUT
    sample = reparameterize(encoding.mean, encoding.logvar, case.input("noise"))
    for entry in case.meta["run"]["transforms"]:
        transform, t = transform_of(entry), entry["name"]
        latents, target = transform(sample), transform(pixels)
        found = tok.decode(latents)
        np.testing.assert_allclose(jnp.abs(found - target).mean(), expected[f"l1_{t}"][0], rtol=OUTPUT)
        for key, value in (("z", latents), ("target", target), ("dec", found)):
            assert relative_l2(stored(case, f"{key}_{t}", value), expected[f"{key}_{t}"]) < OUTPUT, (key, t)


DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
DIFFUSERS = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 256, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip


def test_released_sizes_are_those_of_their_configs():
    config = {"ddconfig": DDCONFIG, "embed_dim": 4, "anisotropic": False, "p_prior": 0.5, "p_prior_s": 0.25}
    ours = registry.build("eq-vae")
    assert registry.parameter_count(ours) == 83653863
    theirs = registry.build("eqvae", **eqvae.fields_from_official({"model": {"params": config, "target": "a.b"}}))
    assert theirs.clone(z_channels=None, stem=None) == ours == registry.build("eq-vae-ema")
    assert registry.build("eqvae", **eqvae.fields_from_official(DIFFUSERS)) == ours
    assert tokenizers.registry.describe("eq-vae")["system"] == "eqvae"


def test_configs_of_other_networks_are_refused():
    with pytest.raises(ValueError, match="key of an AutoencoderKL config 'n_embed'"):
        eqvae.fields_from_official({"ddconfig": DDCONFIG, "embed_dim": 4, "n_embed": 8})
    with pytest.raises(ValueError, match="must be equal"):
        eqvae.fields_from_official(DIFFUSERS | {"out_channels": 4})


# --- training


def draw_of(numbers, anisotropic):
    """A pass of the case: the numbers that Python's ``random`` gave, in their order."""
    if numbers[0] < 0.5:
        *scales, turns = numbers[1:]
        return Draw(latents=Transform(tuple(scales) if anisotropic else (scales[0],) * 2, turns))
    return Draw(pixels=Transform((numbers[2],) * 2)) if numbers[1] < 0.25 else Draw()


@pytest.mark.slow  # LPIPS' network makes each half a minute
@pytest.mark.parametrize("name", cases("eqvae", "train_.*"))
def test_training_steps_are_those_of_the_original(name):
    """The discriminator's turn runs the generator again, with its new parameters and a transform of its own."""
    case = TrainingCase("eqvae", name)
    config = case.meta["config"]
    draws = tuple(draw_of(numbers, config["anisotropic"]) for numbers in case.meta["run"]["draws"])
    weights = {"kl": config["lossconfig"]["params"]["kl_weight"]}
    training = Training(case, "eqvae", eqvae.TABLE, weights, True, {}, {}, {"draws": draws})
    check_step(training, run(training, passes=2), 1.0)
