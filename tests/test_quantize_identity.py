"""The identity bottleneck passes latents on."""

import jax.numpy as jnp
import numpy as np
import refweights

from tokenizers.quantize import create


def test_latents_are_the_input_in_float32():
    z = jnp.asarray(refweights.uniform("identity", (2, 3, 5, 4))).astype(jnp.bfloat16)
    module = create("identity")
    encoding = module(z, train=True)
    assert encoding.latents.dtype == jnp.float32
    np.testing.assert_array_equal(encoding.latents, np.asarray(z, np.float32))
    assert encoding.indices is None
    assert encoding.losses == {}
    assert module.input_channels(7) == 7
    assert module.codebook_size is None
