"""Windows of a clip: there and back, and what they disagree about, as in Cosmos's code."""

import jax
import numpy as np
import pytest
import refweights
from reference import Case, cases

from tokenizers.losses.consistency import disagreement, from_windows, latent_scale, to_windows


@pytest.mark.parametrize("name", cases("cosmos", "train_loss_consistency"))
def test_windows_and_losses_are_cosmos(name):
    case = Case("cosmos", name)
    frames, step, weight = (case.meta[key] for key in ("num_frames", "step", "weight"))
    x, latents = case.input("x"), case.input("latent")
    windows = np.asarray(to_windows(x, frames, step))
    np.testing.assert_array_equal(windows, case.outputs["windows_x"])
    scaled = windows * (np.arange(6, dtype=np.float32) + 1).reshape(-1, 1, 1, 1, 1) / 4
    np.testing.assert_allclose(from_windows(scaled, 3, step), case.outputs["unshuffle_mean"], atol=1e-6)
    shift = step // (frames // latents.shape[1])
    of_latents = weight * latent_scale(windows.shape, latents.shape) * disagreement(latents, 3, shift)
    np.testing.assert_allclose(of_latents, case.outputs["loss/latent_consistency"][0], rtol=1e-5)
    of_frames = disagreement(to_windows(case.input("other"), frames, step), 3, step)
    np.testing.assert_allclose(weight * of_frames, case.outputs["loss/frame_consistency"][0], atol=1e-7)


def test_a_clip_comes_back_from_its_windows():
    x = refweights.uniform("clip", (2, 17, 4, 4, 3))
    for frames, step in ((9, 4), (5, 3), (17, 1), (1, 1)):
        windows = to_windows(x, frames, step)
        count = (17 - frames) // step + 1
        assert windows.shape == (2 * count, frames, 4, 4, 3)
        np.testing.assert_allclose(from_windows(windows, count, step), x, atol=1e-6)


def test_disagreement_is_that_of_the_same_frames():
    x = refweights.uniform("clip", (1, 7, 1, 1, 1))
    windows = np.array(to_windows(x, 5, 2))
    assert disagreement(windows, 2, 2) == 0
    windows[1, 0] += 0.5  # one of the three frames they share
    np.testing.assert_allclose(disagreement(windows, 2, 2), 0.5 / 3, rtol=1e-6)
    slope = jax.grad(lambda w: disagreement(w, 2, 2))(windows)
    np.testing.assert_allclose(slope[1, [0, 4], 0, 0, 0], [1 / 3, 0], atol=1e-6)  # frame 4 is its own alone


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: to_windows(x, 4, 2), "7 frames are no windows of 4 frames at steps of 2"),
        (lambda x: disagreement(x, 2, 7), "have nothing in common"),
        (lambda x: disagreement(x, 3, 1), "2 windows are no multiple of 3"),
    ],
)
def test_windows_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.zeros((2, 7, 1, 1, 1), np.float32))
