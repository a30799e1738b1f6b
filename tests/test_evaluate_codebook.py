"""Codebook usage, entropy and latent statistics: against the authors' numbers, and the same in any number of pieces."""

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Case, cases

from tokenizers.evaluate.codebook import (
    CodeHistogram,
    LatentStatistics,
    bits_of_token,
    bits_per_pixel,
)


@pytest.mark.parametrize("name", cases("metrics", "predict1.*"))
def test_perplexity_equals_predict1(name):
    case = Case("metrics", name)
    histogram = CodeHistogram.of(case.outputs["codes"], 64000)
    # Stored as float32.
    np.testing.assert_allclose(histogram.perplexity(np.finfo(np.float32).eps), case.outputs["code_usage"][0], rtol=1e-5)


def test_uniform_codes_have_full_entropy():
    histogram = CodeHistogram.of(np.arange(1024).repeat(3), 1024)
    assert histogram.usage == histogram.reachable_usage == 1.0
    np.testing.assert_allclose([histogram.entropy(), histogram.perplexity()], [10.0, 1024.0], rtol=1e-12)


def test_few_tokens_of_a_large_codebook():
    histogram = CodeHistogram.of(np.array([5, 5, 2**18 - 1, 7]), 2**18)
    assert histogram.tokens == 4
    assert histogram.usage == 3 / 2**18
    assert histogram.reachable_usage == 3 / 4
    np.testing.assert_allclose(histogram.entropy(), 1.5)


def test_a_single_code_has_no_entropy():
    assert CodeHistogram.of(np.zeros(9, np.int32), 16).entropy() == 0.0
    assert CodeHistogram(16).entropy() == 0.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=30), min_size=1, max_size=5))
def test_histograms_do_not_depend_on_the_pieces(pieces):
    merged = CodeHistogram(41)
    for piece in pieces:
        merged = merged.merge(CodeHistogram.of(np.array(piece, np.int32), 41))
    whole = CodeHistogram.of(np.array(sum(pieces, []), np.int32), 41)
    chex.assert_trees_all_equal((merged.codes, merged.counts), (whole.codes, whole.counts))


def test_ids_outside_the_codebook_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 8\), got 1 to 8"):
        CodeHistogram.of(np.array([1, 8]), 8)
    with pytest.raises(ValueError, match="sizes differ: 8 and 9"):
        CodeHistogram(8).merge(CodeHistogram(9))


def test_rates():
    assert bits_of_token(65536, 6) == 16.0
    assert bits_of_token(None, 4) == 64.0
    # 8x16x16 with 2^16 codes: 16 bits over 2048 pixels
    assert bits_per_pixel(2 * 16 * 16, 16.0, 16, 256, 256) == 16 / 2048


def test_latent_statistics_do_not_depend_on_the_pieces():
    latents = np.random.default_rng(0).normal(2.0, 3.0, (50, 4))

    def statistics(x):
        return LatentStatistics(len(x), x.mean(0), ((x - x.mean(0)) ** 2).sum(0), x.min(0), x.max(0))

    merged = statistics(latents[:7]).merge(statistics(latents[7:30])).merge(statistics(latents[30:]))
    summary = merged.summary()
    np.testing.assert_allclose(merged.std, latents.std(0), rtol=1e-12)
    np.testing.assert_allclose(
        [summary["mean"], summary["std"], summary["low"], summary["high"]],
        [latents.mean(), latents.std(), latents.min(), latents.max()],
        rtol=1e-12,
    )
