"""One training step: equal to its definition, harmless when a number is not finite, in place, and the same in parts."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run

from tokenizers.pixels import to_float
from tokenizers.train import build
from tokenizers.train.config import to_dict
from tokenizers.train.step import make_step, mean_over_micro_batches

LAST = ("conv_out", "kernel")


def pixels(seed, batch=8, frames=1, size=16):
    """Smooth random clips, uint8."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (batch, frames, 3, 3, 3))
    waves = np.cos(np.pi * np.arange(3) * (np.arange(size)[:, None] + 0.5) / size) / 2  # (size, 3)
    return np.einsum("btijc,yi,xj->btyxc", coarse, waves, waves).clip(0, 255).astype(np.uint8)


def adversarial(argument=None, **changes):
    """The tiny config with the discriminator in force from the first step."""
    config = tiny_run.get_config(argument)
    config.discriminator.start = config.discriminator.generator_start = 0
    for name, value in changes.items():
        config.discriminator[name] = value
    return config


def copied(state):
    """The values of a state that is about to be donated."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)


# --- one backward pass is two


def two_backwards(recipe, params, opponent, x, weight):
    """Losses, lambda and gradients as VQGAN defines them: both losses through the whole generator, then their sum."""

    def judge(params, y):
        return recipe.adversary.module.apply({"params": params}, y, train=True)

    def reconstruct(params):
        return recipe.model.apply({"params": params}, x, train=True)[0]

    def reconstruction_loss(params):
        return jnp.abs(reconstruct(params) - x).mean()

    def generator_loss(params):
        return -judge(opponent, reconstruct(params)).mean()

    def discriminator_loss(opponent):
        real, fake = judge(opponent, x), judge(opponent, reconstruct(params))
        return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())

    loss, of_reconstruction = jax.value_and_grad(reconstruction_loss)(params)
    fooling, of_generator = jax.value_and_grad(generator_loss)(params)
    last = [jnp.linalg.norm(grads[LAST[0]][LAST[1]]) for grads in (of_reconstruction, of_generator)]
    scale = jnp.clip(last[0] / (last[1] + 1e-4), 0, 1e4) * weight
    grads = jax.tree.map(lambda a, b: a + scale * b, of_reconstruction, of_generator)
    value, of_discriminator = jax.value_and_grad(discriminator_loss)(opponent)
    return {"loss": loss, "fooling": fooling, "weight": scale, "discriminator": value}, grads, of_discriminator


def adam_by_hand(params, grads, memory, step, lr, b1, b2=0.999, eps=1e-3, clip=1.0):
    """Clip by the global norm, then Adam (https://arxiv.org/abs/1412.6980, algorithm 1); step counts from 1."""
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / norm), grads)
    first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, memory[0], grads)
    second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, memory[1], grads)
    moved = jax.tree.map(
        lambda p, m, v: p - lr * (m / (1 - b1**step)) / (jnp.sqrt(v / (1 - b2**step)) + eps), params, first, second
    )
    return moved, (first, second), norm


