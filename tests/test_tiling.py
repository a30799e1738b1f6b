"""Tiles: together they cover every cell once, are exact where the network sees no neighbours, and say when not."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
from hypothesis import given
from hypothesis import strategies as st

import tokenizers
from tokenizers import tiling


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 10))
def test_spans_cover_an_axis_once_with_tiles_of_one_size(cells, tile, overlap):
    overlap = min(overlap, tile // 2)
    found = tiling.spans(cells, tile, overlap)
    used = [cell for span in found for cell in range(span.first, span.last)]
    assert used == list(range(cells))
    assert {span.stop - span.start for span in found} == {min(cells, tile)}
    for before, after in zip(found, found[1:], strict=False):
        assert before.stop - after.start >= overlap
        assert before.start < after.start
    for span in found:
        assert span.start <= span.first < span.last <= span.stop
    total = np.zeros(3 * cells)
    for span, weight in zip(found, tiling._ramps(found, 3), strict=True):
        assert (weight > 0).all()
        total[3 * span.start : 3 * span.stop] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


def clip(*shape):
    return refweights.image_like("tiling", (*shape, 3))


def smooth():
    """The quickstart's plan, small: convolutions and norms look far beyond a tile."""
    return tokenizers.create("causal3d", channels=(16, 16), patch=4, seed=1)


@pytest.mark.parametrize("shape", [(1, 5, 40, 56), (2, 37, 50)], ids=["clip", "picture"])
def test_one_tile_is_the_tokenizer_itself(shape):
    tok, pixels = smooth(), clip(*shape)
    tiled = tok.tiled(64, overlap=8)
    chex.assert_trees_all_equal(tiled.encode(pixels), tok.encode(pixels))
    chex.assert_trees_all_equal(tiled.reconstruct(pixels), tok.reconstruct(pixels))


@pytest.mark.parametrize("shape", [(1, 5, 40, 58), (2, 37, 50)], ids=["clip", "picture"])
def test_shapes_are_those_of_the_tokenizer(shape):
    tok, pixels = smooth(), clip(*shape)
    tiled = tok.tiled((24, 32), overlap=8)
    ours, theirs = tiled.encode(pixels), tok.encode(pixels)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    chex.assert_equal_shape([tiled.decode(ours.latents), tok.decode(theirs.latents)])
    chex.assert_trees_all_close(tiled.decode_indices(ours.indices), tiled.decode(ours.latents), atol=1e-6)
    assert tiled.reconstruct(pixels).shape == pixels.shape


@pytest.mark.slow
def test_streams_of_tiles_are_tiles_of_the_whole():
    tok, pixels = smooth(), clip(1, 13, 24, 32)
    tiled = tok.tiled(16, overlap=4)
    whole = tiled.encode(pixels)
    parts = list(tiled.encode_stream([pixels[:, :2], pixels[:, 2:9], pixels[:, 9:]]))
    np.testing.assert_array_equal(np.concatenate([p.indices for p in parts], axis=1), whole.indices)
    for stream in (parts, [whole.indices[:, :1], whole.indices[:, 1:]]):
        decoded = jnp.concatenate(list(tiled.decode_stream(stream)), axis=1)
        chex.assert_trees_all_close(decoded, tiled.decode(whole.latents), atol=1e-5)  # other chunks, other kernels
    assert not list(tiled.encode_stream([]))


def test_more_overlap_brings_it_nearer_to_the_whole():
    tok, pixels = smooth(), clip(1, 1, 96, 96)
    whole = tok.decode(tok.encode(pixels).latents)
    errors = []
    for overlap in (0, 16):
        difference = tok.tiled(48, overlap=overlap).decode(tok.encode(pixels).latents) - whole
        errors.append(float(jnp.abs(difference).mean() / jnp.abs(whole).mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(30, 4, "multiples of its compression"), (32, 20, "at most half"), (32, 3, "multiples")],
)
def test_tiles_that_do_not_fit_are_refused(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        smooth().tiled(tile, overlap=overlap)
