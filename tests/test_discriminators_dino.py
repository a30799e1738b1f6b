"""The discriminator that looks through DINOv2: what its heads see, what learns, and a whole step from a config."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import save_file

from tokenizers.convert import foundation as names
from tokenizers.convert.engine import to_official
from tokenizers.discriminators.dino import DinoDiscriminator, Head, LocalBatchNorm, dino_2d
from tokenizers.networks import foundation
from tokenizers.networks.weights import MissingWeights
from tokenizers.train.config import to_dict
from tokenizers.train.step import make_step

TINY = {"width": 12, "depth": 4, "heads": 2, "patch": 14, "table": 2, "layer_scale": True}
PIXELS = np.random.default_rng(0).uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A tiny DINOv2 in the authors' names, under the name of the small one."""
    monkeypatch.setitem(foundation.FOUNDATION, "dinov2_small", (TINY, "dinov2_vits14"))
    network = foundation.VisionTransformer(**TINY)
    variables = jax.jit(network.init)(jax.random.key(1), PIXELS)
    path = tmp_path / "dinov2.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in to_official(names.TABLE, variables).items()}, path)
    return path, network, variables


@pytest.mark.slow
def test_heads_see_tokens_of_several_depths(weights):
    path, network, variables = weights
    loaded = foundation.load("dinov2_small", path)
    module, frozen = dino_2d(loaded[0]), {"weights": loaded[1]}
    assert module.depths == (0, 1, 2, 3)
    chex.assert_trees_all_close(frozen["weights"], dict(variables), rtol=1e-6)
    state = dict(jax.jit(module.init)(jax.random.key(0), PIXELS))
    # Only the heads are parameters: five of them, for 2 x 2 tokens of each image.
    assert set(state["params"]) == {f"head{i}" for i in range(5)}
    state["frozen"] = frozen
    (logits, features), new = module.apply(state, PIXELS, train=True, mutable=["batch_stats"], method="features")
    chex.assert_shape(logits, (4, 5 * 4, 1))
    chex.assert_shape(features, (4, 4, 12))
    assert set(new) == {"batch_stats"}
    # The same by hand, for the deepest head: ImageNet's standardization, the class token added to each patch.
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    _, taps = network.apply(frozen["weights"], ((PIXELS + 1) / 2 - mean) / std, (3,), method="tokens")
    assert len(taps) == 2
    tokens = taps[1][:, 1:] + taps[1][:, :1]
    head = {"params": state["params"]["head4"], "batch_stats": state["batch_stats"]["head4"]}
    (expected, _), _ = Head().apply(head, tokens, True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits[:, -4:], expected, rtol=1e-5, atol=1e-5)


def test_spectral_norm_bounds_the_kernels(weights):
    """However large the parameters are, the logits stay: the largest singular value is divided out."""
    module = dino_2d(weights[1], norm="group")
    state = dict(jax.jit(module.init)(jax.random.key(0), PIXELS))
    step = jax.jit(lambda state: module.apply(state, PIXELS, train=True, mutable=["batch_stats"]))

    def settled(params):
        now = state | {"params": params}
        for _ in range(30):  # power iterations
            logits, new = step(now)
            now |= new
        return logits

    scaled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 10 * leaf if path[-1].key == "kernel" else leaf, state["params"]
    )
    np.testing.assert_allclose(settled(scaled), settled(state["params"]), rtol=1e-3, atol=1e-4)


def test_local_batch_norm_looks_at_eight_items():
    x = np.random.default_rng(0).normal(2, 3, (16, 5, 6)).astype(np.float32)
    out, _ = LocalBatchNorm().init_with_output(jax.random.key(0), x)
    for part in (slice(0, 8), slice(8, 16)):
        expected = (x[part] - x[part].mean((0, 1))) / np.sqrt(x[part].var((0, 1)) + 1e-5)
        np.testing.assert_allclose(out[part], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_step_from_a_config(weights):
    """The heads learn, and their gradient reaches the pixels; the transformer is no part of the state."""
    config = tiny_run.get_config()
    config.discriminator.update({"name": "dino_2d", "path": str(weights[0]), "channels": 0, "norm": "batch"})
    config.discriminator.start = config.discriminator.generator_start = 0
    for stream in config.data.streams.values():
        stream.resolutions = ((32, 32),)
    _, recipe, state, _ = tiny_run.parts(config, jax.devices()[:1])
    assert set(recipe.objective.frozen) == {"discriminator"}
    assert not any("frozen" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
    step = jax.jit(make_step(recipe.at(0)))
    pixels = jnp.asarray(PIXELS)[:, None]
    new, metrics = step(state, recipe.objective.frozen, {"pixels": pixels})
    assert int(new.skipped) == 0
    # The weight would be at its maximum, were the gradient of the logits zero.
    assert 0 < metrics["adaptive_weight"] < 0.8 * 1e4
    for before, after in zip(*map(jax.tree.leaves, (state.adversary.params, new.adversary.params)), strict=True):
        assert np.any(before != after)


def test_what_it_refuses(weights, monkeypatch):
    module = DinoDiscriminator(weights[1], norm="actnorm")
    with pytest.raises(ValueError, match="norm 'actnorm'.*batch"):
        module.init(jax.random.key(0), PIXELS)
    with pytest.raises(ValueError, match="multiples of 16"):
        DinoDiscriminator(weights[1]).init(jax.random.key(0), PIXELS[:, :24])
    monkeypatch.delenv("TOKENIZERS_WEIGHTS", raising=False)
    config = tiny_run.get_config()
    config.discriminator.name = "dino_2d"
    with pytest.raises(MissingWeights, match="DINOv2 ViT-S/14"):
        tiny_run.parts(config, jax.devices()[:1])
    assert to_dict(config)["discriminator"]["network"] == "dinov2_small"