def test_a_step_equals_two_backward_passes():
    config = adversarial(weight=0.7, ema_decay=0.5)
    config.ema_decay, config.ema_warmup = 0.9, False
    for part in (config.optimizer, config.discriminator.optimizer):
        part.update({"schedule": "constant", "warmup": 0, "eps": 1e-3})  # with 1e-8 Adam divides rounding by rounding
    _, recipe, state, step = tiny_run.parts(config, jax.devices()[:1])
    params, opponent = copied(state.params["model"]), copied(state.adversary.params)
    ema, opponent_ema = copied(state.ema), copied(state.adversary.ema)
    zeros = lambda tree: (jax.tree.map(jnp.zeros_like, tree),) * 2  # noqa: E731
    memory, opponent_memory = zeros(params), zeros(opponent)
    reference = jax.jit(lambda p, o, x: two_backwards(recipe, p, o, x, 0.7))
    for count in (1, 2, 3):
        batch = pixels(count, frames=3)
        expected, grads, opponent_grads = reference(params, opponent, batch.astype(np.float32) / 127.5 - 1)
        params, memory, norm = adam_by_hand(params, grads, memory, count, 1e-2, 0.9)
        opponent, opponent_memory, _ = adam_by_hand(opponent, opponent_grads, opponent_memory, count, 2e-3, 0.5)
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, params)
        opponent_ema = jax.tree.map(lambda e, p: 0.5 * e + 0.5 * p, opponent_ema, opponent)
        state, metrics = step(state, batch)
        found = {
            "loss": metrics["loss/generator"],
            "fooling": metrics["loss/fooling"],
            "weight": metrics["adaptive_weight"],
            "discriminator": metrics["loss/discriminator"],
        }
        assert expected["weight"] > 1e-2
        # Absolute: the mean logit is a sum of both signs.
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm/generator"], norm, rtol=1e-5)
        # Absolute: three steps move parameters by 1e-2 each; sums run in another order.
        chex.assert_trees_all_close(state.params["model"], params, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(state.adversary.params, opponent, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(state.ema, ema, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(state.adversary.ema, opponent_ema, rtol=1e-5, atol=1e-6)


# --- not finite


@pytest.mark.parametrize("argument", ["ema", "batch"])
def test_a_step_that_is_not_finite_changes_nothing_but_counters(argument):
    """Parameters, optimizers, EMA, codebook and batch-norm statistics, LeCam anchors, adaptive weight: all stay."""
    config = adversarial("ema", norm="batch", lecam_weight=0.1, ema_decay=0.9)
    if argument == "batch":
        config.accumulate = 2  # one bad micro-batch spoils the step
    _, _, state, step = tiny_run.parts(config, jax.devices()[:1])
    clean = pixels(0).astype(np.float32) / 127.5 - 1
    poisoned = clean.copy()
    poisoned[3, 0, 2, 2, 0] = np.nan
    state, metrics = step(state, clean)
    assert metrics["skipped"] == 0
    before = copied(state)
    for count in (1, 2):
        state, metrics = step(state, poisoned)
        assert (int(state.skipped), int(state.skipped_in_a_row)) == (count, count)
        assert not np.isfinite(metrics["loss/generator"])
    assert int(state.step) == 3
    tiny_run.only_counters_differ(copied(state), before)
    state, metrics = step(state, clean)
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (2, 0)
    assert np.isfinite(metrics["loss/generator"])
    assert np.any(state.params["model"]["conv_in"]["kernel"] != before.params["model"]["conv_in"]["kernel"])


@pytest.mark.parametrize("turn", ["shared", "fresh_forward", "leads"])
def test_a_discriminator_that_is_not_finite_holds_the_generator_as_well(turn):
    """Whenever its turn comes: with the generator's, behind it or before."""
    changes = {"fresh_forward": False} if turn == "shared" else {turn: True}
    config = adversarial("ema", ema_decay=0.9, **changes)
    mesh, recipe, state, _ = tiny_run.parts(config, jax.devices()[:1])
    spoiled = dataclasses.replace(recipe.adversary, discriminator_loss=lambda real, fake: jnp.nan * real.mean())
    with jax.set_mesh(mesh):
        run = jax.jit(make_step(dataclasses.replace(recipe, adversary=spoiled)))
        new, metrics = run(state, {}, {"pixels": pixels(0)})
    assert np.isfinite(metrics["loss/generator"])
    assert np.isfinite(metrics["grad_norm/generator"])
    assert not np.isfinite(metrics["loss/discriminator"])
    assert (int(new.step), int(new.skipped), int(new.skipped_in_a_row)) == (1, 1, 1)
    tiny_run.only_counters_differ(new, state)


# --- in place, once


def test_the_state_is_donated_and_one_shape_is_one_program():
    _, _, state, step = tiny_run.parts(tiny_run.get_config("plain"), jax.devices()[:1])
    for frames in (1, 3, 1, 3):
        before = state
        state, _ = step(state, pixels(0, frames=frames))
        kept = [path for path, leaf in jax.tree_util.tree_leaves_with_path(before) if not leaf.is_deleted()]
        assert not kept, kept
    assert [program._cache_size() for program in step.programs.values()] == [2]


# --- in parts


def test_accumulation_gives_the_losses_of_the_whole_batch():
    """Without batch statistics and with a fixed adversarial weight the mean over parts is the mean over the batch."""
    curves = {}
    for parts in (1, 2):
        config = adversarial(adaptive=False)
        config.accumulate = parts
        _, _, state, step = tiny_run.parts(config, jax.devices()[:1])
        curves[parts] = []
        for number in range(4):
            state, metrics = step(state, pixels(number))
            curves[parts].append(metrics)
    for whole, split in zip(curves[1], curves[2], strict=True):
        chex.assert_trees_all_close(split, whole, rtol=1e-4)
    with pytest.raises(ValueError, match="a batch of 7 cannot be accumulated in 2 equal parts"):
        step(state, pixels(0, batch=7))


def test_parts_are_no_loop_on_a_cpu():
    """There gradients of convolutions in a loop take 20 times as long."""

    def run(parts):
        return mean_over_micro_batches(lambda carry, inputs: (carry + 1, 2 * inputs[0]["x"]), 0, {"x": parts})

    parts = jnp.arange(6.0).reshape(3, 2)
    chex.assert_trees_all_equal(run(parts), (jnp.int32(3), jnp.array([4.0, 6.0])))
    assert ("while" in jax.jit(run).lower(parts).as_text()) == (jax.default_backend() != "cpu")


def test_codebook_statistics_follow_every_part():
    config = tiny_run.get_config("ema")
    config.discriminator.name = ""
    config.accumulate = 2
    _, _, state, step = tiny_run.parts(config, jax.devices()[:1])
    before = copied(state.model_state)["codebook"]["bottleneck"]["cluster_size"]
    state, _ = step(state, pixels(0))
    after = state.model_state["codebook"]["bottleneck"]["cluster_size"]
    # Two updates of (0.99 n + 0.01 counts) with 4 images of 16 tokens each.
    total = 0.99 * (0.99 * before.sum() + 0.01 * 64) + 0.01 * 64
    np.testing.assert_allclose(np.sum(after), total, rtol=1e-5)


# --- the discriminator's turn


def test_the_discriminator_waits_for_its_start():
    config = adversarial("", ema_decay=0.5, lecam_weight=0.1)
    config.discriminator.update({"start": 1, "generator_start": 2})
    _, _, state, step = tiny_run.parts(config, jax.devices()[:1])
    plain = tiny_run.parts(tiny_run.get_config("plain"), jax.devices()[:1])
    other, other_step = plain[2], plain[3]
    chex.assert_trees_all_equal(state.params, other.params)
    before = copied(state.adversary)
    for number in (0, 1):  # the generator does not see it in either step
        state, metrics = step(state, pixels(number))
        other, expected = other_step(other, pixels(number))
        np.testing.assert_allclose(metrics["loss/generator"], expected["loss/generator"], rtol=1e-5)
        if number == 0:
            assert metrics["loss/discriminator"] == 0
            chex.assert_trees_all_equal(state.adversary.replace(balance=before.balance), before)
        else:
            assert metrics["loss/discriminator"] > 0
    chex.assert_trees_all_close(state.params, other.params, rtol=1e-5, atol=1e-6)
    state, _ = step(state, pixels(2))
    other, _ = other_step(other, pixels(2))
    moved = optax.tree.norm(optax.tree.sub(state.params, other.params))
    assert moved > 1e-4  # now it does
    assert np.all(np.isfinite(jax.tree.leaves(jax.tree.map(jnp.sum, state.adversary.ema))))


@pytest.mark.parametrize(("ramp", "shares"), [(0, [0, 0, 1, 1, 1, 1]), (4, [0, 0, 0.25, 0.5, 0.75, 1])])
def test_the_generator_meets_the_discriminator_gradually(ramp, shares):
    config = adversarial(ramp=ramp)
    config.discriminator.generator_start = 2
    adversary = build.recipe(to_dict(config)).adversary
    np.testing.assert_allclose([adversary.seen(jnp.int32(step)) for step in range(6)], shares)


def shared_forward_loss(changes):
    """The first loss of the discriminator without the second forward pass."""
    _, _, state, step = tiny_run.parts(adversarial("ema", **changes | {"fresh_forward": False}), jax.devices()[:1])
    return float(step(state, pixels(0))[1]["loss/discriminator"])


@pytest.mark.parametrize(
    "changes",
    [
        {"r1_weight": 10.0, "r1_every": 2, "norm": "batch"},
        pytest.param(
            {"fresh_forward": True, "lecam_weight": 0.1, "norm": "actnorm", "generator_loss": "non_saturating_item"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"name": "patchgan_3d", "norm": "none", "discriminator_loss": "vanilla", "feature_matching_weight": 3.0},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_kind_of_adversary_trains(changes):
    _, _, state, step = tiny_run.parts(adversarial("ema", **changes), jax.devices()[:1])
    losses = []
    for number in range(3):
        state, metrics = step(state, pixels(number))
        losses.append(float(metrics["loss/discriminator"]))
    assert int(state.skipped) == 0
    assert len(set(losses)) == 3
    if "fresh_forward" in changes:  # the same state and pixels, judged after the generator has moved, not before
        assert shared_forward_loss(changes) != losses[0]
    if "r1_weight" in changes:
        assert losses[0] > losses[1]  # the penalty comes in every second step, at twice its weight


@pytest.mark.slow
def test_feature_matching_is_added_to_what_fools_the_discriminator():
    fooling = []
    for weight in (0.0, 1.0, 2.0):
        _, _, state, step = tiny_run.parts(adversarial(feature_matching_weight=weight), jax.devices()[:1])
        fooling.append(float(step(state, pixels(0))[1]["loss/fooling"]))
    assert fooling[1] > fooling[0]
    np.testing.assert_allclose(fooling[2] - fooling[1], fooling[1] - fooling[0], rtol=1e-4)


def test_a_model_of_images_trains_on_the_frames_of_clips():
    config = tiny_run.get_config("plain")
    config.model.video = False
    _, recipe, state, step = tiny_run.parts(config, jax.devices()[:1])
    assert not recipe.model.spec.video
    state, metrics = step(state, pixels(0, frames=2))
    assert np.isfinite(metrics["loss/generator"])
    assert int(state.skipped) == 0


def test_a_learned_log_variance_moves():
    config = tiny_run.get_config("plain")
    config.loss.reduction = "logvar"
    _, _, state, step = tiny_run.parts(config, jax.devices()[:1])
    state, metrics = step(state, pixels(0))
    assert float(state.params["objective"]["logvar"]) != 0
    # Sum over a frame of |error| / exp(0) + 0, mean over frames.
    np.testing.assert_allclose(metrics["loss/generator"], metrics["loss/l1"] * 16 * 16 * 3, rtol=1e-5)


def test_overlapping_windows_of_a_clip_should_agree():
    config = tiny_run.get_config("plain")
    config.model.bottleneck = {"name": "identity"}
    config.loss.consistency.update({"weight": 0.5, "frames": 3, "step": 2})
    _, recipe, state, step = tiny_run.parts(config, jax.devices()[:1])
    x, variables = to_float(pixels(0, frames=7)), {"params": copied(state.params["model"])}
    parts = [jax.jit(recipe.model.apply)(variables, x[:, start : start + 3]) for start in (0, 2, 4)]
    shared = [
        np.mean([np.abs(after[:, 0] - before[:, 2]) for before, after in zip(values[:-1], values[1:], strict=True)])
        for values in ([part[0] for part in parts], [part[1].latents for part in parts])
    ]
    # A frame that two windows show is the mean of both.
    clip = np.concatenate([part[0] for part in parts], axis=1)
    clip = np.stack([clip[:, seen].mean(axis=1) for seen in ([0], [1], [2, 3], [4], [5, 6], [7], [8])], axis=1)
    state, metrics = step(state, pixels(0, frames=7))
    np.testing.assert_allclose(metrics["loss/l1"], np.abs(clip - x).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/frame_consistency"], shared[0], rtol=1e-4)
    # Every latent channel stands for 3 * 4 * 4 / 3 values of pixels.
    np.testing.assert_allclose(metrics["loss/latent_consistency"], 16 * shared[1], rtol=1e-4)
    total = metrics["loss/l1"] + 0.5 * (metrics["loss/frame_consistency"] + metrics["loss/latent_consistency"])
    np.testing.assert_allclose(metrics["loss/generator"], total, rtol=1e-5)
    _, metrics = step(state, pixels(0, frames=1))  # an image has nothing to agree with
    assert metrics["loss/frame_consistency"] == metrics["loss/latent_consistency"] == 0
