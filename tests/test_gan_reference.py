"""Whole losses of VQGAN and VidTok against the authors' code, generator and discriminator, over several global steps.

Every logged term, the adaptive weight, the gradients on both sides, the running statistics and the LeCam anchors.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
from reference import Case, cases, relative_l2
from test_discriminators import from_official, official_entry

from tokenizers.convert import lpips as lpips_table
from tokenizers.convert.engine import to_tree
from tokenizers.discriminators.patchgan import patchgan_2d, patchgan_3d
from tokenizers.losses.adversarial import DISCRIMINATOR, GENERATOR, lecam_init, lecam_update
from tokenizers.losses.balance import adaptive_weight, balanced_pull, starting_at
from tokenizers.losses.reconstruction import absolute_error, negative_log_likelihood
from tokenizers.networks.lpips import LPIPS

# Summation orders differ in float32. Observed on CPU: losses 5e-6, gradients 7e-5, weight 1e-5.
LOSS, GRADIENT = 1e-4, 1e-3
LAST = "decoder/conv_out/kernel"


@functools.lru_cache(maxsize=1)
def _lpips_variables(system, name):
    state = lpips_table.torchvision_names(Case(system, name).weights("loss.perceptual_loss."))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    target = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)
    return to_tree(lpips_table.table("vgg"), target, state, ignore=lpips_table.IGNORE)


class Step:
    """The two losses of a recipe as this library composes them, and the discriminator's state between their calls."""

    def __init__(self, discriminator, weights, pixels):
        self.module = discriminator
        self.official = weights
        self.variables = from_official(discriminator, weights, pixels)
        self.last = max(int(name.split(".")[1]) for name in weights)

    def logits(self, params, pixels, statistics, train=True):
        """Logits and the statistics afterwards."""
        variables = {"params": params, "batch_stats": statistics}
        if not train:
            return self.module.apply(variables, pixels), statistics
        logits, updated = self.module.apply(variables, pixels, train=True, mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    def official_norms(self, gradients):
        names = [n for n in self.official if re.search(r"\.(weight|bias)$", n)]
        return [np.linalg.norm(official_entry(gradients, name, self.last)) for name in names]


def assert_close(actual, expected, rtol, name):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", cases("vqgan", "loss_.*"))
def test_vqgan_losses_agree_with_the_original(name):
    case = Case("vqgan", name)
    config, expected, train = case.meta["config"], case.outputs, case.meta["mode"] == "train"
    image, recon = jnp.asarray(case.input("image")), jnp.asarray(case.input("recon"))
    weights = case.weights("loss.discriminator.")
    step = Step(patchgan_2d(width=config["disc_ndf"]), weights, image)
    loss_name = config.get("disc_loss", "hinge")
    lpips = LPIPS()
    balance = adaptive_weight(config["disc_weight"])
    schedule = starting_at(config["disc_start"], config.get("disc_factor", 1.0))

    def reconstruction_loss(y, lpips_variables):
        distance = lpips.apply(lpips_variables, image, y)
        error = absolute_error(y, image) + config.get("perceptual_weight", 1.0) * distance[:, None, None, None]
        return jnp.mean(error), distance

    def generator_loss(y, of_discriminator, statistics):
        logits, statistics = step.logits(of_discriminator, y, statistics, train)
        return GENERATOR[loss_name](logits), (logits, statistics)

    def model(params):
        return jnp.einsum("bhwc,cd->bhwd", recon, params["decoder"]["conv_out"]["kernel"][0, 0]), jnp.float32(0)

    @jax.jit
    def generator_step(params, c_rec, of_discriminator, statistics, active):
        (y, auxiliary), pull = jax.vjp(model, params)
        value_and_gradient = jax.value_and_grad(generator_loss, has_aux=True)
        (g_loss, (logits, statistics)), c_gan = value_and_gradient(y, of_discriminator, statistics)
        parts = {"reconstruction": c_rec, "gan": c_gan, "active": active}
        gradients, state = balanced_pull(pull, balance, balance.init(y), last_layer=LAST, auxiliary=auxiliary, **parts)
        total = c_rec + state.weight * active * c_gan
        return g_loss, logits, state.weight, gradients, total, statistics

    @jax.jit
    def discriminator_step(params, statistics, factor):
        def loss(params):
            real, after = step.logits(params, image, statistics, train)
            fake, after = step.logits(params, recon, after, train)
            return factor * DISCRIMINATOR[loss_name](real, fake), (real.mean(), fake.mean(), after)

        return jax.value_and_grad(loss, has_aux=True)(params)

    params = {"decoder": {"conv_out": {"kernel": jnp.eye(3)[None, None]}}}
    (nll, distance), c_rec = jax.jit(jax.value_and_grad(reconstruction_loss, has_aux=True))(
        recon, _lpips_variables("vqgan", name)
    )
    statistics = step.variables["batch_stats"]
    for index in case.meta["global_steps"]:
        active = schedule(index)
        g_loss, logits, weight, gradients, of_recon, statistics = generator_step(
            params, c_rec, step.variables["params"], statistics, active
        )
        (d_loss, (real, fake, statistics)), of_d = discriminator_step(step.variables["params"], statistics, active)
        codebook = case.meta["codebook_loss"] * config.get("codebook_weight", 1.0)
        scalars = {
            f"g{index}_nll_loss": nll,
            f"g{index}_p_loss": distance.mean(),
            f"g{index}_g_loss": g_loss,
            f"g{index}_disc_factor": active,
            f"g{index}_total_loss": nll + weight * active * g_loss + codebook,
            f"d{index}_disc_loss": d_loss,
            f"d{index}_logits_real": real,
            f"d{index}_logits_fake": fake,
        }
        for key, value in scalars.items():
            assert_close(value, expected[key], LOSS, key)
        assert_close(weight, expected[f"g{index}_d_weight"], GRADIENT, f"g{index}_d_weight")
        assert relative_l2(logits, expected["logits_fake_map"]) < LOSS
        assert relative_l2(of_recon, expected[f"g{index}_total_grad_recon"]) < GRADIENT
        of_last = gradients["decoder"]["conv_out"]["kernel"].transpose(3, 2, 0, 1)
        assert relative_l2(of_last, expected[f"g{index}_total_grad_last_layer"]) < GRADIENT
        if f"d{index}_grad_norms" in expected:
            assert relative_l2(step.official_norms(of_d), expected[f"d{index}_grad_norms"]) < GRADIENT
            of_first = of_d["conv_in"]["kernel"].transpose(3, 2, 0, 1)
            assert relative_l2(of_first, expected[f"d{index}_grad__main_0_weight"]) < GRADIENT
    for buffer in case.meta["final_buffers"]:
        value = official_entry(statistics, buffer, step.last)
        assert relative_l2(value, expected["final__" + buffer.replace(".", "_")]) < LOSS, buffer


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("vidtok", "loss_.*"))
def test_vidtok_losses_agree_with_the_original(name):
    case = Case("vidtok", name)
    config, expected = case.meta["config"]["params"], case.outputs
    video, pre_last = jnp.asarray(case.input("x")), jnp.asarray(case.input("pre_last"))
    frames = video.reshape(-1, *video.shape[2:])
    weights = case.weights("loss.discriminator.")
    discriminator = {"2d": patchgan_2d, "3d": patchgan_3d}[config["disc_type"]]()
    step = Step(discriminator, weights, video)
    lpips = LPIPS()
    generator_name = "non_saturating_item" if config["gen_loss_cross_entropy"] else "hinge"
    discriminator_name = config.get("disc_loss", "hinge")
    logvar = jnp.asarray(case.weights("loss.")["logvar"])
    balance = adaptive_weight(config["disc_weight"])
    schedule = starting_at(config["disc_start"])
    terms = case.meta["regularization_log"]
    regularization = sum(config["regularization_weights"].get(key, 0.0) * value for key, value in terms.items())

    def reconstruction_loss(y, lpips_variables):
        y = y.reshape(frames.shape)
        distance = lpips.apply(lpips_variables, frames, y)
        error = absolute_error(y, frames) + config["perceptual_weight"] * distance[:, None, None, None]
        return negative_log_likelihood(error, logvar), (jnp.mean(error), jnp.mean(distance))

    def generator_loss(y, of_discriminator, statistics):
        logits, statistics = step.logits(of_discriminator, y, statistics)
        return GENERATOR[generator_name](logits), statistics

    def model(params):
        kernel = params["decoder"]["conv_out"]["kernel"][0, 0, 0]
        return jnp.tanh(params["pre_last"] @ kernel), jnp.float32(regularization)

    @jax.jit
    def generator_step(params, c_rec, of_discriminator, statistics, active):
        (y, auxiliary), pull = jax.vjp(model, params)
        value_and_gradient = jax.value_and_grad(generator_loss, has_aux=True)
        (g_loss, statistics), c_gan = value_and_gradient(y, of_discriminator, statistics)
        parts = {"reconstruction": c_rec, "gan": c_gan, "active": active}
        gradients, state = balanced_pull(pull, balance, balance.init(y), last_layer=LAST, auxiliary=auxiliary, **parts)
        return g_loss, state.weight, gradients, statistics

    @jax.jit
    def discriminator_step(params, y, statistics, lecam, factor):
        def loss(params):
            real, after = step.logits(params, video, statistics)
            fake, after = step.logits(params, y, after)
            adversarial = DISCRIMINATOR[discriminator_name](real, fake)
            penalty, anchors = lecam_update(lecam, real, fake)
            total = factor * (adversarial + config["lecam_loss_weight"] * penalty)
            return total, (adversarial, penalty, real.mean(), fake.mean(), after, anchors)

        return jax.value_and_grad(loss, has_aux=True)(params)

    kernel = refweights.weight(case.meta["last_layer"]["seed_name"], tuple(case.meta["last_layer"]["shape"]))
    params = {"decoder": {"conv_out": {"kernel": jnp.asarray(kernel.transpose(2, 3, 4, 1, 0))}}, "pre_last": pre_last}
    y = jax.jit(model)(params)[0]
    (nll, (rec, distance)), c_rec = jax.jit(jax.value_and_grad(reconstruction_loss, has_aux=True))(
        y, _lpips_variables("vidtok", name)
    )
    statistics, lecam = step.variables["batch_stats"], lecam_init()
    for call, global_step in enumerate(case.meta["global_steps"]):
        active = schedule(global_step)
        g_loss, weight, gradients, statistics = generator_step(
            params, c_rec, step.variables["params"], statistics, active
        )
        (d_loss, (adversarial, penalty, real, fake, statistics, lecam)), of_d = discriminator_step(
            step.variables["params"], y, statistics, lecam, active
        )
        g, d = f"g{call}/", f"d{call}/"
        scalars = {
            g + "loss": nll + weight * active * g_loss + regularization,
            g + "train/nll_loss": nll,
            g + "train/rec_loss": rec,
            g + "train/p_loss": distance,
            g + "train/g_loss": g_loss,
            g + "train/logvar": logvar,
            g + "train/disc_factor": active,
            d + "loss": d_loss,
            d + "train/logits_real": real,
            d + "train/logits_fake": fake,
            d + "train/non_saturated_d_loss": adversarial,
            d + "train/lecam_loss": penalty,
            d + "lecam_ema": np.stack(lecam),
        }
        for key, value in scalars.items():
            if key in expected:
                # The total carries the adaptive weight, which is known to 1e-3.
                assert_close(value, expected[key], GRADIENT if key == g + "loss" else LOSS, key)
        assert_close(weight, expected[g + "train/d_weight"], GRADIENT, g + "d_weight")
        of_last = gradients["decoder"]["conv_out"]["kernel"].transpose(4, 3, 0, 1, 2)
        assert relative_l2(of_last, expected[g + "d_last_layer"]) < GRADIENT
        of_pre_last = np.linalg.norm(gradients["pre_last"])
        assert_close(of_pre_last, expected[g + "d_pre_last_norm"], GRADIENT, g + "d_pre_last_norm")
        assert relative_l2(step.official_norms(of_d), expected[d + "gradnorms"]) < GRADIENT
        of_first = of_d["conv_in"]["kernel"]
        assert relative_l2(np.moveaxis(of_first, (-1, -2), (0, 1)), expected[d + "grad_first_conv"]) < GRADIENT
        for key, value in expected.items():
            if key.startswith(d + "bn_after/"):
                statistic = official_entry(statistics, key.removeprefix(d + "bn_after/"), step.last)
                assert relative_l2(statistic, value) < LOSS, key
    stored = y[:, :, ::2, 1::2] if "recon" in case.meta.get("slices", {}) else y
    assert relative_l2(stored, expected["recon"]) < LOSS
