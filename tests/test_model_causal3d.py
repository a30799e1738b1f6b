"""The causal 3D tokenizer: shapes, causality, images as clips, gradients, remat and sharding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights

from tokenizers import registry
from tokenizers.parallel import mesh as meshes

FIELDS = {
    "bottleneck": {"name": "fsq", "levels": (8, 8, 8), "commitment": True},
    "latent_channels": 3,
    "channels": (8, 16),
    "patch": 2,
    "space_down": (True, False),
    "time_down": (True, True),
}
CLIP = refweights.image_like("causal3d", (2, 9, 16, 24, 3))


@pytest.fixture(scope="module")
def model():
    return registry.build("causal3d", **FIELDS)


@pytest.fixture(scope="module")
def variables(model):
    """Weights of a model in use: at its start the nonlinear half would be switched off and prove nothing."""
    start = jax.jit(model.init)(jax.random.key(0), CLIP)
    leaves, tree = jax.tree.flatten(start)
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * refweights.uniform(f"leaf{i}", leaf.shape) for i, leaf in enumerate(leaves)]
    )


def test_released_size_has_the_documented_shapes():
    module = registry.build("causal3d-fsq-488-16777216")
    shapes = registry.abstract_variables(module)
    pixels = jax.ShapeDtypeStruct((1, 9, 256, 256, 3), jnp.float32)
    reconstruction, encoding = jax.eval_shape(module.apply, shapes, pixels)
    chex.assert_shape(reconstruction, pixels.shape)
    chex.assert_shape(encoding.latents, (1, 3, 32, 32, 8))
    chex.assert_shape(encoding.indices, (1, 3, 32, 32))
    assert 3.9e6 < registry.parameter_count(module) < 4.1e6


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_encode_and_decode_agree_with_the_call(self):
        model = registry.build("causal3d", **FIELDS)
        weights = model.init(jax.random.key(0), CLIP[:, :5])
        encode = self.variant(lambda x: model.apply(weights, x, method="encode"))
        decode = self.variant(lambda z: model.apply(weights, z, method="decode"))
        reconstruction, encoding = model.apply(weights, CLIP[:, :5])
        chex.assert_trees_all_close(encode(CLIP[:, :5]).latents, encoding.latents, atol=1e-6)
        chex.assert_trees_all_close(decode(encoding.latents), reconstruction, atol=1e-5)


@pytest.mark.parametrize("changed", [1, 4, 5, 8])
def test_a_frame_never_changes_what_comes_before_it(model, variables, changed):
    other = CLIP.copy()
    other[:, changed:] = -other[:, changed:]
    apply = jax.jit(model.apply)
    (reconstruction, encoding), (again, encoding_again) = apply(variables, CLIP), apply(variables, other)
    first_token = -(-changed // 4)  # frame 0 is token 0, frames 1..4 are token 1, ...
    np.testing.assert_array_equal(encoding.indices[:, :first_token], encoding_again.indices[:, :first_token])
    assert (np.asarray(encoding.indices[:, first_token:]) != np.asarray(encoding_again.indices[:, first_token:])).any()
    untouched = 1 + 4 * (first_token - 1)
    # Same arithmetic on the same numbers: equal to the last bit.
    np.testing.assert_array_equal(reconstruction[:, :untouched], again[:, :untouched])


def test_an_image_is_the_first_frame_of_a_clip(model, variables):
    clip, _ = model.apply(variables, CLIP)
    image, encoding = model.apply(variables, CLIP[:, :1])
    chex.assert_shape(encoding.indices, (2, 1, 4, 6))
    # One frame takes the 2D path of the convolutions, which sums the taps in another order.
    chex.assert_trees_all_close(image[:, 0], clip[:, 0], atol=1e-5)


def test_indices_lead_back_to_the_latents(model, variables):
    encoding = model.apply(variables, CLIP, method="encode")
    latents = model.apply(variables, encoding.indices, method="indices_to_latents")
    chex.assert_trees_all_close(latents, encoding.latents, atol=1e-6)


@pytest.mark.slow
def test_every_parameter_has_a_gradient_and_remat_does_not_change_it(model, variables):
    def gradient(module):
        def loss(params):
            reconstruction, encoding = module.apply({"params": params}, CLIP, train=True)
            return jnp.square(reconstruction - CLIP).mean() + encoding.losses["commitment"]

        return jax.jit(jax.grad(loss))(variables["params"])

    plain, remat = gradient(model), gradient(model.clone(remat=True))
    chex.assert_tree_all_finite(plain)
    norms = jax.tree.map(lambda leaf: float(jnp.abs(leaf).max()), plain)
    assert all(norm > 0 for norm in jax.tree.leaves(norms)), norms
    # The recomputed forward pass may be fused differently.
    chex.assert_trees_all_close(plain, remat, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", [{"data": 2, "fsdp": 2, "context": 2}, {"data": 1, "fsdp": 2, "context": 4}])
def test_eight_devices_give_the_numbers_of_one(model, variables, layout):
    expected, encoding = model.apply(variables, CLIP)
    with jax.set_mesh(meshes.make_mesh(**layout, split="height")):
        actual, sharded = jax.jit(model.apply)(variables, CLIP)
    np.testing.assert_array_equal(sharded.indices, encoding.indices)
    chex.assert_trees_all_close(actual, expected, atol=1e-5)


def test_levels_must_match():
    with pytest.raises(ValueError, match="one entry per level"):
        registry.build("causal3d", **{**FIELDS, "channels": (8,)}).init(jax.random.key(0), CLIP)
    with pytest.raises(ValueError, match="3 channels, not 4"):
        registry.build("causal3d", **{**FIELDS, "latent_channels": 4}).init(jax.random.key(0), CLIP)
