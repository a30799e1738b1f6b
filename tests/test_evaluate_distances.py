"""Frechet distances, KID, KVD and the inception score against the authors' implementations."""

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Case, cases

from tokenizers.evaluate import distances
from tokenizers.evaluate.distances import GaussianStatistics, frechet_distance

# Full rank: float64 noise. Singular: eigenvalues at zero carry noise of sqrt(1e-16 * |S|^2), 1e-5 absolute here.
FULL_RANK, SINGULAR = 1e-9, 2e-8


def fid_features(case):
    first, second = (case.input(key).astype(np.float64) for key in ("features_1", "features_2"))
    if case.meta["config"].get("correlate") and "mix" in case.meta["inputs"]:
        mix = case.input("mix").astype(np.float64)
        first, second = first @ mix, second @ mix.T + 0.1
    return first, second


@pytest.mark.parametrize("name", cases("inception_fid", "frechet_.*"))
def test_fid_equals_three_implementations(name):
    case = Case("inception_fid", name)
    features = fid_features(case)
    first, second = map(GaussianStatistics.of, features)
    np.testing.assert_allclose(first.mean, case.outputs["mu1"], atol=1e-12)
    np.testing.assert_allclose(np.trace(second.covariance), case.outputs["trace2"], rtol=1e-12)
    tolerance = SINGULAR if first.count <= len(first.mean) else FULL_RANK
    for root, key in (("sqrtm", "clean_fid"), ("sqrtm", "pytorch_fid"), ("eigenvalues", "torch_fidelity")):
        np.testing.assert_allclose(frechet_distance(first, second, root), case.outputs[key], rtol=tolerance)
    np.testing.assert_allclose(frechet_distance(first, first), 0, atol=1e-4)  # rounding noise of the root
    if len(features[0]) == len(features[1]):
        actual = distances.kernel_distance(*features)
        np.testing.assert_allclose(actual, case.outputs["clean_kid_full_set"], rtol=1e-10)


@pytest.mark.parametrize("name", cases("i3d_fvd", "frechet_.*"))
def test_fvd_equals_the_video_implementations(name):
    case = Case("i3d_fvd", name)
    features = fid_features(case)
    first, second = map(GaussianStatistics.of, features)
    tolerance = 1e-7 if first.count <= len(first.mean) else FULL_RANK
    np.testing.assert_allclose(
        frechet_distance(first, second, "symmetric"), case.outputs["omni_float64"], rtol=tolerance
    )
    np.testing.assert_allclose(frechet_distance(first, second, "sqrtm"), case.outputs["styleganv"], rtol=tolerance)
    # The authors' discrepancy runs on the float32 features.
    np.testing.assert_allclose(distances.polynomial_discrepancy(*features), case.outputs["omni_mmd"], rtol=1e-5)


@pytest.mark.parametrize("name", cases("metrics", "tokenbench_fvd.*"))
def test_tokenbench_frechet_distance(name):
    from refweights import uniform

    case = Case("metrics", name)
    for key, facts in case.meta["features"].items():
        shape = (facts["n"], facts["dim"])
        real = uniform(facts["real"], shape).astype(np.float64)
        fake = uniform(facts["fake"], shape).astype(np.float64) * facts["scale"] + facts["shift"]
        actual = frechet_distance(GaussianStatistics.of(real), GaussianStatistics.of(fake))
        # Stored as float32.
        np.testing.assert_allclose(actual, case.outputs[f"frechet/{key}"][0], rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("name", cases("inception_fid", "inception_score.*"))
def test_inception_score_equals_torch_fidelity(name):
    case = Case("inception_fid", name)
    mean, std = distances.inception_score(case.input("logits"), splits=case.meta["config"]["splits"])
    # The authors' soft-max is taken in float32 before the float64 sums.
    np.testing.assert_allclose([mean, std], [case.outputs["mean"], case.outputs["std"]], rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 2**31))
def test_statistics_do_not_depend_on_the_pieces(sizes, seed):
    features = np.random.default_rng(seed).normal(3.0, 2.0, (sum(sizes), 4))
    parts = np.split(features, np.cumsum(sizes)[:-1])
    merged = GaussianStatistics.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(GaussianStatistics.of(part))
    whole = GaussianStatistics.of(features)
    chex.assert_trees_all_close((merged.mean, merged.scatter), (whole.mean, whole.scatter), atol=1e-9)
    assert merged.count == len(features)


def test_kid_of_unequal_sets_is_reproducible_and_near_the_whole():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(60, 8)), generator.normal(0.5, 1.0, size=(45, 8))
    drawn = distances.kernel_distance(first, second, subset=30, subsets=200)
    assert drawn == distances.kernel_distance(first, second, subset=30, subsets=200)
    # Both are unbiased; 200 draws leave a few percent.
    np.testing.assert_allclose(drawn, distances.polynomial_discrepancy(first, second), rtol=0.1)


def test_impossible_requests_name_the_numbers():
    one = GaussianStatistics.of(np.ones((3, 4)))
    with pytest.raises(ValueError, match="Did you mean 'sqrtm'"):
        frechet_distance(one, one, "sqrt")
    with pytest.raises(ValueError, match="feature sizes differ"):
        frechet_distance(one, GaussianStatistics.of(np.ones((3, 5))))
    with pytest.raises(ValueError, match="got 0 and 3"):
        frechet_distance(GaussianStatistics.of(np.ones((0, 4))), one)
    with pytest.raises(ValueError, match="got 3"):
        distances.inception_score(np.ones((3, 4)))
