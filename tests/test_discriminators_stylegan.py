"""The StyleGAN discriminator of MaskGIT: the published network, its losses, R1, and what it refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
from reference import Case, cases, relative_l2

from tokenizers.discriminators.stylegan import (
    StyleDiscriminator,
    StyleDiscriminator3d,
    blur_down,
    mean_down,
    mean_down_3d,
    stylegan_2d,
    stylegan_3d,
)
from tokenizers.losses.adversarial import DISCRIMINATOR, GENERATOR, r1_penalty

# Summation orders differ in float32. Observed on CPU: outputs 1e-6, gradients 1e-5.
OUTPUT, GRADIENT = 1e-4, 1e-3
LAYERS = {"Conv_0": "conv1", "Conv_1": "skip", "Conv_2": "conv2"}


def place(flax):
    """Our path of one of the authors' parameters."""
    *block, layer, kind = flax.split("/")
    if block:
        return f"block{re.search(r'[0-9]+', block[0])[0]}_{LAYERS[layer]}", kind
    names = {"Conv_0": "conv_in", "Conv_1": "conv_out", "Dense_0": "dense1", "Dense_1": "dense2"}
    return names[layer], kind


def official_parameters(case):
    params = {}
    for flax, shape, name, torch_shape in case.meta["flax_params"]:
        value = refweights.weight(name, tuple(torch_shape))
        for pattern, change in case.meta["weight_overrides"].items():
            if re.search(pattern, name):
                value = value * np.float32(change["scale"])
        value = np.moveaxis(value, (0, 1), (-1, -2)) if value.ndim > 1 else value
        assert list(value.shape) == shape
        layer, kind = place(flax)
        params.setdefault(layer, {})[kind] = value
    return params


@pytest.mark.slow  # R1 differentiates 20 million parameters twice
@pytest.mark.parametrize("name", cases("maskgit_vqgan", "jax_stylegan_disc.*"))
def test_logits_losses_and_gradients_are_those_of_the_original(name):
    case = Case("maskgit_vqgan", name)
    config, expected = case.meta["config"]["discriminator"], case.outputs
    module = StyleDiscriminator(64 * config["channel_multiplier"], blur=config["blur_resample"])
    params = official_parameters(case)
    real, fake = (
        refweights.image_like(e["seed_name"], e["shape"]) for e in map(case.meta["inputs"].get, ("real", "fake"))
    )
    shapes = jax.eval_shape(module.init, jax.random.key(0), real)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)

    def judge(params, images):
        return module.apply({"params": params}, images)

    real_logits, fake_logits = (jax.jit(judge)(params, images) for images in (real, fake))
    assert relative_l2(real_logits, expected["logits_real"]) < OUTPUT
    assert relative_l2(fake_logits, expected["logits_fake"]) < OUTPUT
    for kind, ours in (("hinge", "hinge"), ("non-saturating", "non_saturating")):
        # Their hinge loss of the discriminator lacks the factor 1/2 of VQGAN's.
        scale = 2 if kind == "hinge" else 1
        value = scale * DISCRIMINATOR[ours](real_logits, fake_logits)
        np.testing.assert_allclose(value, expected[f"d_loss_{kind}"], rtol=OUTPUT)
        np.testing.assert_allclose(GENERATOR[ours](fake_logits), expected[f"g_loss_{kind}"], rtol=OUTPUT)

    names = case.meta["r1_grad_names"]

    def norms(gradients):
        return [np.linalg.norm(gradients[place(name)[0]][place(name)[1]]) for name in names]

    @jax.jit
    def slopes(params):
        def loss(params):
            return DISCRIMINATOR["non_saturating"](judge(params, real), judge(params, fake))

        of_fake = jax.grad(lambda y: GENERATOR["non_saturating"](judge(params, y)))(fake)
        return jax.grad(loss)(params), of_fake

    of_loss, of_fake = slopes(params)
    assert relative_l2(norms(of_loss), expected["d_grad_norms"]) < GRADIENT
    # Theirs is for images in [0, 1], which are (x + 1) / 2.
    assert relative_l2(2 * of_fake[:, ::2, ::2], expected["grad_fake"]) < GRADIENT

    def penalty(params):
        return 4 * case.meta["params"]["penalty_cost"] * r1_penalty(functools.partial(judge, params), real)

    value, of_penalty = jax.jit(jax.value_and_grad(penalty))(params)
    np.testing.assert_allclose(value, expected["r1_penalty"], rtol=GRADIENT)
    assert relative_l2(norms(of_penalty), expected["r1_grad_norms"]) < GRADIENT


