"""Alignment with a foundation model: against the authors' numbers, and what margins and weights mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, cases

from tokenizers.losses import alignment

# Summation orders differ in float32. Observed on CPU: 1e-6.
LOSS = 1e-5


def vf_case(name):
    case = Case("vavae", name)
    return case, case.meta["config"]["lossconfig"]["params"]


@pytest.mark.parametrize("name", cases("vavae", "train_(vf|pp).*"))
def test_losses_are_those_of_the_original(name):
    """From the projected latents and the features that the case keeps."""
    case, loss = vf_case(name)
    z, features = jnp.asarray(case.outputs["vf_z"]), jnp.asarray(case.outputs["vf_aux"])
    near = alignment.cosine(z, features, loss.get("cos_margin", 0))
    alike = alignment.distance_matrix(z, features, loss.get("distmat_margin", 0))
    np.testing.assert_allclose(near, case.outputs["vf_cos"][0], rtol=LOSS)
    np.testing.assert_allclose(alike, case.outputs["vf_distmat"][0], rtol=LOSS)
    total = loss.get("distmat_weight", 1.0) * alike + loss.get("cos_weight", 1.0) * near
    np.testing.assert_allclose(total, case.outputs["log:train/vf_loss"][0], rtol=LOSS)


def tensors(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def test_what_points_the_same_way_costs_nothing():
    (z,) = tensors((2, 3, 4, 8))
    np.testing.assert_allclose(alignment.cosine(z, 5 * z), 0, atol=1e-6)
    np.testing.assert_allclose(alignment.cosine(z, -z, margin=0.25), 1.75, rtol=1e-6)
    np.testing.assert_allclose(alignment.distance_matrix(z, -3 * z), 0, atol=1e-6)  # similarities, not directions


def test_pairs_are_of_one_image():
    """Shuffling the images of a batch together changes nothing; the loss is a mean over them."""
    z, features = tensors((2, 3, 4, 8), (2, 3, 4, 5))
    each = [alignment.distance_matrix(z[i : i + 1], features[i : i + 1], 0.1) for i in range(2)]
    np.testing.assert_allclose(alignment.distance_matrix(z, features, 0.1), np.mean(each), rtol=1e-6)


def test_margins_forgive():
    z, features = tensors((1, 4, 4, 8), (1, 4, 4, 8))
    for loss in (alignment.cosine, alignment.distance_matrix):
        assert loss(z, features, 0.0) > loss(z, features, 0.3) > 0
        assert loss(z, features, 2.0) == 0


def test_projections():
    z, kernel, bias = tensors((2, 3, 3, 4), (4, 7), (7,))
    np.testing.assert_allclose(alignment.project(z, {"kernel": kernel}), z @ kernel, rtol=1e-5, atol=1e-5)
    found = alignment.project(z, {"kernel": kernel, "bias": bias})
    np.testing.assert_allclose(found, z @ kernel + bias, rtol=1e-5, atol=1e-5)


def test_empty_latents_have_a_finite_gradient():
    (features,) = tensors((1, 2, 2, 4))
    for loss in (alignment.cosine, alignment.distance_matrix):
        assert np.isfinite(jax.grad(loss)(jnp.zeros_like(features), features)).all()


def test_the_weight_is_a_clipped_ratio_without_gradient():
    strong, weak = {"k": jnp.array([3.0, 4.0])}, {"k": jnp.array([0.0, 0.5])}
    np.testing.assert_allclose(alignment.adaptive_weight(strong, weak), 5 / 0.5001, rtol=1e-6)
    nothing = {"k": jnp.zeros(2)}
    np.testing.assert_allclose(alignment.adaptive_weight(strong, nothing), 5e4, rtol=1e-6)
    assert alignment.adaptive_weight(strong, weak, maximum=2.0) == 2.0
    gradient = jax.grad(lambda g: alignment.adaptive_weight({"k": g}, weak))(strong["k"])
    np.testing.assert_array_equal(gradient, 0)


def test_grids_must_agree():
    z, features = tensors((1, 4, 4, 8), (1, 8, 2, 8))
    for loss in (alignment.cosine, alignment.distance_matrix):
        with pytest.raises(ValueError, match=r"\(1, 4, 4, 8\) and features of shape \(1, 8, 2, 8\)"):
            loss(z, features)
