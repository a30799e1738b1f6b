"""The encoder and decoder of VQGAN's family: sizes, where attention is, resampling, dropout, remat, dtypes.

That the numbers are the authors' is shown by the tests of the models built on them.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refweights import uniform

from tokenizers.nn.compvis import Decoder, Encoder
from tokenizers.parallel import mesh as meshes

FIELDS = {"widths": (8, 16, 16), "blocks": 1, "num_groups": 4}
SMALL = {"widths": (8, 16), "blocks": 1, "num_groups": 4}  # where something is compiled
X = uniform("compvis", (2, 16, 24, 3))


def shapes(module, x):
    return jax.eval_shape(module.init, jax.random.key(0), x)["params"]


def filled(module, x):
    """Parameters without compiling their initialization."""
    leaves, tree = jax.tree.flatten(shapes(module, x))
    values = [uniform(f"compvis/{i}", leaf.shape) / np.sqrt(leaf.size) for i, leaf in enumerate(leaves)]
    return {"params": jax.tree.unflatten(tree, values)}


def test_levels_halve_and_double():
    encoder, decoder = Encoder(5, **FIELDS), Decoder(3, **FIELDS)
    latents = jax.eval_shape(encoder.apply, {"params": shapes(encoder, X)}, X)
    chex.assert_shape(latents, (2, 4, 6, 5))
    chex.assert_shape(jax.eval_shape(decoder.apply, {"params": shapes(decoder, latents)}, latents), (2, 16, 24, 3))


@pytest.mark.parametrize("resample_conv", [True, False])
def test_sizes_that_do_not_divide_are_rounded_down(resample_conv):
    encoder = Encoder(5, resample_conv=resample_conv, **FIELDS)
    odd = X[:, :15, :22]
    latents = jax.eval_shape(encoder.apply, {"params": shapes(encoder, odd)}, odd)
    chex.assert_shape(latents, (2, 3, 5, 5))


def test_attention_is_after_every_block_of_its_levels_and_in_the_middle():
    encoder, decoder = Encoder(5, attention=(1,), **FIELDS), Decoder(3, attention=(1,), **FIELDS)
    with_attention = {name for name in shapes(encoder, X) if "attn" in name}
    assert with_attention == {"down1_attn0", "mid_attn0"}
    latents = jnp.zeros((1, 4, 6, 5))
    with_attention = {name for name in shapes(decoder, latents) if "attn" in name}
    assert with_attention == {"up1_attn0", "up1_attn1", "mid_attn0"}
    bare = shapes(Encoder(5, middle_attention=False, **FIELDS), X)
    assert not any("attn" in name for name in bare)


def test_widths_change_in_the_first_block_of_a_level():
    params = shapes(Encoder(5, stem=4, **FIELDS), X)
    assert params["conv_in"]["kernel"].shape == (3, 3, 3, 4)
    assert {name for name in params if "shortcut" in params[name]} == {"down0_block0", "down1_block0"}
    params = shapes(Decoder(3, **FIELDS), jnp.zeros((1, 4, 6, 5)))
    assert {name for name in params if "shortcut" in params[name]} == {"up0_block0"}
    assert {name for name in params if "upsample" in name} == {"up1_upsample", "up2_upsample"}
    bare = shapes(Decoder(3, resample_conv=False, **FIELDS), jnp.zeros((1, 4, 6, 5)))
    assert not any("upsample" in name for name in bare)


@pytest.mark.slow
def test_remat_and_devices_do_not_change_the_numbers():
    plain = Encoder(5, **SMALL)
    variables = filled(plain, X)

    def gradient(module):
        return jax.jit(jax.grad(lambda v: jnp.square(module.apply(v, X)).sum()))(variables)

    expected = gradient(plain)
    # The recomputed forward pass may be fused differently, devices sum in another order.
    chex.assert_trees_all_close(gradient(plain.clone(remat=True)), expected, rtol=1e-3, atol=1e-4)
    with jax.set_mesh(meshes.make_mesh(data=2, fsdp=1, context=4, split="height")):
        chex.assert_trees_all_close(gradient(plain), expected, rtol=1e-3, atol=1e-4)


def test_dropout_acts_in_training_only():
    module = Decoder(3, dropout=0.5, **SMALL)
    latents = uniform("compvis/latents", (1, 2, 3, 5))
    variables = filled(module, latents)
    apply = jax.jit(module.apply, static_argnums=2)
    once, again = (apply(variables, latents, True, rngs={"dropout": jax.random.key(k)}) for k in (0, 1))
    assert np.abs(once - again).max() > 1e-3
    np.testing.assert_array_equal(apply(variables, latents, False), apply(variables, latents, False))


def test_bfloat16_keeps_parameters_and_pixels_in_float32():
    module = Decoder(3, dtype=jnp.bfloat16, **SMALL)
    latents = uniform("compvis/latents", (1, 2, 3, 5))
    variables = filled(module, latents)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(module, latents))} == {jnp.dtype(jnp.float32)}
    half, full = (jax.jit(m.apply)(variables, latents) for m in (module, module.clone(dtype=jnp.float32)))
    assert half.dtype == jnp.float32
    # Eight bits of mantissa through some twenty layers.
    assert 0 < np.linalg.norm(half - full) < 0.05 * np.linalg.norm(full)
