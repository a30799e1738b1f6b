"""Perceptual losses: the authors' values and gradients, and how frames of a video count."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
from reference import Case, cases, relative_l2

from tokenizers.convert.engine import to_tree
from tokenizers.convert.lpips import trunk_table
from tokenizers.losses import perceptual
from tokenizers.networks.lpips import LPIPS
from tokenizers.networks.vgg import VGG16

GRAM_CASES = cases("cosmos", "train_loss_perceptual_gram")


@functools.cache
def frozen_vgg():
    """VGG-16 with the weights of the Cosmos case: He scale, so that the last tap is as large as the first."""
    module = VGG16()
    target = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    state = {}
    for rule, leaf in zip(trunk_table("vgg"), target["params"].values(), strict=True):
        for kind, shape in (("weight", np.array(leaf["kernel"].shape)[[3, 2, 0, 1]]), ("bias", leaf["bias"].shape)):
            name = rule.official.replace("{leaf}", kind)
            scale = np.float32(1.41421356 if kind == "weight" else 1)
            state[name] = refweights.weight(name, tuple(int(n) for n in shape)) * scale
    return module, to_tree(trunk_table("vgg"), target, state)


@functools.cache
def frozen_lpips():
    module = LPIPS(net="alex")
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    flat, tree = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), x, x))
    return module, jax.tree.unflatten(tree, [refweights.weight(str(i), leaf.shape) for i, leaf in enumerate(flat)])


@functools.cache
def weighted():
    """Both terms with weights, and the gradient of their sum by the prediction."""
    module, _ = frozen_vgg()

    def total(prediction, target, variables, weights):
        terms = perceptual.vgg_per_sample(module, variables)(prediction, target)
        terms = {name: weights[name] * value for name, value in terms.items()}
        return sum(value.mean() for value in terms.values()), terms

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.mark.parametrize("case", GRAM_CASES)
@pytest.mark.parametrize(
    "kind", [pytest.param("img", marks=pytest.mark.slow), "vid", pytest.param("one", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("iteration", "content", "gram"), [("it0", 0.1, 0.0), ("it600000", 0.073, 0.062)])
def test_content_and_gram_terms_equal_cosmos(case, kind, iteration, content, gram):
    case = Case("cosmos", case)
    assert all(re.fullmatch(r"features\.\d+\.(weight|bias)", name) for name, _, _ in case.meta["state_dict"])
    target, prediction = case.input(f"{kind}_x"), case.input(f"{kind}_y")
    weights = {"content": content, "gram": gram}
    (_, terms), gradient = weighted()(prediction, target, frozen_vgg()[1], weights)
    key = f"{kind}/{iteration}"
    for ours, theirs in (("content", "lpips"), ("gram", "gram")):
        if weights[ours]:
            assert relative_l2(terms[ours], case.outputs[f"{key}/{theirs}_per_sample"]) < 1e-5  # 3e-7 measured
    # The slope of |a - b| jumps where two features are equal up to rounding: a few signs differ (4e-4 measured).
    assert relative_l2(gradient, case.outputs[f"{key}/grad"]) < 1e-3


VIDEO = (2, 3, 32, 32, 3)


def test_scalar_losses_are_means_of_the_per_sample_terms():
    module, variables = frozen_vgg()
    names = {"content": perceptual.content_loss, "gram": perceptual.gram_loss}

    def both(variables, x, y):
        scalars = {name: loss(module, variables)(x, y) for name, loss in names.items()}
        return perceptual.vgg_per_sample(module, variables)(x, y), scalars

    per_sample, scalars = jax.jit(both)(variables, *(refweights.image_like(name, VIDEO) for name in "xy"))
    for name in names:
        chex.assert_shape(per_sample[name], (2,))
        chex.assert_shape(scalars[name], ())
        np.testing.assert_allclose(scalars[name], per_sample[name].mean(), rtol=1e-5)


def test_gram_ignores_time_and_content_does_not():
    x = refweights.image_like("x", VIDEO)
    weights = {"content": 1.0, "gram": 1.0}
    (_, terms), _ = weighted()(x[:, ::-1], x, frozen_vgg()[1], weights)
    np.testing.assert_allclose(terms["gram"], 0, atol=1e-9)  # sums over frames in another order
    assert np.all(terms["content"] > 1e-2)


def test_lpips_of_a_video_is_the_mean_over_its_frames():
    module, variables = frozen_lpips()
    x, y = (refweights.image_like(name, VIDEO) for name in "xy")
    image = jax.jit(module.apply)
    frames = np.stack([image(variables, x[:, t], y[:, t]) for t in range(3)], axis=1)
    per_sample = jax.jit(perceptual.lpips_per_sample(module, variables))
    np.testing.assert_allclose(per_sample(x, y), frames.mean(1), rtol=1e-5)
    np.testing.assert_allclose(per_sample(x[:, 0], y[:, 0]), frames[:, 0], rtol=1e-5)
    # A step that takes the weights as an argument gives the same.
    step = jax.jit(lambda variables, x, y: perceptual.lpips_loss(module, variables)(x, y))
    np.testing.assert_allclose(step(variables, x, y), frames.mean(), rtol=1e-5)


def test_other_ranks_are_refused():
    module, variables = frozen_lpips()
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\) or \(B, T, H, W, 3\), got shape \(32, 32, 3\)"):
        perceptual.lpips_loss(module, variables)(jnp.zeros((32, 32, 3)), jnp.zeros((32, 32, 3)))
