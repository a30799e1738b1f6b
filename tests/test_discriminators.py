"""PatchGAN discriminators: the published networks, their normalisation statistics, and what they refuse."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import Case, cases, relative_l2

from tokenizers.discriminators.blur import blur_2d
from tokenizers.discriminators.patchgan import PatchDiscriminator, patchgan_2d, patchgan_3d

# Summation orders differ in float32. Observed on CPU: outputs 2e-6, gradients 9e-5.
OUTPUT, GRADIENT = 1e-4, 1e-3


def official_place(name):
    """Where a discriminator entry of an official state dict lives here: (collection, path), or None for counters."""
    index, kind = re.fullmatch(r"main\.(\d+)\.(\w+)", name).groups()
    index = int(index)
    if kind == "num_batches_tracked":
        return None
    if index == 0:
        layer = "conv_in"
    elif index % 3 == 2:
        layer = f"conv_{(index + 1) // 3}"
    else:
        layer = f"norm_{index // 3}"
    if kind in ("running_mean", "running_var", "initialized"):
        return "batch_stats", (layer, kind.removeprefix("running_"))
    kinds = {
        "weight": "scale" if layer.startswith("norm") else "kernel",
        "bias": "bias",
        "loc": "loc",
        "scale": "scale",
    }
    return "params", (layer, kinds[kind])


def from_official(module, weights, pixels):
    """Variables of the module from an official state dict; every variable must be filled or be an ActNorm statistic."""
    last = max(int(name.split(".")[1]) for name in weights)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), pixels))
    variables = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype) if x.dtype == np.float32 else None, variables)
    for name, value in weights.items():
        place = official_place(name)
        if place is None:
            continue
        collection, (layer, kind) = place
        if name.startswith(f"main.{last}."):
            layer = "conv_out"
        if kind == "kernel":
            value = np.moveaxis(value, (0, 1), (-1, -2))
        elif kind in ("loc", "scale"):
            value = value.reshape(-1)
        assert variables[collection][layer][kind].shape == value.shape, name
        variables[collection][layer][kind] = value
    for layer in variables.get("batch_stats", {}).values():
        if "initialized" in layer:
            layer["initialized"] = np.ones((), np.uint8)
            layer["loc_offset"] = layer["scale_offset"] = np.zeros_like(layer["loc_offset"])
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(variables))
    return variables


def official_entry(tree, name, last):
    """The entry of a params or batch_stats tree that an official name stands for."""
    _, (layer, kind) = official_place(name)
    return tree["conv_out" if name.startswith(f"main.{last}.") else layer][kind]


def discriminator_of(case):
    config = case.meta["config"]
    make = patchgan_3d if case.meta["official_class"].endswith("3D") else patchgan_2d
    norm = "actnorm" if config["use_actnorm"] else "batch"
    return make(width=config.get("ndf", 64), layers=config["n_layers"], norm=norm)


@pytest.mark.parametrize("name", cases("vqgan", ".*disc_(eps_sensitive|n.*)"))
def test_vqgan_discriminator_agrees_with_the_original(name):
    case = Case("vqgan", name)
    module, images = discriminator_of(case), case.input("image")
    variables = from_official(module, case.weights(), images)
    assert relative_l2(module.apply(variables, images), case.outputs["logits_eval"]) < OUTPUT
    logits, updated = module.apply(variables, images, train=True, mutable=["batch_stats"])
    assert relative_l2(logits, case.outputs["logits_train"]) < OUTPUT
    for key, expected in case.outputs.items():
        if key.startswith("after__"):
            entry = re.sub(r"after__main_(\d+)_", r"main.\1.", key)
            value = official_entry(updated["batch_stats"], entry, last=None)
            value = value[::4] if key in case.meta.get("slices", {}) else value
            assert relative_l2(value, expected) < OUTPUT, key


@pytest.mark.parametrize("name", cases("vqgan", "disc_actnorm.*"))
def test_actnorm_discriminator_agrees_with_the_original(name):
    case = Case("vqgan", name)
    module, images = discriminator_of(case), case.input("image")
    variables = from_official(module, case.weights(), images)
    assert relative_l2(module.apply(variables, images), case.outputs["logits_eval"]) < OUTPUT
    assert relative_l2(module.apply(variables, images, train=True), case.outputs["logits_eval"]) < OUTPUT

    for layer in variables["batch_stats"].values():
        layer["initialized"] = np.zeros((), np.uint8)
    logits, updated = module.apply(variables, images, train=True, mutable=["batch_stats"])
    assert relative_l2(logits, case.outputs["logits_train_data_dependent_init"]) < OUTPUT
    for index, layer in ((3, "norm_1"), (6, "norm_2")):
        for kind in ("loc", "scale"):
            fitted = variables["params"][layer][kind] + updated["batch_stats"][layer][f"{kind}_offset"]
            assert relative_l2(fitted, case.outputs[f"after_init__main_{index}_{kind}"]) < OUTPUT
    # What the first batch fixed holds for every later one.
    again, kept = module.apply({**variables, **updated}, 0.5 * images, train=True, mutable=["batch_stats"])
    chex.assert_trees_all_equal(kept["batch_stats"], updated["batch_stats"])
    assert relative_l2(again, logits) > 1e-2


@pytest.mark.parametrize("name", cases("vidtok", "disc_[23]d.*"))
def test_vidtok_discriminators_agree_with_the_original(name):
    case = Case("vidtok", name)
    module, pixels = discriminator_of(case), case.input("x")
    weights = case.weights("loss.discriminator.")
    variables = from_official(module, weights, pixels)
    assert relative_l2(module.apply(variables, pixels), case.outputs["logits_eval"]) < OUTPUT

    def loss(params, pixels):
        logits, updated = module.apply({**variables, "params": params}, pixels, train=True, mutable=["batch_stats"])
        return jnp.mean(jax.nn.softplus(logits)), (logits, updated)

    (of_params, of_pixels), (logits, updated) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        variables["params"], pixels
    )
    assert relative_l2(logits, case.outputs["logits_train"]) < OUTPUT
    stored = case.outputs["grad_x"]
    assert relative_l2(of_pixels[:: 1 + (len(stored) < len(pixels))], stored) < GRADIENT
    last = max(int(name.split(".")[1]) for name in weights)
    for key, expected in case.outputs.items():
        if key.startswith("gradnorm/"):
            gradient = official_entry(of_params, key.removeprefix("gradnorm/"), last)
            np.testing.assert_allclose(np.linalg.norm(gradient), expected, rtol=GRADIENT, err_msg=key)
        if key.startswith("bn_after/"):
            statistic = official_entry(updated["batch_stats"], key.removeprefix("bn_after/"), last)
            assert relative_l2(statistic, expected) < OUTPUT, key


@pytest.mark.parametrize("name", cases("magvit2", "disc_patchgan[23]d.*"))
def test_open_magvit2_uses_the_same_discriminators(name):
    case = Case("magvit2", name)
    module, pixels = discriminator_of(case), case.input("x")
    variables = from_official(module, case.weights(), pixels)
    logits, _ = module.apply(variables, pixels, train=True, mutable=["batch_stats"])
    assert relative_l2(logits, case.outputs["logits"]) < OUTPUT


def small(norm="batch", dims=2, dtype=jnp.float32):
    make = patchgan_2d if dims == 2 else patchgan_3d
    return make(width=32, layers=1, norm=norm, dtype=dtype)


def test_image_discriminator_judges_the_frames_of_a_clip_as_images():
    clip = jax.random.uniform(jax.random.key(1), (2, 3, 16, 24, 3), minval=-1)
    module = small()
    variables = module.init(jax.random.key(0), clip)
    frames = clip.reshape(6, 16, 24, 3)
    chex.assert_trees_all_equal(module.apply(variables, clip), module.apply(variables, frames))
    chex.assert_shape(module.apply(variables, clip), (6, 6, 10, 1))


@pytest.mark.parametrize("norm", ["batch", "actnorm", "group", "none"])
def test_features_are_the_hidden_layers_and_logits_those_of_a_call(norm):
    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)
    module = small(norm)
    variables = module.init(jax.random.key(0), images)
    logits, features = module.apply(variables, images, method="features")
    chex.assert_trees_all_equal(logits, module.apply(variables, images))
    assert [feature.shape for feature in features] == [(2, 8, 8, 32), (2, 7, 7, 64)]
    has_norm = "norm_1" in variables["params"]
    assert has_norm == (norm != "none")
    assert ("bias" in variables["params"]["conv_1"]) == (norm != "batch")


@pytest.mark.parametrize("norm", ["batch", "actnorm", "group", "none"])
def test_training_gradient_reaches_every_parameter_and_pixel(norm):
    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)
    module = small(norm)
    variables = module.init(jax.random.key(0), images)

    def loss(params, images):
        logits = module.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])[0]
        return jnp.mean(jnp.square(logits - 1))

    gradients = jax.grad(loss, argnums=(0, 1))(variables["params"], images)
    chex.assert_tree_all_finite(gradients)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_initial_weights_are_those_of_the_recipe():
    module = patchgan_2d(width=32, layers=3)
    params = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    # Thousands of draws: their spread is within 5 % of 0.02.
    np.testing.assert_allclose(np.std(params["conv_2"]["kernel"]), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.mean(params["norm_2"]["scale"]), 1.0, atol=0.01)
    assert 0 < np.abs(params["conv_in"]["bias"]).max() <= 1 / np.sqrt(3 * 16)
    assert np.abs(params["norm_2"]["bias"]).max() == 0


def test_compute_dtype_is_bfloat16_inside_and_float32_outside():
    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)
    variables = small().init(jax.random.key(0), images)
    chex.assert_trees_all_equal_dtypes(variables, jax.tree.map(lambda x: np.zeros((), np.float32), variables))
    logits, features = small(dtype=jnp.bfloat16).apply(variables, images, method="features")
    assert logits.dtype == jnp.float32
    assert {feature.dtype for feature in features} == {jnp.dtype(jnp.bfloat16)}
    # Eight bits of mantissa through three layers.
    assert relative_l2(logits, small().apply(variables, images)) < 3e-2


def test_statistics_run_over_the_batch_of_all_devices():
    images = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3), minval=-1) * jnp.arange(8.0)[:, None, None, None]
    module = small()
    variables = module.init(jax.random.key(0), images)

    @jax.jit
    def apply(variables, images):
        return module.apply(variables, images, train=True, mutable=["batch_stats"])

    expected = apply(variables, images)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    with jax.set_mesh(mesh):
        actual = apply(variables, jax.device_put(images, NamedSharding(mesh, PartitionSpec("data"))))
    # Sums in another order.
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_wrong_pixels_and_names_are_refused():
    def shapes(module, pixels):
        jax.eval_shape(module.init, jax.random.key(0), pixels)

    images = jnp.zeros((1, 16, 16, 3))
    with pytest.raises(ValueError, match=r"takes pixels \(B, T, H, W, C\), got shape \(1, 16, 16, 3\)"):
        shapes(patchgan_3d(), images)
    with pytest.raises(ValueError, match=r"takes pixels .* got shape \(16, 16, 3\)"):
        shapes(patchgan_2d(), images[0])
    with pytest.raises(ValueError, match=r"shape \(1, 16, 16, 3\) are too small for 4 hidden layers"):
        shapes(patchgan_2d(layers=3), images)
    with pytest.raises(ValueError, match="unknown norm 'grp'. Did you mean 'group'"):
        shapes(small("grp"), images)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        patchgan_2d(layers=0)
    with pytest.raises(ValueError, match="one stride of 2 or 3 numbers per width"):
        shapes(PatchDiscriminator((4, 8), ((2, 2),), kernel=4), images)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("magvit2", "disc_patchgan[23]d.*"))
def test_open_magvit2_discriminators_have_the_same_slope(name):
    case = Case("magvit2", name)
    module, pixels = discriminator_of(case), case.input("x")
    variables = from_official(module, case.weights(), pixels)

    def mean_logit(pixels):
        return module.apply(variables, pixels, train=True, mutable=["batch_stats"])[0].mean()

    gradient = jax.jit(jax.grad(mean_logit))(pixels)
    expected = case.outputs["grad_of_mean_logit_wrt_input"]
    assert relative_l2(gradient.ravel()[: expected.size].reshape(expected.shape), expected) < GRADIENT


@pytest.mark.parametrize("name", cases("magvit2", "disc_blur_maskbit"))
def test_blur_discriminator_agrees_with_the_original(name):
    case = Case("magvit2", name)
    config, pixels, weights = case.meta["config"], case.input("x"), case.weights()
    module = blur_2d(width=config["hidden_channels"], layers=config["num_stages"])
    places = {"conv_in": "block_in.0", "conv_mid": "to_logits.0", "conv_out": "to_logits.2"}
    for stage in range(config["num_stages"]):
        places |= {f"conv_{stage}": f"blocks.{stage}.0", f"norm_{stage}": f"blocks.{stage}.2"}
    params = {}
    for layer, official in places.items():
        kernel = np.moveaxis(weights[f"{official}.weight"], (0, 1), (-1, -2)) if "conv" in layer else None
        scale = {"scale": weights[f"{official}.weight"]} if kernel is None else {"kernel": kernel}
        params[layer] = scale | {"bias": weights[f"{official}.bias"]}
    shapes = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)

    def mean_logit(pixels):
        logits = module.apply({"params": params}, pixels)
        return logits.mean(), logits

    gradient, logits = jax.jit(jax.grad(mean_logit, has_aux=True))(pixels)
    assert relative_l2(logits, case.outputs["logits"]) < OUTPUT
    expected = case.outputs["grad_of_mean_logit_wrt_input"]
    assert relative_l2(gradient.ravel()[: expected.size].reshape(expected.shape), expected) < GRADIENT
    with pytest.raises(ValueError, match="blur_2d has group norms"):
        blur_2d(norm="batch")
