"""Crop geometry, antialiasing, and clips of virtual cameras."""

import numpy as np
import pytest
import refweights
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import Case, cases

from tokenizers.data import embedded, transforms
from tokenizers.data import settings as settings_of_data
from tokenizers.data.camera import virtual_camera_clip
from tokenizers.data.transforms import FILTERS, Crop, apply_crop, choose_crop, nearest_aspect

sides = st.integers(1, 400)


@settings(max_examples=200, deadline=None)
@given(frame=st.tuples(sides, sides), size=st.tuples(sides, sides), seed=st.integers(0, 99), high=st.floats(1, 8))
def test_crops_lie_inside_the_resized_frame_and_keep_its_aspect_ratio(frame, size, seed, high):
    for rng in (None, np.random.default_rng(seed)):
        crop = choose_crop(frame, size, rng=rng, zoom=(1.0, high), flip=True)
        assert 0 <= crop.top <= crop.height - size[0]
        assert 0 <= crop.left <= crop.width - size[1]
        scale = max(crop.height / frame[0], crop.width / frame[1])
        # Sizes are whole pixels: each side is within one pixel of the exact one.
        assert abs(crop.height - frame[0] * scale) <= 1
        assert abs(crop.width - frame[1] * scale) <= 1
        cover = max(size[0] / frame[0], size[1] / frame[1])
        if rng is None:
            assert crop.height == size[0] or crop.width == size[1]
            assert not crop.flip
        # Never magnified beyond the frame's own pixels, unless it is too small for the crop anyway.
        assert crop.height <= max(1.0, cover) * frame[0] + 1e-3


@settings(max_examples=30, deadline=None)
@given(
    frame=st.tuples(st.integers(8, 120), st.integers(8, 120)),
    size=st.tuples(st.integers(4, 60), st.integers(4, 60)),
    seed=st.integers(0, 9),
    name=st.sampled_from(sorted(FILTERS)),
)
def test_cropping_equals_resizing_everything_first(frame, size, seed, name):
    rng = np.random.default_rng(seed)
    # Mid-range noise, because Pillow clips where a filter overshoots 0 or 255 between its two passes.
    pixels = rng.integers(96, 160, (2, *frame, 3), np.uint8)
    crop = choose_crop(frame, size, rng=rng, zoom=(1.0, 2.0), flip=True)
    out = apply_crop(pixels, crop, size, name)
    assert out.shape == (2, *size, 3)
    assert out.dtype == np.uint8
    for source, got in zip(pixels, out, strict=True):
        whole = np.asarray(Image.fromarray(source).resize((crop.width, crop.height), FILTERS[name]))
        want = whole[crop.top : crop.top + size[0], crop.left : crop.left + size[1]]
        want = want[:, ::-1] if crop.flip else want
        # Both sides round to 8 bits after each of two passes, so they may differ by 2; the weights of "box" jump where
        # a sample lies on a pixel's edge.
        difference = np.abs(got.astype(int) - want)
        assert difference.max() <= 2 or (name == "box" and (difference > 2).mean() < 0.2)


def test_center_crop_is_the_published_evaluation_transform():
    # Short side to 256, long side truncated, then the middle: 375 x 500 -> 256 x 341 -> offset round(85 / 2) = 42.
    assert choose_crop((375, 500), (256, 256)) == Crop(256, 341, 0, 42)
    assert choose_crop((500, 375), (256, 256)) == Crop(341, 256, 42, 0)


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_resizing_antialiases(name):
    # A pattern above the new Nyquist limit must become flat gray; point sampling would keep black and white.
    stripes = np.zeros((1, 256, 256, 3), np.uint8)
    stripes[:, :, ::2] = 255
    out = apply_crop(stripes, choose_crop((256, 256), (32, 32)), (32, 32), name)
    assert np.abs(out[:, 2:-2, 2:-2].astype(int) - 127).max() <= 3


def test_unknown_filters_name_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'lanczos'"):
        apply_crop(np.zeros((1, 8, 8, 3), np.uint8), Crop(4, 4, 0, 0), (4, 4), "lanzcos")


def test_a_tie_between_aspect_ratios_gives_all_of_them():
    buckets = ((64, 64), (48, 80), (128, 128), (80, 48))
    assert nearest_aspect(100, 110, buckets) == [0, 2]
    assert nearest_aspect(100, 180, buckets) == [1]
    assert nearest_aspect(180, 100, buckets) == [3]


