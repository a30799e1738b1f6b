"""Haar wavelets: lossless, orthonormal, causal with the first frame alone, equal to the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Case, cases

from tokenizers.nn import resample, wavelet


def jitted(function):
    def run(x, **options):
        return jax.jit(functools.partial(function, **options))(x)

    return run


FORWARD = {2: jitted(wavelet.haar_2d), 3: jitted(wavelet.haar_3d)}
INVERSE = {2: jitted(wavelet.inverse_haar_2d), 3: jitted(wavelet.inverse_haar_3d)}


def normal(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.sampled_from([2, 3]), st.integers(1, 2), st.sampled_from(wavelet.SCALES), st.integers(1, 3))
def test_round_trip(rank, levels, scale, channels):
    x = normal(2, *(2**levels * n for n in (1, 2, 3)[-rank:]), channels)
    y = FORWARD[rank](x, levels=levels, scale=scale)
    assert y.size == x.size
    np.testing.assert_allclose(INVERSE[rank](y, levels=levels, scale=scale), x, atol=2e-6)


@pytest.mark.parametrize("rank", [2, 3])
def test_the_orthonormal_transform_keeps_inner_products(rank):
    x = normal(2, *(4,) * rank, 3)
    y = FORWARD[rank](x, levels=2)
    np.testing.assert_allclose(jnp.vdot(y[0], y[1]), jnp.vdot(x[0], x[1]), rtol=1e-4)
    np.testing.assert_allclose(jnp.vdot(y, y), jnp.vdot(x, x), rtol=1e-5)


def test_the_average_scale_puts_block_means_first():
    x = normal(1, 4, 8, 8, 2)
    y = FORWARD[3](x, levels=2, scale="average")
    np.testing.assert_allclose(y[..., :2], resample.average_pool(x, (4, 4, 4)), atol=1e-6)


def test_a_constant_lives_in_the_lowest_band_and_edges_in_theirs():
    ramp = jnp.broadcast_to(jnp.arange(4.0)[:, None], (1, 4, 4))[..., None]  # changes with the row only
    y = wavelet.haar_2d(ramp)
    bands = np.abs(np.asarray(y)).max((0, 1, 2))  # (low, high in height, high in width, both)
    assert bands[1] > 0.5
    np.testing.assert_allclose(bands[2:], 0, atol=1e-6)


@pytest.mark.parametrize("name", cases("cosmos", "module_patchers"))
def test_reference_patchers(name):
    case = Case("cosmos", name)
    space_to_depth, causal = (
        jax.jit(functools.partial(function, order="channel_outer"), static_argnums=1)
        for function in (resample.space_to_depth, resample.causal_space_to_depth)
    )
    for key in ("img", "vid", "one"):
        x = case.input(key)
        for patch in case.meta["inputs"][key]["patch_sizes"]:
            levels = patch.bit_length() - 1
            options = {"levels": levels, "scale": "average"}
            if key == "img":
                y = FORWARD[2](x, **options)
                back = INVERSE[2](y, **options)
                rearranged = space_to_depth(x, (patch, patch))
            else:
                y = FORWARD[3](x, **options, first_frame_alone=True)
                back = INVERSE[3](y, **options, first_frame_alone=True)
                rearranged = causal(x, (patch,) * 3)
            # Up to nine additions of numbers below one, in another order.
            np.testing.assert_allclose(y, case.outputs[f"patch_{key}_haar{patch}"], atol=1e-6)
            np.testing.assert_allclose(back, case.outputs[f"unpatch_{key}_haar{patch}"], atol=2e-6)
            np.testing.assert_array_equal(rearranged, case.outputs[f"patch_{key}_rearrange{patch}"])


def test_causal_patcher_is_causal_streams_and_inverts():
    module, inverse = wavelet.CausalHaar3d(levels=1), wavelet.InverseCausalHaar3d(levels=1)
    x = normal(1, 7, 4, 4, 2)
    y = module.apply({}, x)
    np.testing.assert_array_equal(module.apply({}, x.at[:, 3:].add(1.0))[:, :2], y[:, :2])
    np.testing.assert_allclose(inverse.apply({}, y), x, atol=1e-6)
    step, undo = (jax.jit(functools.partial(m.apply, mutable="stream")) for m in (module, inverse))
    states, outputs, returned = ({}, {}), [], []
    for chunk in (x[:, :1], x[:, 1:5], x[:, 5:]):
        out, first = step(states[0], chunk)
        back, second = undo(states[1], out)
        states = (first, second)
        outputs.append(out)
        returned.append(back)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), y, atol=1e-6)
    np.testing.assert_allclose(jnp.concatenate(returned, 1), x, atol=1e-6)


def test_odd_sizes_are_refused_or_reflected():
    x = normal(1, 5, 6, 1)
    with pytest.raises(ValueError, match=r"even sizes at every level; got \(5, 6\)"):
        wavelet.haar_2d(x)
    y = wavelet.haar_2d(x, odd="reflect")
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)), mode="reflect")
    np.testing.assert_allclose(wavelet.inverse_haar_2d(y), padded, atol=1e-6)
    with pytest.raises(ValueError, match="Accepted: orthonormal, average"):
        wavelet.haar_2d(x[:, :4], scale="unit")


def test_half_precision_keeps_its_dtype():
    x = normal(1, 4, 4, 4, 2).astype(jnp.bfloat16)
    assert jax.jit(wavelet.haar_3d)(x).dtype == jnp.bfloat16
