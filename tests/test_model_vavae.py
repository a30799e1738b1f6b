"""VA-VAE against the authors' code: autoencoder, posterior, bytes, configs."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, cases, relative_l2
from regularized_training import Training, TrainingCase, check_step, run
from test_networks_foundation import module_of

import tokenizers
from tokenizers import registry
from tokenizers.convert import engine, vavae
from tokenizers.networks import foundation
from tokenizers.quantize.gaussian import reparameterize
from tokenizers.train.objective import Alignment, mean_reduction

# Summation orders differ in float32. Observed on CPU: 3e-6.
OUTPUT = 1e-4


def marked(names):
    """The full size takes about 15 s to compile and run on two cores."""
    return [pytest.param(name, marks=pytest.mark.slow if name.startswith("full_") else ()) for name in names]


@functools.lru_cache(maxsize=1)
def official(name):
    case = Case("vavae", name)
    return case, tokenizers.from_official("vavae", case.meta["config"], case.weights())


@pytest.mark.parametrize("name", marked(cases("vavae", "(small|full)_.*")))
def test_autoencoder_computes_what_the_original_does(name):
    case, tok = official(name)
    expected = case.outputs
    encoding = tok.encode(case.input("image"), strict=True)
    mean, logvar = encoding.mean, encoding.logvar
    assert relative_l2(mean, expected["mean"]) < OUTPUT
    assert relative_l2(logvar, expected["logvar"]) < OUTPUT
    assert relative_l2(jnp.exp(0.5 * logvar), expected["std"]) < OUTPUT
    np.testing.assert_array_equal(encoding.latents, mean)
    np.testing.assert_allclose(encoding.losses["kl"], expected["kl"].mean(), rtol=OUTPUT)
    assert relative_l2(reparameterize(mean, logvar, case.input("noise")), expected["sample"]) < OUTPUT
    pixels = tok.decode(mean)
    assert relative_l2(pixels, expected["recon_mode"]) < OUTPUT
    assert relative_l2(tok.decode(expected["sample"]), expected["recon_sample"]) < OUTPUT
    # The authors' bytes: a value beside a step may fall on either side of it. Observed: none does.
    ours = np.clip(127.5 * np.asarray(pixels) + 128, 0, 255).astype(np.uint8).astype(int)
    theirs = expected["recon_mode_uint8"].astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 1e-3


@pytest.mark.parametrize("name", cases("vavae", "small_f4.*"))
def test_encoder_ends_before_the_1x1_convolution(name):
    case, tok = official(name)
    inner = tok.module.apply(tok.variables, case.input("image"), method=lambda model, x: model.encoder(x))
    assert relative_l2(inner, case.outputs["encoder_out"]) < OUTPUT


@pytest.mark.parametrize("name", cases("vavae", "small_f4.*"))
def test_official_files_hold_more_than_the_tokenizer(name):
    """Discriminator, foundation model and projection belong to training; anything else unknown is an error."""
    case, tok = official(name)
    extra = {
        key: np.zeros(3, np.float32)
        for key in ("loss.logvar", "foundation_model.model.norm.weight", "linear_proj.weight")
    }
    found = tokenizers.from_official("vavae", case.meta["config"], case.weights() | extra)
    for a, b in zip(engine.flatten(found.variables).values(), engine.flatten(tok.variables).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sorted(tok.export_official()) == sorted(case.weights())
    with pytest.raises(ValueError, match=r"encoder\.extra"):
        tokenizers.from_official("vavae", case.meta["config"], case.weights() | {"encoder.extra": np.zeros(3)})
    missing = {key: value for key, value in case.weights().items() if key != "quant_conv.bias"}
    with pytest.raises(ValueError, match=r"missing 'quant_conv\.bias'"):
        tokenizers.from_official("vavae", case.meta["config"], missing)


DDCONFIG = {
    "double_z": True, "z_channels": 32, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("channels", [16, 32, 64])
def test_released_sizes_are_those_of_their_configs(channels):
    """The config of training, and the two arguments that the tokenizer is loaded with."""
    training = {
        "model": {
            "base_learning_rate": 1e-4,
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "ddconfig": DDCONFIG | {"z_channels": channels},
                "embed_dim": channels,
                "use_vf": "dinov2",
                "reverse_proj": True,
                "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"vf_weight": 0.1}},
            },
        }
    }
    loading = {"embed_dim": channels, "ch_mult": [1, 1, 2, 2, 4], "ckpt_path": "vavae.pt", "model_type": "vavae"}
    for config in (training, loading):
        theirs = registry.build("vavae", **vavae.fields_from_official(config))
        assert (theirs.z_channels, theirs.stem) == (channels, 128)
        for kind in ("ldm", "mae", "dinov2"):
            assert theirs.clone(z_channels=None, stem=None) == registry.build(f"vavae-f16d{channels}-{kind}")
    assert registry.build("vavae-f16d32-dinov2").spec.compression == (1, 16, 16)


def test_the_released_size_has_the_parameters_of_the_original():
    # The number that the authors' class has, 69.8 million.
    assert registry.parameter_count(registry.build("vavae-f16d32-dinov2")) == 69836067


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"embed_dim": 32, "use_variational": False}, "use_variational of a VA-VAE config False"),
        ({"embed_dim": 32, "model_type": "sdvae"}, "model_type of a VA-VAE config 'sdvae'.*'vavae'"),
        ({"embed_dim": 32, "n_embed": 32}, "key of a VA-VAE config 'n_embed'"),
        ({"embed_dim": 32, "double_z": False}, "double_z of ddconfig False"),
        ({"embed_dim": 32, "ddconfig": DDCONFIG, "scale": 1}, "key of a VA-VAE training config 'scale'"),
        ({"embed_dim": 32, "ddconfig": DDCONFIG | {"tanh_out": True}}, "tanh_out of ddconfig True"),
    ],
)
def test_configs_of_other_networks_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        vavae.fields_from_official(config)


def test_diffusion_models_see_channels_of_unit_variance():
    module = registry.build("vavae", latent_channels=2, latent_mean=(1.0, -2.0), latent_std=(2.0, 4.0))
    scaled = module.apply({}, np.ones((1, 1, 1, 2), np.float32), method="scale_latents")
    np.testing.assert_allclose(scaled[0, 0, 0], [0, 0.75])
    np.testing.assert_allclose(module.apply({}, scaled, method="unscale_latents"), 1)
    with pytest.raises(ValueError, match="no indices"):
        module.apply({}, np.zeros((1, 8, 4), np.int32), method="indices_to_latents")


# --- training


def aligned_training(name):
    case = TrainingCase("vavae", name)
    config, loss = case.meta["config"], case.meta["config"]["lossconfig"]["params"]
    shape, kl, objective, own, variables = case.meta["inputs"]["noise"]["shape"], 1.0, {}, {}, None
    if loss.get("pp_style"):  # means in place of sums, no log-variance, and the KL term is not halved
        kl, objective["reduction"] = 2 / np.prod(shape[1:]), mean_reduction
    if "use_vf" in config:
        module = module_of(config["foundation"]["kwargs"])
        variables = foundation.variables(module, case.weights())
        objective["alignment"] = Alignment(
            lambda images, frozen: module.apply(frozen, images),
            weight=loss["vf_weight"],
            cosine_weight=loss.get("cos_weight", 1.0),
            cosine_margin=loss.get("cos_margin", 0.0),
            distance_weight=loss.get("distmat_weight", 1.0),
            distance_margin=loss.get("distmat_margin", 0.0),
            layer="encoder/conv_out/kernel" if loss["adaptive_vf"] else "",
            project="latents" if config["reverse_proj"] else "features",
        )
        projection = case.weights("linear_proj.")
        own["alignment"] = {"kernel": jnp.asarray(projection["weight"][:, :, 0, 0].T)}
        if "bias" in projection:
            own["alignment"]["bias"] = jnp.asarray(projection["bias"])
    weights = {"kl": kl * loss["kl_weight"]}
    return Training(case, "vavae", vavae.TABLE, weights, False, objective, own, {}, variables), kl


@pytest.mark.slow  # LPIPS' network makes each half a minute
@pytest.mark.parametrize("name", cases("vavae", "train_.*"))
def test_training_steps_are_those_of_the_original(name):
    training, kl = aligned_training(name)
    check_step(training, run(training), kl)
