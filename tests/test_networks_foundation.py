"""DINOv2 and MAE against timm's models, as VA-VAE reads them."""

import chex
import jax
import numpy as np
import pytest
from reference import Case, cases, relative_l2

from tokenizers.convert import foundation as names
from tokenizers.convert.engine import to_official
from tokenizers.networks import foundation
from tokenizers.networks.weights import MissingWeights

# Summation orders differ in float32. Observed on CPU: tiny models 1e-6, the large one 2e-6.
OUTPUT = 1e-4


def module_of(kwargs):
    """The module of a config in timm's words."""
    fields = {"embed_dim": "width", "depth": "depth", "num_heads": "heads", "patch_size": "patch"}
    found = {ours: kwargs[theirs] for theirs, ours in fields.items() if theirs in kwargs}
    table = kwargs["img_size"] // kwargs["patch_size"]
    return foundation.VisionTransformer(**found, table=table, layer_scale="init_values" in kwargs)


@pytest.mark.parametrize("name", cases("vavae", "aux_.*tiny"))
def test_features_are_those_of_the_original(name):
    case = Case("vavae", name)
    module = module_of(case.meta["config"]["kwargs"])
    variables = foundation.variables(module, case.weights())
    features = jax.jit(module.apply)(variables, case.input("image"))
    assert relative_l2(features, case.outputs["feature"]) < OUTPUT


@pytest.mark.slow  # 300 million parameters are made from their names: a minute
@pytest.mark.parametrize("name", cases("vavae", "aux_dinov2_vitl14_full"))
def test_features_of_the_released_size_are_those_of_the_original(name):
    case = Case("vavae", name)
    module = foundation.VisionTransformer(**foundation.FOUNDATION["dinov2_large"][0])
    variables = foundation.variables(module, case.weights())
    features = np.asarray(jax.jit(module.apply)(variables, case.input("image")))
    reduce = case.meta["reduce"].get("feature", ())
    assert relative_l2(features[tuple(slice(*part) for part in reduce)], case.outputs["feature"]) < OUTPUT


@pytest.mark.parametrize(("name", "count"), [("dinov2_large", 304367616), ("mae_large", 303301632)])
def test_released_sizes(name, count):
    """Parameters of timm's models of that name: no classifier, no mask token."""
    module = foundation.VisionTransformer(**foundation.FOUNDATION[name][0])
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 64, 32, 3), np.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    out = jax.eval_shape(module.apply, shapes, np.zeros((1, 64, 32, 3), np.float32))
    assert out.shape == (1, 4, 2, 1024)


def test_a_checkpoint_of_vavae_holds_its_foundation_model():
    module = foundation.VisionTransformer(width=8, depth=1, heads=2, patch=4, table=2)
    variables = module.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    state = {f"foundation_model.model.{name}": value for name, value in to_official(names.TABLE, variables).items()}
    found = foundation.variables(module, state | {"encoder.conv_in.bias": np.ones(3, np.float32)})
    chex.assert_trees_all_equal(found, dict(variables))
    del state["foundation_model.model.blocks.0.norm1.weight"]
    with pytest.raises(ValueError, match=r"missing 'blocks\.0\.norm1\.weight'"):
        foundation.variables(module, state)


def test_what_does_not_fit_is_refused(monkeypatch, tmp_path):
    module = foundation.VisionTransformer(width=8, depth=1, heads=2, table=2)
    with pytest.raises(ValueError, match=r"multiples of 16; got shape \(1, 24, 32, 3\)"):
        module.init(jax.random.key(0), np.zeros((1, 24, 32, 3), np.float32))
    with pytest.raises(ValueError, match="foundation model 'dino'.*dinov2_large"):
        foundation.load("dino")
    monkeypatch.setenv("TOKENIZERS_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingWeights, match="dinov2_vitl14_pretrain.pth"):
        foundation.load("dinov2_large")


def test_registers_are_dinov2s():
    """Against transformers' DINOv2 with registers, which has the official weights under other names."""
    case = Case("foundation", "dinov2_registers")
    module = foundation.VisionTransformer(**case.meta["config"])
    variables = foundation.variables(module, case.weights())
    image, places = case.input("image"), case.meta["config"]["table"]
    tokens = jax.jit(lambda v, x: module.apply(v, x, method="tokens")[0])(variables, image)
    assert relative_l2(tokens, case.outputs["tokens"]) < OUTPUT
    features = module.apply(variables, image)
    np.testing.assert_allclose(features.reshape(2, places**2, -1), tokens[:, 5:], atol=1e-5)
    # timm's files have the class token's position in the token, and another name for the registers.
    timm = case.weights()
    timm["reg_token"] = timm.pop("register_tokens")
    timm["cls_token"] = timm["cls_token"] + timm["pos_embed"][:, :1]
    timm["pos_embed"] = timm["pos_embed"][:, 1:]
    other = jax.jit(lambda v, x: module.apply(v, x, method="tokens")[0])(foundation.variables(module, timm), image)
    np.testing.assert_allclose(other, tokens, atol=1e-5)
