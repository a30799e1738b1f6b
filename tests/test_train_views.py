"""Random views on the device: what is drawn is what the settings say."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights

from tokenizers.train import views
from tokenizers.train.views import Crops, Masks

PLAIN = {"jitter": 0.0, "gray": 0.0, "blur": (0.0,), "flip": 0.0}


def image(size=32):
    return jnp.asarray(refweights.image_like("views", (1, size, size, 3)))


def test_the_whole_image_is_a_view_of_itself():
    crops = Crops(2, 32, (1.0, 1.0), ratio=(1.0, 1.0), **PLAIN)
    found = jax.jit(crops)(jax.random.key(0), image())
    assert found.shape == (1, 2, 32, 32, 3)
    np.testing.assert_allclose(found[0], jnp.clip(jnp.broadcast_to(image(), (2, 32, 32, 3)), -1, 1), atol=1e-5)


def test_crops_are_parts_of_the_image_of_the_size_asked_for():
    """Colours say where a pixel was: a crop spans the share of the image that was drawn for it."""
    ramp = jnp.linspace(-1, 1, 64)
    picture = jnp.stack([*jnp.meshgrid(ramp, ramp, indexing="ij"), jnp.zeros((64, 64))], axis=-1)[None]
    crops = Crops(64, 16, (0.25, 0.5), **PLAIN)
    found = np.asarray(jax.jit(crops)(jax.random.key(1), picture))[0]
    heights = (found[:, -1, 8, 0] - found[:, 0, 8, 0]) / 2 * 16 / 15
    widths = (found[:, 8, -1, 1] - found[:, 8, 0, 1]) / 2 * 16 / 15
    areas, shapes = heights * widths, widths / heights
    assert 0.23 < areas.min() < 0.3
    assert 0.45 < areas.max() < 0.52
    assert 0.7 < shapes.min() < 0.85
    assert 1.2 < shapes.max() < 1.4
    assert np.std(found[:, 8, 8, 0]) > 0.1  # from all over the image


def test_a_mirror_image_is_one_in_half_of_the_views():
    ramp = jnp.broadcast_to(jnp.linspace(-1, 1, 16)[:, None], (1, 16, 16, 3))
    crops = Crops(256, 16, (1.0, 1.0), ratio=(1.0, 1.0), **(PLAIN | {"flip": 0.5}))
    found = np.asarray(jax.jit(crops)(jax.random.key(2), ramp))[0]
    share = np.mean(found[:, 8, 0, 0] > 0)
    assert 0.38 < share < 0.62  # 256 throws: four standard deviations


def test_each_view_of_an_image_has_its_own_rates():
    half = jnp.full((64, 16, 16, 3), 0.6)
    crops = Crops(2, 16, (1.0, 1.0), **(PLAIN | {"blur": (0.0, 0.0), "solarize": (0.0, 1.0)}))
    found = jax.jit(crops)(jax.random.key(3), half)
    np.testing.assert_allclose(found[:, 0], 0.6, atol=1e-5)
    np.testing.assert_allclose(found[:, 1], -0.6, atol=1e-5)


@pytest.mark.parametrize("turns", [0.1, -0.3, 0.5])
def test_hue_is_a_place_on_the_circle_of_colours(turns):
    colours = np.random.default_rng(0).random((4, 4, 3)).astype(np.float32)
    expected = []
    for row in colours.reshape(-1, 3):
        hue, saturation, value = colorsys.rgb_to_hsv(*row)
        expected.append(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))
    found = views.shift_hue(jnp.asarray(colours), turns)
    np.testing.assert_allclose(found.reshape(-1, 3), expected, atol=2e-6)
    np.testing.assert_array_equal(views.shift_hue(jnp.full((1, 1, 3), 0.3), turns), jnp.full((1, 1, 3), 0.3))


def test_colours_change_by_at_most_what_is_allowed():
    gray = jnp.full((1, 8, 8, 3), 0.5)
    found = jnp.stack([views.jitter(jax.random.key(i), gray[0], (0.4, 0.0, 0.0, 0.0)) for i in range(64)])
    assert 0.29 < found.min() < 0.36
    assert 0.64 < found.max() < 0.71


def test_half_of_the_crops_are_masked_each_by_a_ratio_of_its_own():
    masks = Masks((14, 14), 16)
    found = np.asarray(jax.jit(masks, static_argnums=1)(jax.random.key(4), 64))
    counts = found.reshape(4, 16, -1).sum(-1)
    edges = np.linspace(0.1, 0.5, 9) * 196
    for group in counts:
        drawn = np.sort(group[group > 0])
        assert len(drawn) == 8
        assert np.all(drawn >= np.floor(edges[:-1]))
        assert np.all(drawn <= np.floor(edges[1:]))
        assert drawn.sum() <= masks.most
    assert len({tuple(np.flatnonzero(group)) for group in counts}) > 1  # which ones is drawn
    # Blocks: the neighbour of a masked patch is masked far more often than any patch.
    masked = found[found.reshape(64, -1).any(-1)]
    together = (masked[:, :, 1:] & masked[:, :, :-1]).sum() / masked[:, :, :-1].sum()
    assert together > 0.7 > 2 * masked.mean()


def test_views_are_a_function_of_the_key():
    crops, masks = Crops(1, 16, (0.3, 1.0)), Masks((4, 4), 4)
    draw = jax.jit(lambda key: (crops(key, image()), masks(key, 8)))
    first, again, other = draw(jax.random.key(5)), draw(jax.random.key(5)), draw(jax.random.key(6))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first[0] != other[0])
    assert np.any(first[1] != other[1])


def test_groups_must_divide_the_crops():
    with pytest.raises(ValueError, match="groups of 16 crops; got 24"):
        Masks((4, 4), 16)(jax.random.key(0), 24)
