"""Alignment and equivariance in a run: from the config to the step, and what they refuse."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from tokenizers import registry
from tokenizers.losses.equivariance import Draw, Equivariance, Transform
from tokenizers.networks import foundation
from tokenizers.nn.resample import depth_to_space, space_to_depth
from tokenizers.quantize.gaussian import DiagonalGaussian
from tokenizers.quantize.vq import VectorQuantizer
from tokenizers.train import build, loop, objective
from tokenizers.train.state import new_state
from tokenizers.train.step import make_step


class Patches(nn.Module):
    """Two matrices around a Gaussian bottleneck: the smallest network with one latent per 16x16 pixels."""

    bottleneck: nn.Module = DiagonalGaussian()

    def setup(self):
        self.to_codes, self.from_codes = nn.Dense(8), nn.Dense(3 * 16**2)

    @property
    def spec(self):
        spec = registry.build("vavae", latent_channels=4).spec
        return dataclasses.replace(spec, codebook_size=self.bottleneck.codebook_size)

    def encode(self, pixels, train=False):
        return self.bottleneck(self.to_codes(space_to_depth(pixels, (16, 16))), train)

    def decode(self, latents, train=False):
        return depth_to_space(self.from_codes(latents), (16, 16))

    def __call__(self, pixels, train=False):
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


def small_config(**equivariance):
    config = base.get_base()
    config.precision = "float32"
    config.model.update({"name": "vavae", "latent_channels": 4})
    config.loss.bottleneck.kl = 1e-6
    config.loss.alignment.layer = "to_codes/kernel"
    config.loss.equivariance.update(equivariance)
    return config


def recipe_of(config):
    return dataclasses.replace(build.recipe(config.to_dict()), model=Patches())


def state_of(recipe):
    params = {
        "model": recipe.model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))["params"],
        "objective": dict(recipe.objective.params),
    }
    return new_state(params, {}, params["model"], recipe.optimizer.init(params), None)


PIXELS = np.random.default_rng(0).integers(0, 256, (2, 1, 64, 64, 3), np.uint8)


def test_draws_follow_from_seed_and_step():
    recipe = build.recipe(small_config(probability=0.5, smaller=0.5, scales=(0.5,)).to_dict())
    assert recipe.equivariance == Equivariance(0.5, 0.5, (0.5,))
    drawn = [recipe.at(step).draws for step in range(40)]
    assert drawn == [recipe.at(step).draws for step in range(40)]
    assert all(first == second for first, second in drawn)  # the discriminator's turn sees the same
    assert len({first for first, _ in drawn}) == 5  # three turns, smaller, none
    other = dataclasses.replace(recipe, seed=1)
    assert [other.at(step).draws for step in range(40)] != drawn


def test_both_are_off_unless_asked_for():
    recipe = build.recipe(small_config().to_dict())
    assert recipe.equivariance is None
    assert recipe.objective.alignment is None
    assert recipe.at(3).draws == (Draw(), Draw())


def test_a_transformed_step_compares_the_transformed_image():
    """Its loss is that of decoded turned latents against the turned small image, computed here by hand."""
    recipe = recipe_of(small_config(probability=1.0, scales=(0.5,)))
    transform = Transform((0.5, 0.5), 1)
    # Without noise: latents are the mean.
    quiet = Patches(DiagonalGaussian(min_logvar=-60.0, max_logvar=-60.0))
    recipe = dataclasses.replace(recipe, model=quiet, equivariance=None, draws=(Draw(latents=transform),) * 2)
    state = state_of(recipe)
    _, metrics = jax.jit(make_step(recipe))(state, {}, {"pixels": PIXELS})
    pixels = jnp.asarray(PIXELS[:, 0] / 127.5 - 1, jnp.float32)
    variables = {"params": state.params["model"]}
    latents = quiet.apply(variables, pixels, method="encode").latents
    decoded = quiet.apply(variables, transform(latents), method="decode")
    np.testing.assert_allclose(metrics["loss/l1"], jnp.abs(decoded - transform(pixels)).mean(), rtol=1e-5)
    assert decoded.shape == (2, 32, 32, 3)


def test_of_discrete_tokenizers_the_features_are_transformed():
    """What is decoded are codes of the codebook, of features scaled and turned before they were quantized."""
    vq = VectorQuantizer(16, 8, codebook_init=jax.nn.initializers.normal(0.5))
    config = small_config(probability=1.0, scales=(0.5,))
    config.model = {"name": "vqgan-imagenet-f16-1024", "widths": (32, 32), "blocks": 1, "attention": ()}
    config.loss.bottleneck = {"commitment": 1.0, "codebook": 0.25}
    assert build.recipe(config.to_dict()).equivariance == Equivariance(1.0, 0.0, (0.5,))
    transform, model = Transform((0.5, 0.5), 1), Patches(vq)
    recipe = recipe_of(config)
    recipe = dataclasses.replace(recipe, model=model, equivariance=None, draws=(Draw(latents=transform),) * 2)
    state = state_of(recipe)
    _, metrics = jax.jit(make_step(recipe))(state, {}, {"pixels": PIXELS})
    pixels = jnp.asarray(PIXELS[:, 0] / 127.5 - 1, jnp.float32)
    variables = {"params": state.params["model"]}

    def by_hand(model):
        features = model.to_codes(space_to_depth(pixels, (16, 16)))
        encoding = model.bottleneck(transform(features))
        return model.decode(encoding.latents), encoding.losses["commitment"]

    decoded, commitment = model.apply(variables, method=by_hand)
    assert decoded.shape == (2, 32, 32, 3)
    np.testing.assert_allclose(metrics["loss/l1"], jnp.abs(decoded - transform(pixels)).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/commitment"], commitment, rtol=1e-5)


@pytest.mark.slow
def test_a_run_with_transforms_trains(tmp_path):
    config = small_config(probability=1.0, scales=(0.5,))
    config.model.update({"widths": (32, 32), "blocks": 1, "attention": (), "middle_attention": False})
    config.steps = 2
    config.data = base.data(source="embedded", held_out="0.1")
    config.data.streams["image"] = base.stream(batch_size=8, resolutions=((16, 16),))
    config.evaluation.update({"max_items": 4, "final_report": False})
    config.log.tensorboard = False
    assert loop.run(config, tmp_path / "run")


@pytest.fixture
def tiny_foundation(monkeypatch):
    module = foundation.VisionTransformer(width=8, depth=1, heads=2, table=2)
    variables = module.init(jax.random.key(1), np.zeros((1, 32, 32, 3), np.float32))
    monkeypatch.setattr(foundation, "load", lambda name, path: (module, dict(variables)))


@pytest.mark.parametrize("project", ["latents", "features"])
def test_alignment_reaches_encoder_and_projection(tiny_foundation, project):
    config = small_config()
    config.loss.alignment.update({"network": "mae_large", "weight": 0.5, "project": project})
    recipe = recipe_of(config)
    shapes = {"latents": {"kernel": (4, 8)}, "features": {"kernel": (8, 4), "bias": (4,)}}[project]
    assert {k: v.shape for k, v in recipe.objective.params["alignment"].items()} == shapes
    state = state_of(recipe)
    new, metrics = jax.jit(make_step(recipe))(state, recipe.objective.frozen, {"pixels": PIXELS})
    assert metrics["alignment_weight"] > 0
    parts = metrics["loss/alignment_cosine"] + metrics["loss/alignment_distance"]
    np.testing.assert_allclose(metrics["loss/alignment"], parts, rtol=1e-6)
    total = metrics["loss/l1"] + 1e-6 * metrics["loss/kl"] + metrics["alignment_weight"] * metrics["loss/alignment"]
    np.testing.assert_allclose(metrics["loss/generator"], total, rtol=1e-5)
    for name in shapes:
        assert np.any(new.params["objective"]["alignment"][name] != state.params["objective"]["alignment"][name])
    # Without the reconstruction loss in the way: alignment alone moves the encoder and leaves the decoder.
    terms = (dataclasses.replace(recipe.objective.terms[0], weight=0.0),)
    aligner = dataclasses.replace(recipe.objective.alignment, layer="")
    only = dataclasses.replace(recipe.objective, terms=terms, alignment=aligner, bottleneck={"kl": 0.0})
    new, metrics = jax.jit(make_step(dataclasses.replace(recipe, objective=only)))(
        state, recipe.objective.frozen, {"pixels": PIXELS}
    )
    assert metrics["alignment_weight"] == 0.5

    def moved(part):
        return np.any(new.params["model"][part]["kernel"] != state.params["model"][part]["kernel"])

    assert moved("to_codes")
    assert not moved("from_codes")


def test_tokenizers_they_are_not_for_are_refused(tiny_foundation):
    config = small_config(probability=0.5)
    config.model = {"name": "titok-l32"}
    with pytest.raises(ValueError, match=r"maps of latents.*\(1, 32, 12\)"):
        build.recipe(config.to_dict())
    config = small_config()
    config.loss.alignment.network = "dinov2_large"
    loss = config.loss.to_dict()
    with pytest.raises(ValueError, match=r"one per 16x16 pixels"):
        objective.build(loss, registry.build("kl-f8").spec)
    loss["alignment"]["project"] = "both"
    with pytest.raises(ValueError, match="alignment projection of 'both'.*latents"):
        objective.build(loss, registry.build("vavae").spec)
