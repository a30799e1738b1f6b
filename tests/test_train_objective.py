"""The objective of a run: each term of ``config.loss`` arrives with its weight, and nothing is silently left out."""

import chex
import jax
import numpy as np
import pytest
import refweights

from configs import base
from tokenizers.losses import perceptual
from tokenizers.networks import vgg
from tokenizers.networks.weights import MissingWeights
from tokenizers.train import objective

TARGET = refweights.image_like("objective/target", (1, 2, 16, 16, 3))
PREDICTION = 0.8 * TARGET


def loss_config(**changes):
    config = base.get_base().loss
    config.update(changes)
    return config.to_dict()


@pytest.fixture(scope="module")
def vgg16():
    module = vgg.VGG16()
    return module, jax.jit(module.init)(jax.random.key(0), TARGET[:, 0])


def test_content_and_gram_terms_are_those_of_the_loss_functions(vgg16, monkeypatch):
    monkeypatch.setattr(vgg, "load", lambda path=None: vgg16)
    layers = (0.0, 1.0, 0.0, 0.5, 0.0)
    built = objective.build(loss_config(content_weight=0.5, gram_weight=2.0, vgg_layers=layers))
    loss = jax.jit(lambda p, t, frozen: built.reconstruction(p, t, frozen, {}))
    total, parts = loss(PREDICTION, TARGET, dict(built.frozen))
    content = perceptual.content_loss(*vgg16, layers)(PREDICTION, TARGET)
    gram = perceptual.gram_loss(*vgg16, layers)(PREDICTION, TARGET)
    chex.assert_trees_all_close((parts["content"], parts["gram"]), (content, gram), rtol=1e-5)
    np.testing.assert_allclose(total, parts["l1"] + 0.5 * content + 2.0 * gram, rtol=1e-5)


@pytest.mark.parametrize("layers", [(1.0, 1.0), (0.0,) * 5, (1.0, -1.0, 0.0, 0.0, 0.0)])
def test_layers_of_vgg_are_five_weights(layers, vgg16, monkeypatch):
    assert tuple(base.get_base().loss.vgg_layers) == perceptual.COSMOS_LAYER_WEIGHTS
    monkeypatch.setattr(vgg, "load", lambda path=None: vgg16)
    with pytest.raises(ValueError, match="vgg_layers=.* must be 5 numbers"):
        objective.build(loss_config(gram_weight=1.0, vgg_layers=layers))


@pytest.mark.parametrize("changes", [{"perceptual": "lpips_vgg"}, {"gram_weight": 1.0}])
def test_a_perceptual_loss_without_weights_is_refused(changes, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_WEIGHTS", raising=False)
    with pytest.raises(MissingWeights, match="TOKENIZERS_WEIGHTS"):
        objective.build(loss_config(**changes))


def test_no_perceptual_loss_is_an_explicit_choice():
    built = objective.build(loss_config(perceptual=None))
    assert [term.name for term in built.terms] == ["l1"]
    assert not built.frozen


def test_every_bottleneck_term_needs_a_weight_and_every_weight_a_term():
    built = objective.build(loss_config(bottleneck={"commitment": 0.25}))
    total, _ = built.regularization({"commitment": np.float32(2.0)})
    assert total == 0.5
    with pytest.raises(ValueError, match="no weight for \\['kl'\\]"):
        built.regularization({"commitment": np.float32(1.0), "kl": np.float32(1.0)})
    with pytest.raises(ValueError, match="weights \\['commitment'\\], which this bottleneck does not return"):
        built.regularization({})


@pytest.mark.parametrize("changes", [{"reconstruction": "l3"}, {"reduction": "meen"}, {"perceptual": "lpips_vg"}])
def test_unknown_names_get_the_nearest_match(changes):
    with pytest.raises(ValueError, match="Did you mean"):
        objective.build(loss_config(**changes))
