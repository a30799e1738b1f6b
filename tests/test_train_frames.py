"""Single frames of clips for perceptual losses and discriminators, and what the adversarial loss is weighed against."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from tokenizers.losses.adversarial import r1_penalty
from tokenizers.train import build, frames
from tokenizers.train.objective import Objective, Term, mean_reduction

CLIPS = np.arange(4 * 5 * 2 * 2 * 3, dtype=np.float32).reshape(4, 5, 2, 2, 3)


def test_one_frame_is_one_of_each_clip_and_the_same_of_both():
    picked = []
    for seed in range(8):
        view = frames.one_frame(jax.random.key(seed), CLIPS.shape)
        seen = view(CLIPS)
        assert seen.shape == (4, 1, 2, 2, 3)
        places = [int(np.flatnonzero((clip == one).all((1, 2, 3)))[0]) for clip, one in zip(CLIPS, seen, strict=True)]
        np.testing.assert_array_equal(view(-CLIPS), -seen)
        picked.append(places)
    assert len({place for places in picked for place in places}) == 5
    assert frames.all_frames(jax.random.key(0), CLIPS.shape)(CLIPS) is CLIPS


def test_perceptual_terms_alone_see_single_frames():
    mean = Term("mean", 2.0, lambda p, t, _: jnp.mean(p - t))
    seen = Term("seen", 3.0, lambda p, t, _: jnp.mean(p - t), perceptual=True)
    objective = Objective((mean, seen), mean_reduction, {}, {}, {}, frames=frames.one_frame)
    view = objective.frames(jax.random.key(3), CLIPS.shape)
    total, parts = objective.reconstruction(CLIPS, 0 * CLIPS, {}, {}, view)
    np.testing.assert_allclose(parts["mean"], CLIPS.mean(), rtol=1e-6)
    np.testing.assert_allclose(parts["seen"], view(CLIPS).mean(), rtol=1e-6)
    np.testing.assert_allclose(total, 2 * parts["mean"] + 3 * parts["seen"], rtol=1e-6)
    np.testing.assert_allclose(objective.perception(CLIPS, 0 * CLIPS, {}, view), 3 * parts["seen"], rtol=1e-6)


def test_a_gradient_of_the_wanted_length_costs_nothing():
    real = np.zeros((3, 4), np.float32)

    def judge(x):  # gradients of the lengths 1, 2, 0
        return x @ np.full(4, 0.5, np.float32) * np.array([1.0, 2.0, 0.0], np.float32)

    @jax.jit
    def penalties(scale):
        return [r1_penalty(lambda x: scale * judge(x), real, norm) for norm in (0.0, 1.0)]

    np.testing.assert_allclose(penalties(1.0), [(1 + 4 + 0) / 3, (0 + 1 + 1) / 3], rtol=1e-6)
    assert np.isfinite(jax.jit(jax.grad(lambda scale: penalties(scale)[1]))(1.0))  # also where a gradient is zero


def small():
    config = base.get_base()
    config.model.name = "causal3d"
    config.discriminator.name = "patchgan_2d"
    config.data = base.data(source="embedded")
    config.data.streams["image"] = base.stream(frames=1, batch_size=2)
    return config


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("discriminator", {"against": "perceptual"}, "needs a perceptual loss"),
        ("discriminator", {"against": "l1"}, "weighed against 'l1'"),
        ("discriminator", {"frames": "some"}, "frames of a clip 'some'"),
        ("loss", {"frames": "first"}, "frames of a clip 'first'"),
        ("loss", {"resolutions": (0.5,), "equivariance": {"probability": 0.5}}, "exclude each other"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_does_not_go_together_is_refused(part, changes, message):
    config = small()
    config[part].update(changes)
    with pytest.raises(ValueError, match=message):
        build.recipe(config.to_dict())


def test_resolutions_are_programs_of_their_own():
    config = small()
    config.loss.resolutions = (0.5, 1.0)
    config.discriminator.name = None
    recipe = build.recipe(config.to_dict())
    drawn = {recipe.at(step).program for step in range(20)}
    assert len(drawn) == 2
    assert recipe.at(3).program == recipe.at(3).program
    recipe.check((2, 1, 64, 64, 3))
    with pytest.raises(ValueError, match=r"config.loss.resolutions has 0.5: .*\(2, 1, 36, 32, 3\)"):
        recipe.check((2, 1, 72, 64, 3))
