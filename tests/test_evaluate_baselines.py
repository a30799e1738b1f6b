"""The baselines spend the bits they were given, no more, and spend them well."""

import numpy as np
import pytest
import refweights
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenizers.evaluate import baselines


def clip(name, shape=(5, 64, 64, 3)):
    return np.floor((refweights.image_like(name, shape) + 1) * 127.5 + 0.5).astype(np.uint8)


def mse(coded, pixels):
    return np.mean((coded.pixels.astype(np.float64) - pixels) ** 2)


@given(st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_temporal_groups_cover_every_frame_once(frames, slices, alone):
    slices = min(slices, frames)
    groups = baselines.temporal_groups(frames, slices, alone)
    assert [f for start, stop in groups for f in range(start, stop)] == list(range(frames))
    assert len(groups) <= slices
    if alone and slices > 1:
        assert groups[0] == (0, 1)


def test_causal_grids_give_the_first_frame_its_own_slice():
    assert baselines.temporal_groups(9, 3, True) == [(0, 1), (1, 5), (5, 9)]
    assert baselines.temporal_groups(8, 2, False) == [(0, 4), (4, 8)]
    assert baselines.temporal_groups(1, 1, True) == [(0, 1)]


@settings(max_examples=15, deadline=None)
@given(st.floats(1.0, 18.0), st.integers(0, 1000))
def test_quantized_colours_fit_into_the_bits(bits, seed):
    colours = np.random.default_rng(seed).uniform(0, 255, (30, 40, 3)).astype(np.float32)
    rounded, _ = baselines.quantize_colours(colours, 2.0**bits)
    assert len(np.unique(rounded.reshape(-1, 3), axis=0)) <= 2.0**bits


def test_grey_pictures_spend_their_bits_on_luma():
    grey = np.repeat(np.random.default_rng(0).uniform(0, 255, (32, 32, 1)), 3, axis=-1)
    rounded, setting = baselines.quantize_colours(grey, 256.0)
    assert setting == "opponent 256x1x1 levels"
    assert np.abs(rounded - grey).max() <= 0.51  # half of a 256th of the range


def test_fine_colours_leave_plain_bicubic_resampling():
    pixels = clip("bicubic", (1, 48, 64, 3))
    coded = baselines.bicubic(pixels, (6, 8), 24.0)
    small = Image.fromarray(pixels[0]).resize((8, 6), Image.Resampling.BICUBIC)
    expected = np.asarray(small.resize((64, 48), Image.Resampling.BICUBIC))
    # Pillow rounds to 8 bits in between and we to 24 bits a colour: off by a level or two.
    assert np.abs(coded.pixels[0].astype(int) - expected).max() <= 4
    assert coded.bits == 48 * 24


def test_more_bits_and_more_tokens_are_never_worse():
    pixels = clip("more")
    by_bits = [mse(baselines.bicubic(pixels, (2, 8, 8), bits, True), pixels) for bits in (3.0, 8.0, 16.0, 64.0)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_tokens = [mse(baselines.bicubic(pixels, (2, side, side), 16.0, True), pixels) for side in (4, 8, 16)]
    assert by_tokens == sorted(by_tokens, reverse=True)


def test_sequences_of_tokens_become_near_square_grids():
    pixels = clip("sequence", (1, 64, 96, 3))
    coded = baselines.bicubic(pixels, (32,), 12.0, sequence=True)
    assert coded.setting.startswith("1x4x8 ")
    assert coded.bits == 32 * 12
    per_frame = baselines.bicubic(clip("sequence", (3, 64, 64, 3)), (3, 16), 12.0, sequence=True)
    assert per_frame.setting.startswith("3x4x4 ")


@pytest.mark.parametrize("name", ["jpeg", "webp", "h264"])
def test_codecs_stay_within_a_budget_they_can_meet(name):
    if name == "h264" and not baselines.h264_available():
        pytest.skip("PyAV without libx264")
    pixels = clip("codec")
    errors = []
    for bits_per_pixel in (0.8, 2.0):
        budget = bits_per_pixel * 5 * 64 * 64
        coded = baselines.codec(name, pixels, budget)
        assert not coded.over_budget
        assert 0.5 * budget < coded.bits <= budget  # the search ends near the budget, not far below
        assert coded.pixels.shape == pixels.shape
        errors.append(mse(coded, pixels))
    assert errors[1] < errors[0]


def test_odd_sizes_survive_the_codecs():
    pixels = clip("odd", (3, 37, 51, 3))
    for name in ("jpeg", "webp", *(["h264"] if baselines.h264_available() else [])):
        coded = baselines.codec(name, pixels, 3.0 * pixels[..., 0].size)
        assert coded.pixels.shape == pixels.shape
        assert mse(coded, pixels) < 400


def test_an_impossible_budget_is_marked_and_not_hidden():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    coded = baselines.codec("jpeg", pixels, 8.0)
    assert coded.over_budget
    assert coded.bits > 8
    assert coded.setting == "quality 0"


def test_unknown_codecs_and_grids_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'jpeg'"):
        baselines.codec("jpg", clip("x"), 100.0)
    with pytest.raises(ValueError, match=r"got \(64,\)"):
        baselines.bicubic(clip("x"), (64,), 12.0)


@pytest.mark.skipif(not baselines.h264_available(), reason="PyAV without libx264")
def test_h264_does_not_depend_on_what_lies_in_memory():
    pixels, generator = clip("memory"), np.random.default_rng(0)
    found, held = set(), []
    for _ in range(12):
        held.append(generator.integers(0, 255, generator.integers(1000, 300000), dtype=np.uint8))
        held = held[-5:]
        coded = baselines.codec("h264", pixels, 0.3 * pixels[..., 0].size)
        found.add((coded.bits, coded.setting, coded.pixels.tobytes()))
    assert len(found) == 1
