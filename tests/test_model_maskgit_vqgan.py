"""MaskGIT's VQGAN against the JAX original and its PyTorch port: tokens, pixels, gradients, losses, names."""

import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
from reference import Case, cases, relative_l2

import tokenizers
from tokenizers import quantize, registry
from tokenizers.convert import engine, maskgit_vqgan
from tokenizers.quantize.vq import VectorQuantizer

# Summation orders differ in float32. Observed on CPU: outputs 6e-6, gradients 2e-5.
OUTPUT, GRADIENT = 1e-4, 1e-3


def marked(names):
    """Full sizes need about 20 s each to compile and run on two cores."""
    return [pytest.param(name, marks=pytest.mark.slow if "full_" in name else ()) for name in names]


@functools.lru_cache(maxsize=2)
def official(name):
    case = Case("maskgit_vqgan", name)
    return case, tokenizers.from_official("maskgit_vqgan", case.meta["config"], case.weights())


def sees(model, pixels):
    """(what the bottleneck reads, reconstruction, encoding) of a model, in one program."""
    return model.prequantized(pixels), *model(pixels)


def unit(pixels):
    """[-1, 1] -> the authors' [0, 1]."""
    return (np.asarray(pixels) + 1) / 2


@pytest.mark.parametrize("name", marked(cases("maskgit_vqgan", "(small|full|jax_small|jax_full)_?.*")))
def test_tokens_and_pixels_are_those_of_the_original(name):
    case, tok = official(name)
    prefix = "jax_" if name.startswith("jax_") else ""
    hidden = case.outputs["jax_raw" if prefix else "hidden"]
    # The authors' image is (x + 1) / 2 of this.
    image = refweights.image_like(case.meta["inputs"]["image"]["seed_name"], case.meta["inputs"]["image"]["shape"])
    run = jax.jit(functools.partial(tok.module.apply, method=sees))
    prequantized, reconstruction, encoding = run(tok.variables, image)
    assert relative_l2(prequantized, hidden) < OUTPUT
    indices = case.outputs[f"{prefix}indices"].reshape(hidden.shape[:-1])
    np.testing.assert_array_equal(encoding.indices, indices)
    assert relative_l2(unit(reconstruction), case.outputs[f"{prefix}recon"]) < OUTPUT
    assert relative_l2(unit(tok.decode_indices(indices)), case.outputs[f"{prefix}recon"]) < OUTPUT
    if "decoded" in case.outputs:
        entry = case.meta["inputs"]["codes"]
        draws = (refweights.uniform(entry["seed_name"], tuple(entry["shape"])) + 1) / 2 * entry["high"]
        codes = np.minimum(np.floor(draws), entry["high"] - 1).astype(np.int32)
        codes = codes.reshape(1, *(n // 16 for n in case.outputs["decoded"].shape[1:3]))
        assert relative_l2(unit(tok.decode_indices(codes)), case.outputs["decoded"]) < OUTPUT


@pytest.mark.parametrize("name", marked(cases("maskgit_vqgan", "(small|full)_.*")))
def test_gradients_are_those_of_the_port(name):
    case, tok = official(name)
    expected = case.outputs
    image = unit(
        refweights.image_like(case.meta["inputs"]["image"]["seed_name"], case.meta["inputs"]["image"]["shape"])
    )

    def loss(variables, image):
        reconstruction, encoding = tok.module.apply(variables, image * 2 - 1)
        # The port has the two weights swapped.
        quantizer = encoding.losses["commitment"] + 0.25 * encoding.losses["codebook"]
        return jnp.mean(jnp.square((reconstruction + 1) / 2 - image)) + quantizer, quantizer

    def through_the_encoder(image, target):
        reconstruction, encoding = tok.module.apply(tok.variables, image * 2 - 1)
        quantizer = encoding.losses["commitment"] + 0.25 * encoding.losses["codebook"]
        return jnp.mean(jnp.square((reconstruction + 1) / 2 - target)) + quantizer

    @jax.jit
    def run(variables, image):
        return jax.value_and_grad(loss, has_aux=True)(variables, image), jax.grad(through_the_encoder)(image, image)

    ((total, quantizer), gradients), of_image = run(dict(tok.variables), image)
    np.testing.assert_allclose(total, expected["total"], rtol=OUTPUT)
    np.testing.assert_allclose(quantizer, expected["quantizer_loss"], rtol=OUTPUT)
    official_gradients = engine.to_official(maskgit_vqgan.TABLE, gradients)
    norms = [np.linalg.norm(official_gradients[key]) for key in case.meta["grad_norm_names"]]
    # Absolute: the norm of the whole gradient times what sums in another order change.
    np.testing.assert_allclose(norms, expected["grad_norms"], rtol=GRADIENT, atol=1e-6 * expected["grad_total_norm"])
    np.testing.assert_allclose(np.linalg.norm(norms), expected["grad_total_norm"], rtol=GRADIENT)
    checked = 0
    for key, value in expected.items():
        if key.startswith("grad:"):
            assert relative_l2(thinned(official_gradients[key[5:]], value), value) < GRADIENT, key
            checked += 1
    assert checked
    assert relative_l2(thinned(np.asarray(of_image), expected["grad_image"]), expected["grad_image"]) < GRADIENT


def thinned(value, stored):
    """Large arrays are stored flattened and thinned by a whole step."""
    if value.shape == stored.shape:
        return value
    step = -(-value.size // stored.size)
    return value.reshape(-1)[::step]


@pytest.mark.parametrize("name", cases("maskgit_vqgan", "jax_small|jax_full_32"))
@pytest.mark.parametrize(("kind", "form"), [("softmax", "smoothed"), ("argmax", "smoothed_argmax")])
def test_training_losses_are_those_of_the_original(name, kind, form):
    """Commitment, codebook and entropy, and the gradients of their weighted sum."""
    case = Case("maskgit_vqgan", name)
    config, expected = case.meta["config"]["jax"]["vqvae"], case.outputs
    entry = case.meta["inputs"]["z"]
    z = refweights.uniform(entry["seed_name"], tuple(entry["shape"])) * np.float32(entry.get("post", "x*1")[2:])
    codebook = case.weights("quantize.")["embedding.weight"]
    inverse = 1 / config["entropy_temperature"]
    vq = VectorQuantizer(*codebook.shape, entropy=form, inverse_temperature=inverse)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def objective(z, codebook):
        encoding = vq.apply({"params": {"codebook": codebook}}, z, train=True)
        losses = encoding.losses
        entropy = config["entropy_loss_ratio"] * (losses["entropy_sample"] - losses["entropy_codebook"])
        parts = config["commitment_cost"] * losses["commitment"], losses["codebook"], entropy
        return sum(parts), (parts, encoding.indices)

    (total, (parts, indices)), (of_z, of_codebook) = objective(z, codebook)
    np.testing.assert_array_equal(indices, expected["vq_train_indices"])
    # Distances are multiplied by up to 100 before the softmax. Observed: 2e-6.
    np.testing.assert_allclose([total, *parts], expected[f"vq_losses_{kind}"], rtol=OUTPUT, atol=1e-6)
    for value, key in ((of_z, f"vq_grad_z_{kind}"), (of_codebook, f"vq_grad_codebook_{kind}")):
        assert relative_l2(thinned(np.asarray(value), expected[key]), expected[key]) < GRADIENT, key


@pytest.mark.parametrize("name", cases("maskgit_vqgan", "jax_small|jax_full_32"))
def test_gumbel_codes_are_those_of_the_original(name):
    """GumbelVQ: mixtures of codes while training, at the noise and temperature of the case; the nearest code after."""
    case = Case("maskgit_vqgan", name)
    config = case.meta["config"]["jax"]["vqvae"]
    entry, noise = case.meta["inputs"]["z"], case.meta["inputs"]["gumbel_u"]
    z = refweights.uniform(entry["seed_name"], tuple(entry["shape"])) * np.float32(entry.get("post", "x*1")[2:])
    u = np.clip((refweights.uniform(noise["seed_name"], tuple(noise["shape"])) + 1) / 2, 1e-6, 1 - 1e-6)
    fields = maskgit_vqgan.fields_from_official({"vqvae": config | {"quantizer": "gumbel"}})
    bottleneck = quantize.create(**fields["bottleneck"])
    variables = {"params": {"embedding": jnp.asarray(case.weights("quantize.")["embedding.weight"])}}
    with mock.patch.object(jax.random, "gumbel", return_value=jnp.asarray(-np.log(-np.log(u)))):
        rngs = {"bottleneck": jax.random.key(0)}
        encoding = bottleneck.apply(variables, z, train=True, temperature=0.7, rngs=rngs)
    expected = case.outputs["gumbel_vq"]
    assert relative_l2(thinned(np.asarray(encoding.latents), expected), expected) < OUTPUT
    np.testing.assert_array_equal(bottleneck.apply(variables, z).indices, case.outputs["vq_train_indices"])
    if name == "jax_small":
        module = registry.build("maskgit_vqgan", **fields)
        paths = engine.flatten(registry.abstract_variables(module))
        flax = maskgit_vqgan.TABLE(tuple(paths), ("quantizer/codebook",))
        assert engine.official_names(flax, paths)["params/bottleneck/embedding"] == "quantizer/codebook"


@pytest.mark.parametrize("name", cases("maskgit_vqgan", "jax_small|jax_full_32"))
def test_names_of_the_original_and_of_the_port_mean_the_same(name):
    case, tok = official(name)
    flax = {}
    for theirs, shape, ported, _ in case.meta["flax_to_torch"]:
        value = case.weights()[ported] if name == "jax_small" else np.zeros(1)
        value = np.moveaxis(value, (0, 1), (-1, -2)) if value.ndim == 4 else value
        assert name != "jax_small" or list(value.shape) == shape
        flax[theirs] = value
    paths = engine.flatten(tok.variables)
    names = engine.official_names(maskgit_vqgan.TABLE(tuple(paths), tuple(flax)), paths)
    ported = engine.official_names(maskgit_vqgan.TABLE, paths)
    expected = {theirs: ported for theirs, _, ported, _ in case.meta["flax_to_torch"]}
    assert {names[path]: ported[path] for path in paths} == expected
    if name == "jax_small":
        for state in (flax, {f"params/{key}": value for key, value in flax.items()}):
            other = tokenizers.from_official("maskgit_vqgan", case.meta["config"]["jax"], state)
            chex.assert_trees_all_equal(dict(other.variables), dict(tok.variables))


NETWORK = {
    "channel_mult": [1, 1, 2, 2, 4], "num_resolutions": 5, "dropout": 0.0, "hidden_channels": 128, "num_channels": 3,
    "num_res_blocks": 2, "resolution": 256, "z_channels": 256,
}  # fmt: skip
CODES = {"num_embeddings": 1024, "embedding_dim": 256, "commitment_cost": 0.25}
ORIGINAL = {
    "quantizer": "vq", "codebook_size": 1024, "entropy_loss_ratio": 0.1, "entropy_temperature": 0.01,
    "entropy_loss_type": "softmax", "commitment_cost": 0.25, "filters": 128, "num_res_blocks": 2,
    "channel_multipliers": [1, 1, 2, 2, 4], "embedding_dim": 256, "conv_downsample": False, "activation_fn": "swish",
    "norm_type": "GN",
}  # fmt: skip


def test_released_size_is_that_of_both_configs():
    ours = registry.build("maskgit-vqgan-imagenet256-f16-1024")
    for config in ({"encoder_decoder": NETWORK, "quantizer": CODES}, {"vqvae": ORIGINAL}, ORIGINAL):
        assert registry.build("maskgit_vqgan", **maskgit_vqgan.fields_from_official(config)) == ours
    facts = tokenizers.describe("maskgit-vqgan-imagenet512-f16-1024")
    assert facts["parameters"] == 54515587  # of the official state dict
    assert facts["compression"] == (1, 16, 16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vqvae": ORIGINAL | {"quantizer": "fsq"}}, "quantizer of vqvae 'fsq'.*'vq', 'gumbel'"),
        ({"vqvae": ORIGINAL | {"conv_downsample": True}}, "conv_downsample"),
        ({"vqvae": ORIGINAL | {"norm_type": "BN"}}, "norm_type of vqvae 'BN'"),
        ({"encoder_decoder": NETWORK | {"num_resolutions": 4}, "quantizer": CODES}, "num_resolutions=4"),
        ({"encoder_decoder": NETWORK | {"z_channels": 64}, "quantizer": CODES}, "z_channels=64 must equal"),
        ({"encoder_decoder": NETWORK | {"attention": True}, "quantizer": CODES}, "key of encoder_decoder 'attention'"),
        (
            {"encoder_decoder": NETWORK, "quantizer": CODES, "jax": {"vqvae": ORIGINAL | {"filters": 64}}},
            "describe different networks",
        ),
        ({"model": {}}, "has 'encoder_decoder' and 'quantizer', or 'vqvae'"),
    ],
)
def test_configs_of_other_networks_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        maskgit_vqgan.fields_from_official(config)


@pytest.mark.slow
def test_remat_does_not_change_gradients():
    fields = {"bottleneck": {"name": "vq", "codebook_size": 8, "code_dim": 4}, "latent_channels": 4, "blocks": 1}
    module = registry.build("maskgit_vqgan", widths=(32, 64), **fields)
    pixels = refweights.image_like("maskgit", (1, 8, 8, 3))
    leaves, tree = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), pixels))
    values = [refweights.uniform(f"leaf{i}", leaf.shape) / 4 for i, leaf in enumerate(leaves)]
    variables = jax.tree.unflatten(tree, values)

    def gradient(module):
        return jax.jit(jax.grad(lambda v: jnp.square(module.apply(v, pixels)[0] - pixels).mean()))(variables)

    # The recomputed forward pass may be fused differently.
    chex.assert_trees_all_close(gradient(module.clone(remat=True)), gradient(module), rtol=1e-4, atol=1e-6)
