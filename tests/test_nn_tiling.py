"""Tiles and their overlaps, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from refweights import uniform

from tokenizers.nn.resample import average_pool, upsample_nearest
from tokenizers.nn.tiling import decode_in_tiles, encode_in_tiles, fade, tiled


@pytest.mark.parametrize("size", [(8, 8), (13, 22), (6, 9)])
def test_a_function_of_single_elements_is_not_changed_by_tiling(size):
    """Where tiles agree, fading between them is the identity, and every element is there once."""
    x = uniform("tiling", (2, *size, 3))
    result = tiled(lambda a: upsample_nearest(2 * a, (2, 2)), x, tile=8, stride=6, blend=4, keep=12)
    np.testing.assert_allclose(result, upsample_nearest(2 * x, (2, 2)), rtol=1e-6)


def test_a_tile_never_sees_another_one():
    x = uniform("tiling", (1, 14, 8, 1))
    result = tiled(lambda a: a - a.mean((1, 2), keepdims=True), x, tile=8, stride=6, blend=2, keep=6)
    tiles = [x[:, top : top + 8, left : left + 8] for top in (0, 6, 12) for left in (0, 6)]
    tiles = [tile - tile.mean((1, 2), keepdims=True) for tile in tiles]
    np.testing.assert_allclose(result[:, :6, :6], tiles[0][:, :6, :6], rtol=1e-6)
    # The first row after the border is the upper tile's, the second one half of each.
    np.testing.assert_allclose(result[:, 6, :6], tiles[0][:, 6, :6], rtol=1e-5)
    np.testing.assert_allclose(result[:, 7, :6], (tiles[0][:, 7, :6] + tiles[2][:, 1, :6]) / 2, rtol=1e-5)
    np.testing.assert_allclose(result[:, 8, :6], tiles[2][:, 2, :6], rtol=1e-5)


def test_fading_is_linear_from_the_old_to_the_new():
    before, after = jnp.zeros((1, 5, 2, 1)), jnp.ones((1, 6, 2, 1))
    np.testing.assert_allclose(fade(before, after, 4, axis=1)[0, :, 0, 0], [0, 0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(fade(before, after, 9, axis=1)[0, :, 0, 0], [0, 0.2, 0.4, 0.6, 0.8, 1])
    np.testing.assert_array_equal(fade(before, after, 0, axis=1), after)


def test_images_that_fit_a_tile_are_taken_whole():
    def encode(a):
        return average_pool(a, (2, 2)) - a.mean()

    x = uniform("tiling", (1, 16, 12, 1))
    np.testing.assert_array_equal(encode_in_tiles(encode, x, tile=16, side=2), encode(x))
    assert np.abs(encode_in_tiles(encode, x, tile=8, side=2) - encode(x)).max() > 1e-2


@pytest.mark.parametrize("size", [(8, 8), (24, 40)])
def test_latents_and_pixels_of_tiles_meet(size):
    x = uniform("tiling", (1, *size, 1))
    latents = encode_in_tiles(lambda a: average_pool(a, (2, 2)), x, tile=16, side=2)
    np.testing.assert_allclose(latents, average_pool(x, (2, 2)), rtol=1e-6)
    pixels = decode_in_tiles(lambda a: upsample_nearest(a, (2, 2)), latents, tile=16, side=2)
    np.testing.assert_allclose(pixels, upsample_nearest(latents, (2, 2)), rtol=1e-6)