def test_channels_follow_the_size():
    module = StyleDiscriminator()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))["params"]
    widths = [shapes["conv_in"]["kernel"].shape[-1]]
    widths += [shapes[f"block{i}_conv2"]["kernel"].shape[-1] for i in range(6)]
    assert widths == [64, 128, 256, 512, 512, 512, 512]
    assert shapes["dense1"]["kernel"].shape == (4 * 4 * 512, 512)
    assert not any("bias" in shapes[f"block{i}_skip"] for i in range(6))


def test_downsampling_by_hand():
    x = refweights.uniform("stylegan", (1, 4, 6, 2))
    rows = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    weights = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    expected = np.einsum("ij,ijc->c", weights, rows[0, 2:6, 2:6])
    np.testing.assert_allclose(blur_down(x)[0, 1, 1], expected, rtol=1e-5)
    np.testing.assert_allclose(mean_down(x)[0, 1, 2], x[0, 2:4, 4:6].mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 16, 32, 3), (1, 24, 24, 3), (1, 4, 4, 3)])
def test_sizes_that_do_not_halve_to_four_are_refused(shape):
    with pytest.raises(ValueError, match="square images whose side is a power of two"):
        jax.eval_shape(StyleDiscriminator().init, jax.random.key(0), jnp.zeros(shape))
    with pytest.raises(ValueError, match="no norm"):
        stylegan_2d(norm="batch")


def test_frames_of_clips_are_images():
    module = StyleDiscriminator(width=1)
    clip = jnp.zeros((2, 3, 8, 8, 3))
    logits = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), clip)[0])
    assert logits.shape == (6, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("magvit2", "magvit1_stylegan3d_disc_.*"))
def test_clips_are_judged_as_by_magvit(name):
    case = Case("magvit2", name)
    config, expected = case.meta["config"]["discriminator"], case.outputs
    module = StyleDiscriminator3d(config["filters"], tuple(config["channel_multipliers"]))
    params = {}
    for flax, shape, _ in case.meta["state_dict"]:
        layer, kind = place(flax.replace(".", "/"))
        torch_shape = (shape[-1], shape[-2], *shape[:-2]) if kind == "kernel" else shape
        value = refweights.weight(flax, tuple(torch_shape))
        params.setdefault(layer, {})[kind] = np.moveaxis(value, (0, 1), (-1, -2)) if kind == "kernel" else value
    real, fake = (2 * case.input(key) - 1 for key in ("video", "fake"))
    shapes = jax.eval_shape(module.init, jax.random.key(0), real)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    judge = functools.partial(module.apply, {"params": params})

    @jax.jit
    def judged(real, fake):
        # Theirs is for clips in [0, 1], which are (x + 1) / 2.
        return judge(real), judge(fake), 4 * 10 * r1_penalty(judge, real)

    real_logits, fake_logits, penalty = judged(real, fake)
    np.testing.assert_allclose(real_logits, expected["real_logit"], rtol=OUTPUT, atol=1e-6)
    np.testing.assert_allclose(fake_logits, expected["fake_logit"], rtol=OUTPUT, atol=1e-6)
    np.testing.assert_allclose(penalty, expected["r1_penalty(cost 10)"], rtol=GRADIENT)


def test_blocks_of_clips_round_up():
    # 16 frames of 128 x 128 through five blocks: 1 x 4 x 4 positions.
    module = stylegan_3d(8)
    clip = jax.ShapeDtypeStruct((2, 16, 128, 128, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), clip)["params"]
    assert shapes["dense1"]["kernel"].shape == (4 * 4 * 32, 32)
    x = refweights.uniform("stylegan3d", (1, 3, 4, 2, 2))
    down = mean_down_3d(x)
    np.testing.assert_allclose(down[0, 0, 1, 0], x[0, :2, 2:4].mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(down[0, 1, 1, 0], x[0, 2, 2:4].mean((0, 1)), rtol=1e-5)
    with pytest.raises(ValueError, match="takes pixels"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="at least one block"):
        stylegan_3d(layers=0)
