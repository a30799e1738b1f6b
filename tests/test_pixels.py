"""Value ranges, ranks and sizes of pixels."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizers import pixels
from tokenizers.types import Spec


def test_all_levels_survive_the_round_trip():
    levels = np.arange(256, dtype=np.uint8)
    normal = pixels.to_float(levels)
    assert normal.dtype == jnp.float32
    assert (float(normal[0]), float(normal[255])) == (-1.0, 1.0)
    np.testing.assert_array_equal(pixels.to_uint8(normal), levels)


def test_floats_pass_unclipped_and_become_float32():
    given_ones = np.array([-1.5, 0.25, 2.0], np.float64)
    passed = pixels.to_float(given_ones)
    chex.assert_trees_all_equal(passed, jnp.array([-1.5, 0.25, 2.0], jnp.float32))
    np.testing.assert_array_equal(pixels.to_uint8(passed), [0, 159, 255])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.uint8), "look channels-first"),
        (np.zeros((1, 5, 3, 8, 8), np.uint8), "look channels-first"),
        (np.zeros((8, 8, 3), np.uint8), r"pixels\[None\]"),
        (np.zeros((1, 8, 8, 4), np.uint8), r"must hold 3 channels"),
        (np.zeros((1, 0, 8, 3), np.uint8), "no axis may be empty"),
        (np.zeros((1, 8, 8, 3), np.int32), "int32; accepted: uint8"),
        (np.full((1, 8, 8, 3), 200.0), r"reach 200, but floats must be in \[-1, 1\]"),
        (np.full((1, 8, 8, 3), -200.0), "reach 200"),
        (jnp.full((1, 8, 8, 3), 200.0), "pass uint8"),
    ],
)
def test_other_layouts_and_ranges_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        pixels.check(array)


SIZE = st.integers(1, 40)


@given(SIZE, SIZE, SIZE, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_fitted_is_the_smallest_shape_that_fits(t, h, w, ct, ch, cw, first):
    spec = Spec((ct, ch, cw), 4, None, True, True, "", first_frame_alone=first)
    shape = pixels.fitted(spec, None, (2, t, h, w, 3), strict=False)
    frames = shape[1] - int(first)
    assert frames % ct == shape[2] % ch == shape[3] % cw == 0
    assert 0 <= shape[1] - t < ct
    assert 0 <= shape[2] - h < ch
    assert 0 <= shape[3] - w < cw
    assert pixels.fitted(spec, None, shape, strict=True) == shape


def test_strict_says_the_rule_and_the_nearest_shape():
    spec = Spec((4, 8, 16), 4, None, True, True, "", first_frame_alone=True)
    message = r"frames must be 1 \+ 4 k, heights must be multiples of 8 and widths of 16; .* \(1, 9, 24, 32, 3\)"
    with pytest.raises(ValueError, match=message):
        pixels.fitted(spec, None, (1, 8, 20, 20, 3), strict=True)
    with pytest.raises(ValueError, match=r"frames must be 4 k"):
        pixels.fitted(Spec((4, 8, 8), 4, None, False, True, ""), None, (1, 5, 8, 8, 3), strict=True)


def test_an_input_size_is_filled_up_and_never_cut():
    spec = Spec((1, 4, 4), 4, None, False, False, "", tokens_per_item=16)
    assert pixels.fitted(spec, (16, 16), (2, 10, 16, 3), strict=False) == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="height and width must be 16 and 16; resize them first"):
        pixels.fitted(spec, (16, 16), (2, 17, 16, 3), strict=False)


def test_pad_repeats_the_edge():
    x = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    padded = pixels.pad(x, (1, 3, 4, 1))
    np.testing.assert_array_equal(padded[0, :, :, 0], [[0, 1, 1, 1], [2, 3, 3, 3], [2, 3, 3, 3]])
    assert pixels.pad(x, (1, 2, 2, 1)) is x