@settings(max_examples=25, deadline=None)
@given(
    photo=st.tuples(st.integers(20, 200), st.integers(20, 200)),
    size=st.tuples(st.integers(8, 48), st.integers(8, 48)),
    frames=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_the_camera_never_leaves_the_photograph(photo, size, frames, seed):
    background = np.full((*photo, 3), 200, np.uint8)
    clip = virtual_camera_clip(background, background, frames, size, np.random.default_rng(seed))
    assert clip.shape == (frames, *size, 3)
    assert clip.dtype == np.uint8
    # Outside of the photograph Pillow would paint black.
    assert clip.min() >= 198
    assert clip.max() <= 202


def test_camera_clips_move_smoothly_and_repeat_from_their_seed():
    photo, other = embedded.photograph("astronaut.png"), embedded.photograph("rocket.jpg")
    moved = []
    for seed in range(8):
        clip = virtual_camera_clip(photo, other, 9, (64, 64), np.random.default_rng(seed))
        again = virtual_camera_clip(photo, other, 9, (64, 64), np.random.default_rng(seed))
        np.testing.assert_array_equal(clip, again)
        steps = np.abs(np.diff(clip.astype(float), axis=0)).mean((1, 2, 3))
        jump = np.abs(clip[-1].astype(float) - clip[0]).mean()
        moved.append(jump)
        # Neighbouring frames differ less than the ends of the clip: motion, not a new picture each frame.
        assert steps.max() < max(jump, 4)
    assert np.median(moved) > 8


def test_camera_clips_do_not_alias():
    # The finest checkerboard, seen from far away, is flat gray. A magnified one would show its squares.
    photo = np.zeros((256, 256, 3), np.uint8)
    photo[::2, ::2] = photo[1::2, 1::2] = 255
    flat = np.full((64, 64, 3), 127, np.uint8)
    for seed in range(20):
        clip = virtual_camera_clip(photo, flat, 3, (32, 32), np.random.default_rng(seed))
        if clip.std() < 30:
            return
    pytest.fail("no clip was low-passed")


def test_embedded_photographs_are_rgb_and_the_splits_are_disjoint():
    assert not set(embedded.TRAIN) & set(embedded.HELD_OUT)
    for name in embedded.HELD_OUT:
        pixels = embedded.photograph(name)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert np.abs(pixels[..., 0].astype(int) - pixels[..., 2]).mean() > 10, "held-out photographs are in colour"
    assert len(embedded.EmbeddedSource()) == len(embedded.TRAIN)
    # The astronaut's suit is orange: red above green above blue.
    suit = embedded.photograph("astronaut.png")[350:400, 100:150].reshape(-1, 3).mean(0)
    assert suit[0] > suit[1] > suit[2]


@pytest.mark.parametrize("name", cases("vtp", "center_crop_arr"))
def test_adm_crop_is_the_published_one(name):
    case = Case("vtp", name)
    side = case.meta["config"]["image_size"]
    for key, entry in case.meta["inputs"].items():
        unit = (refweights.uniform(entry["seed_name"], tuple(entry["shape"])).astype(np.float64) + 1) / 2
        image = np.floor(entry["low"] + unit * (entry["high"] - entry["low"])).astype(np.uint8)
        np.testing.assert_array_equal(transforms.adm_crop(image[None], (side, side))[0], case.outputs[key], key)


def test_adm_crop_makes_squares():
    frames = np.arange(2 * 9 * 20 * 3, dtype=np.uint8).reshape(2, 9, 20, 3)
    assert transforms.adm_crop(frames, (4, 4)).shape == (2, 4, 4, 3)
    assert transforms.adm_crop(frames, (40, 40)).shape == (2, 40, 40, 3)
    np.testing.assert_array_equal(transforms.adm_crop(frames, (9, 9)), frames[:, :, 5:14])
    with pytest.raises(ValueError, match="makes squares"):
        transforms.adm_crop(frames, (4, 8))
    stream = {"resolutions": ((16, 24),), "batch_size": 2}
    with pytest.raises(ValueError, match="every resolution must be one"):
        settings_of_data.resolve({"crop": "adm", "streams": {"image": stream}})
