"""The autoencoders of FLUX and Stable Diffusion 3 against diffusers: posterior, diffusion latents, tiles, configs."""

import functools

import chex
import jax
import numpy as np
import pytest
from reference import Case, cases, relative_l2

import tokenizers
from tokenizers import registry
from tokenizers.convert import engine, flux_vae
from tokenizers.quantize.gaussian import reparameterize

# Summation orders differ in float32. Observed on CPU: 4e-6.
OUTPUT = 1e-4


def marked(names):
    """Full sizes need about 15 s each to compile and run on two cores."""
    return [pytest.param(name, marks=pytest.mark.slow if name.startswith("full_") else ()) for name in names]


@functools.lru_cache(maxsize=2)
def official(name):
    case = Case("flux_vae", name)
    return case, tokenizers.from_official("flux_vae", case.meta["config"], case.weights())


def stored(case, key, value):
    """The part of a result that the case holds."""
    return value[:, :, ::3] if case.meta["outputs"][key].get("slice") == "[:, :, ::3, :]" else value


@pytest.mark.parametrize("name", marked(cases("flux_vae")))
def test_autoencoder_computes_what_the_original_does(name):
    case, tok = official(name)
    expected = case.outputs

    def encode(model, pixels, noise):
        encoding = model.encode(pixels)
        scaled = model.scale_latents(reparameterize(encoding.mean, encoding.logvar, noise))
        return model.moments(pixels), encoding, scaled, model.unscale_latents(scaled)

    run = jax.jit(functools.partial(tok.module.apply, method=encode))
    moments, encoding, scaled, back = run(tok.variables, case.input("image"), case.input("noise"))
    assert relative_l2(moments, expected["moments"]) < OUTPUT
    np.testing.assert_array_equal(encoding.latents, encoding.mean)
    np.testing.assert_allclose(encoding.losses["kl"], expected["kl_official"].mean(), rtol=OUTPUT)
    assert relative_l2(scaled, expected["scaled"]) < OUTPUT
    sample = reparameterize(encoding.mean, encoding.logvar, case.input("noise"))
    np.testing.assert_allclose(back, sample, atol=1e-5)
    assert relative_l2(stored(case, "recon", tok.decode(encoding.latents)), expected["recon"]) < OUTPUT
    assert relative_l2(stored(case, "dec_z", tok.decode(case.input("z"))), expected["dec_z"]) < OUTPUT


@pytest.mark.slow  # many shapes of tiles
@pytest.mark.parametrize("name", cases("flux_vae", ".*tiling"))
def test_tiles_are_those_of_the_original(name):
    case, tok = official(name)

    def tiled(model, pixels, latents):
        return model.encode_tiled(pixels), model.decode_tiled(latents)

    latents = np.split(case.outputs["moments"], 2, axis=-1)[0]
    # Not compiled as a whole: a program of all tiles would take its time.
    encoding, pixels = tok.module.apply(tok.variables, case.input("image"), latents, method=tiled)
    moments = np.concatenate([encoding.mean, encoding.logvar], axis=-1)
    assert relative_l2(moments, case.outputs["moments_tiled"]) < OUTPUT
    assert relative_l2(stored(case, "recon_tiled", pixels), case.outputs["recon_tiled"]) < OUTPUT


@pytest.mark.parametrize("name", cases("flux_vae", "small_flux2"))
def test_weights_go_back_to_their_official_names(name):
    case, tok = official(name)
    flat = engine.flatten(tok.variables)
    table = flux_vae.TABLE(tuple(flat), tuple(case.weights()))
    back = engine.to_official(table, tok.variables)
    weights = case.weights()
    assert weights.pop("bn.num_batches_tracked") == 0
    chex.assert_trees_all_equal(back, weights)
    weights.pop("bn.running_var")
    with pytest.raises(ValueError, match="missing 'bn.running_var'"):
        tokenizers.from_official("flux_vae", case.meta["config"], weights)


FLUX1 = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True, "in_channels": 3, "latent_channels": 16, "latents_mean": None, "latents_std": None,
    "layers_per_block": 2, "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip
FLUX2 = {
    key: value for key, value in FLUX1.items() if key not in ("scaling_factor", "shift_factor", "use_quant_conv")
} | {"latent_channels": 32, "use_post_quant_conv": True, "batch_norm_eps": 1e-4, "patch_size": [2, 2]}


def build(config):
    return registry.build("flux_vae", **flux_vae.fields_from_official(config))


def test_released_sizes_are_those_of_their_configs():
    assert build(FLUX1) == registry.build("flux1-vae")
    assert build(FLUX2) == registry.build("flux2-vae")
    assert build(FLUX1 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}) == registry.build("sd3-vae")
    # Parameter counts of the official modules.
    assert registry.parameter_count(registry.build("flux1-vae")) == 83819683
    assert registry.parameter_count(registry.build("flux2-vae")) == 84046115


def test_the_original_config_of_flux1_is_read_too():
    original = {
        "resolution": 256, "in_channels": 3, "ch": 128, "out_ch": 3, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "z_channels": 16, "scale_factor": 0.3611, "shift_factor": 0.1159,
    }  # fmt: skip
    ours = build(original)
    chex.assert_trees_all_equal_shapes(
        registry.abstract_variables(ours), registry.abstract_variables(registry.build("flux1-vae"))
    )
    assert (ours.scaling_factor, ours.shift_factor) == (0.3611, 0.1159)


def test_a_decoder_may_be_narrower():
    module = build(FLUX2 | {"decoder_block_out_channels": [96, 192, 384, 384]})
    params = registry.abstract_variables(module)["params"]
    assert params["encoder"]["mid_block0"]["conv1"]["kernel"].shape == (3, 3, 512, 512)
    assert params["decoder"]["conv_in"]["kernel"].shape == (3, 3, 32, 384)
    assert params["decoder"]["conv_out"]["kernel"].shape == (3, 3, 96, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_block_out_channels": [96]}, "needs 4 entries"),
        ({"norm_type": "rms"}, "key of a diffusers config 'norm_type'"),
        ({"act_fn": "gelu"}, "act_fn of a diffusers config 'gelu'"),
    ],
)
def test_configs_of_other_networks_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        flux_vae.fields_from_official(FLUX1 | change)
    with pytest.raises(ValueError, match="key of an AutoEncoderParams config 'z'"):
        flux_vae.fields_from_official({"z": 3})
