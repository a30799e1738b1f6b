"""Residual FSQ and the identity bottleneck: what they return, and that indices lead back to the codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights

from tokenizers.quantize import create
from tokenizers.quantize.fsq import FSQ
from tokenizers.quantize.identity import Identity
from tokenizers.quantize.residual_fsq import ResidualFSQ

LEVELS = (8, 5, 5, 4)
Z = 2 * refweights.uniform("residual", (2, 3, 5, 4))


def test_every_quantizer_gets_what_the_ones_before_left_over():
    encoding = jax.jit(ResidualFSQ(LEVELS, 3).__call__)(Z)
    residual, total = jnp.asarray(Z), 0.0
    for layer in range(3):
        one = FSQ(LEVELS)(residual)
        np.testing.assert_array_equal(encoding.indices[..., layer], one.indices)
        residual, total = residual - one.latents, total + one.latents
    np.testing.assert_allclose(encoding.latents, total, atol=1e-6)


def test_indices_lead_back_to_the_codes():
    module = ResidualFSQ(LEVELS, 3)
    encoding = module(Z)
    assert encoding.indices.shape == (*Z.shape[:-1], 3)
    assert int(encoding.indices.max()) < module.codebook_size == 800
    np.testing.assert_allclose(module.indices_to_codes(encoding.indices), encoding.latents, atol=1e-6)
    with pytest.raises(ValueError, match="indices of 3 quantizers"):
        module.indices_to_codes(encoding.indices[..., :2])


def test_one_quantizer_is_fsq():
    np.testing.assert_array_equal(ResidualFSQ(LEVELS, 1)(Z).latents, FSQ(LEVELS)(Z).latents)


def test_the_gradient_is_that_of_the_tanhs():
    def total(z):
        return ResidualFSQ(LEVELS, 2)(z).latents.sum()

    residual = Z - FSQ(LEVELS)(Z).latents
    slope = jax.grad(lambda z: FSQ(LEVELS)(z).latents.sum())
    np.testing.assert_allclose(jax.grad(total)(Z), slope(Z) + slope(residual), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"levels": (8, 5), "codebooks": 0}, "at least one quantizer"), ({"levels": (1, 5)}, "levels must be at least 3")],
)
def test_what_no_quantizer_can_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        create("residual_fsq", **fields)


def test_identity_passes_latents_on_in_float32():
    encoding = Identity()(Z.astype(jnp.bfloat16), train=True)
    assert encoding.latents.dtype == jnp.float32
    np.testing.assert_array_equal(encoding.latents, Z.astype(jnp.bfloat16).astype(np.float32))
    assert encoding.indices is None
    assert encoding.losses == {}
    assert Identity().input_channels(7) == 7
