"""Transformations of latents and pixels: against the authors' numbers, PyTorch's rule for sizes, and the draws."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, cases, relative_l2
from test_model_eqvae import stored, transform_of

from tokenizers.losses.equivariance import Draw, Equivariance, Resolutions, Transform, resize

# Positions are float64 here and float32 there. Observed on CPU: 5e-7.
OUTPUT = 1e-5


@pytest.mark.parametrize("name", cases("eqvae", "small_.*"))
def test_transforms_are_those_of_the_original(name):
    case = Case("eqvae", name)
    latents = case.outputs["mean"] + np.exp(0.5 * case.outputs["logvar"]) * case.input("noise")
    for entry in case.meta["run"]["transforms"]:
        transform, t = transform_of(entry), entry["name"]
        assert relative_l2(transform(jnp.asarray(latents)), case.outputs[f"z_{t}"]) < OUTPUT
        target = stored(case, f"target_{t}", transform(jnp.asarray(case.input("image"))))
        assert relative_l2(target, case.outputs[f"target_{t}"]) < OUTPUT


def test_sizes_are_rounded_down_and_positions_follow_the_scale_as_given():
    x = jnp.arange(5.0)[:, None, None] * jnp.ones((5, 1, 1))
    found = resize(x, (0.5, 1.0))
    assert found.shape == (2, 1, 1)
    np.testing.assert_allclose(found[:, 0, 0], [0.5, 2.5])  # not 0.75 and 3.25, as by the ratio of sizes
    np.testing.assert_allclose(resize(x, (2.0, 1.0))[:2, 0, 0], [0.0, 0.25])  # clamped at 0, then (1.5) / 2 - 0.5
    np.testing.assert_array_equal(resize(x, (2.0, 1.0))[-1, 0, 0], 4.0)


def test_resizing_forgets_no_leading_axis_and_keeps_the_dtype():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8, 6, 4)), jnp.bfloat16)
    found = resize(x, (0.5, 0.5))
    assert (found.shape, found.dtype) == ((2, 3, 4, 3, 4), jnp.bfloat16)
    np.testing.assert_array_equal(found[1, 2], resize(x[1, 2], (0.5, 0.5)))


def test_a_turn_is_clockwise():
    x = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])[..., None]
    np.testing.assert_array_equal(Transform(turns=1)(x)[..., 0], [[3, 1], [4, 2]])
    np.testing.assert_array_equal(Transform(turns=4)(x), x)
    # First resized, then turned: the factors are those of height and width before.
    assert Transform((0.5, 1.0), 1)(jnp.zeros((4, 6, 1))).shape == (6, 2, 1)


def test_draws_have_the_probabilities_of_the_rule():
    rng, rule = np.random.default_rng(0), Equivariance()
    drawn = [rule.draw(rng) for _ in range(4000)]
    latents = [d.latents for d in drawn if d.latents != Transform()]
    smaller = [d.pixels.scale for d in drawn if d.pixels != Transform()]
    # Five standard deviations of a share of 4000.
    assert abs(len(latents) / 4000 - 0.5) < 0.04
    assert abs(len(smaller) / 4000 - 0.125) < 0.03
    assert drawn.count(Draw()) == 4000 - len(latents) - len(smaller)
    assert collections.Counter(t.turns for t in latents).keys() == {1, 2, 3}
    assert {t.scale for t in latents} == {(k / 32, k / 32) for k in range(8, 32)}
    assert all(height == width for height, width in smaller)
    both = [Equivariance(1.0, anisotropic=True).draw(rng).latents.scale for _ in range(200)]
    assert sum(height != width for height, width in both) > 150
    assert Equivariance(0.0, 0.0).draw(rng) == Draw()


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(ValueError, match=r"scale 0\.25 leaves nothing of 3"):
        resize(jnp.zeros((3, 8, 1)), (0.25, 1.0))
    with pytest.raises(ValueError, match=r"\(height|height, width, channels\), got shape \(3, 8\)"):
        resize(jnp.zeros((3, 8)), (0.5, 0.5))


@pytest.mark.parametrize("name", cases("omnitokenizer", "resize_.*"))
def test_resolutions_are_those_of_omnitokenizer(name):
    case = Case("omnitokenizer", name)
    pixels, scales = case.input("video") * 2, tuple(case.meta["training"]["scales"])  # theirs are half as large
    drawn = {
        draw.pixels.scale: draw for draw in (Resolutions(scales).draw(np.random.default_rng(i)) for i in range(20))
    }
    assert sorted(drawn) == sorted(scales)
    for scale, draw in drawn.items():
        assert draw.latents == Transform()
        found = draw.pixels(pixels) / 2
        # float32 sums of four numbers
        assert relative_l2(found, case.outputs[f"x{scale}"]) < 1e-6
        np.testing.assert_allclose(
            found[:, [0, 0, -1, -1], [0, -1, 0, -1]], pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]] / 2
        )
    whole = Resolutions((1.0,)).draw(np.random.default_rng(0)).pixels(pixels)
    np.testing.assert_array_equal(whole, pixels)
