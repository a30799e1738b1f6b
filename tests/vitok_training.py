"""Training steps of ViTok's reference cases through `train.step.make_step`.

The authors' script is re-enacted in those cases with what it does against its words: of the two pixel losses the
smooth L1 alone counts, and gradients are not clipped.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import refweights
from official_training import drawn, lpips_variables, remembered
from reference import relative_l2
from test_discriminators import from_official

import tokenizers
from configs import base
from tokenizers.convert.engine import to_official
from tokenizers.convert.vitok import TABLE
from tokenizers.discriminators.patchgan import patchgan_3d
from tokenizers.discriminators.stylegan import StyleDiscriminator
from tokenizers.losses import adversarial, perceptual, reconstruction
from tokenizers.losses.balance import constant_weight
from tokenizers.networks.lpips import LPIPS
from tokenizers.train import optim
from tokenizers.train.adversary import Adversary
from tokenizers.train.autoencoder import Recipe
from tokenizers.train.objective import Objective, Term, mean_reduction
from tokenizers.train.state import AdversaryState, new_state
from tokenizers.train.step import make_step

_STYLE = {"conv1": "conv_in", "conv_last": "conv_out", "fc1": "dense1", "fc2": "dense2"}


class LPIPSWeights:
    """Weights that `lpips_variables` asks a case for, by torchvision's and the package's names."""

    def weights(self, prefix):
        return {name: refweights.weight(name, shape) for name, shape in _lpips_shapes().items()}


def _lpips_shapes():
    widths = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
    widths |= {17: (256, 512)} | dict.fromkeys((19, 21, 24, 26, 28), (512, 512))
    shapes = {f"features.{i}.weight": (out, into, 3, 3) for i, (into, out) in widths.items()}
    shapes |= {f"features.{i}.bias": (out,) for i, (_, out) in widths.items()}
    return shapes | {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}


def style_place(name):
    """(layer, kind) of one of their tensors."""
    *where, kind = name.split(".")
    kind = {"weight": "kernel"}.get(kind, kind)
    if where[0] != "res_blocks":
        return _STYLE[where[0]], kind
    return f"block{where[1]}_{where[2].replace('res_conv', 'skip')}", kind


def style_value(name, value, channels_first_size=4):
    """Their array in our layout; the first dense layer reads their flattened channels-first image."""
    if value.ndim < 2:
        return value
    if name == "fc1.weight":
        c = value.shape[1] // channels_first_size**2
        value = value.reshape(-1, c, channels_first_size, channels_first_size).transpose(0, 2, 3, 1)
        return value.reshape(value.shape[0], -1).T
    return np.moveaxis(value, (0, 1), (-1, -2))


def style_official(name, value):
    return np.moveaxis(np.asarray(value), (-1, -2), (0, 1)) if np.ndim(value) > 1 else np.asarray(value)


def first_values(value, expected):
    """What is kept of a large array."""
    return np.asarray(value).ravel()[: np.size(expected)].reshape(np.shape(expected))


class Training:
    """One step of a case: its metrics, gradients and parameters."""

    def __init__(self, case):
        self.case, given = case, case.meta["training"]
        self.style = given["disc_type"] == "style"
        tok = tokenizers.from_official("vitok", case.meta["config"], self._weights(True))
        self.pixels = jnp.asarray(case.input("video"))
        judge = self._judge(given["disc_input_size"])
        config = base.optimizer(name="adamw", lr=given["lr"], b1=0.9, b2=0.95, weight_decay=1e-4, decay="all", clip=0.0)
        tokens = case.input("noise")[0].size
        self.recipe = Recipe(
            model=tok.module,
            objective=Objective(
                terms=(
                    Term("smooth_l1", given["l1_weight"], lambda p, t, _: reconstruction.smooth_l1(p, t)),
                    Term("l2", 0.0, lambda p, t, _: reconstruction.l2(p, t)),
                    Term("lpips", given["lpips"], lambda p, t, v: perceptual.lpips_loss(LPIPS(), v)(p, t), "lpips"),
                ),
                reduction=mean_reduction,
                bottleneck={"kl": given["kl_weight"] / tokens},  # theirs is a mean over all values
                frozen={},
                params={},
            ),
            optimizer=remembered(optim.make(config, 1)[0]),
            learning_rate=lambda step: given["lr"],
            adversary=Adversary(
                module=self.module,
                generator_loss=adversarial.GENERATOR["hinge"],
                discriminator_loss=adversarial.DISCRIMINATOR["hinge"],
                optimizer=remembered(optim.make(config, 1)[0]),
                weight=constant_weight(given["discriminator"]),
                factor=1.0,
                start=given["start_gen_loss"],
                generator_start=given["start_gen_loss"] + 1,
                ramp=given["gen_loss_warmup_steps"],
                lecam_weight=0.0,
                lecam_decay=0.999,
                feature_matching_weight=0.0,
                r1_weight=0.0,
                r1_every=16,
                ema_decay=0.0,
                fresh_forward=False,
            ),
            seed=0,
            ema_decay=0.0,
            ema_warmup=False,
            accumulate=1,
        )
        params, opponent = {"model": tok.params, "objective": {}}, judge.pop("params")
        adversary = AdversaryState(
            params=opponent,
            statistics=judge,
            ema=None,
            optimizer=self.recipe.adversary.optimizer.init(opponent),
            lecam=adversarial.lecam_init(),
            balance=self.recipe.adversary.weight.init(self.pixels),
        )
        self.before = new_state(params, {}, tok.params, self.recipe.optimizer.init(params), adversary)

    def _weights(self, generator):
        return {k: v for k, v in self.case.weights().items() if k.startswith("discriminator.") != generator}

    def _judge(self, size):
        official = {k.removeprefix("discriminator."): v for k, v in self._weights(False).items()}
        if not self.style:
            self.module = patchgan_3d()
            return from_official(self.module, official, self.pixels)
        self.module, params = StyleDiscriminator(centered=True), {}
        for name, value in official.items():
            layer, kind = style_place(name)
            params.setdefault(layer, {})[kind] = style_value(name, value)
        shapes = jax.eval_shape(self.module.init, jax.random.key(0), self.pixels)["params"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
        return {"params": params}

    def step(self):
        """The metrics of the step; the state after it is kept."""
        grid = jax.eval_shape(lambda: self._encoded()).latents.shape
        noise = jnp.asarray(self.case.input("noise")).reshape(grid)
        frozen = {"lpips": lpips_variables(LPIPSWeights())}

        @jax.jit
        def program(state, frozen, pixels, noise):
            with drawn("normal", [noise]):
                return make_step(self.recipe)(state, frozen, {"pixels": pixels})

        state = self.before.replace(step=jnp.int32(self.case.meta["training"]["step"]))
        self.after, metrics = program(state, frozen, self.pixels, noise)
        return metrics

    def _encoded(self):
        pixels = self.pixels if self.recipe.model.video else self.pixels[:, 0]
        return self.recipe.model.apply({"params": self.before.params["model"]}, pixels, method="encode")

    def gradients(self):
        return to_official(TABLE, {"params": self.after.optimizer[0]["model"]})

    def parameters(self, state):
        return to_official(TABLE, {"params": state.params["model"]})

    def discriminator_gradient(self, name):
        """In their layout (but for the dense layer that reads an image)."""
        tree = self.after.adversary.optimizer[0]
        if self.style:
            layer, kind = style_place(name)
        else:
            place = re.fullmatch(r"main\.(\d+)\.\w+", name)[1]
            layer, kind = {"0": "conv_in", "2": "conv_1"}[place], "kernel"
        return style_official(name, tree[layer][kind])


# In train_losses_image one unit of LPIPS's VGG is all but on the kink of its ReLU. The whole step in float64 is as far
# from the reference, itself float32, as in float32: 4.7e-3 in the gradients (those of the discriminator 3e-6, losses
# 1e-7), so precision here is not the cause. With the slope on the other side of the kink for the units that are within
# 1e-6 of zero, and nothing else changed, 2.7e-4 are left: the reference's rounding has put that unit there. (Within
# 3e-7, without that unit, it stays at 4.8e-3; within 5e-6 others turn wrongly.) All gradients of
# train_losses_video_patch3d are 6e-5 off.
KINK, GRADIENT = 1e-2, 1e-3


def check(case, worst):
    """Everything the case holds; ``worst`` collects the largest error of each kind."""
    training = Training(case)
    metrics, expected, given = training.step(), case.outputs, case.meta["training"]

    def close(kind, found, wanted, tolerance):
        error = relative_l2(found, wanted)
        worst[kind] = max(worst.get(kind, 0.0), error)
        assert error < tolerance, (kind, error, found, wanted)

    factor = training.recipe.adversary.seen(jnp.int32(given["step"]))
    losses = {
        "l2_loss": metrics["loss/l2"],
        "l1_loss": metrics["loss/smooth_l1"],
        "kl_loss": metrics["loss/kl"] / case.input("noise")[0].size,
        "lpips_loss": metrics["loss/lpips"],
        "generator_loss": metrics["loss/fooling"],
        "discriminator_loss": metrics["loss/discriminator"],
        "total_loss": metrics["loss/generator"] + metrics["adaptive_weight"] * factor * metrics["loss/fooling"],
        "aux_weight": factor,
    }
    for name, value in losses.items():
        close("loss", value, expected[name], 1e-4)
    close("gradient norm", metrics["grad_norm/generator"], expected["grad_norm_total"], 1e-3)
    close("gradient norm", metrics["grad_norm/discriminator"], expected["discriminator.grad_norm_total"], 1e-3)
    gradients, after = training.gradients(), training.parameters(training.after)
    before = training.parameters(training.before)
    for key, value in expected.items():
        kind, _, name = key.partition(".")
        judged = name.removeprefix("discriminator.") if name.startswith("discriminator.") else None
        if kind in ("grad", "gradnorm"):
            gradient = training.discriminator_gradient(judged) if judged else gradients[name]
            found = np.linalg.norm(gradient) if kind == "gradnorm" else first_values(gradient, value)
            near_kink = case.meta["case"] == "train_losses_image" and not judged
            close(f"{'discriminator ' * bool(judged)}gradient", found, value, KINK if near_kink else GRADIENT)
        elif kind == "after":
            close("parameter", first_values(after[name], value), value, 1e-4)
            # Adam's first step is about the sign of a gradient, also where that is rounding noise.
            moved = first_values(before[name], value)
            step = np.abs(first_values(after[name], value) - value) < 0.05 * given["lr"]
            assert step.mean() > 0.99, name
            assert np.abs(value - moved).max() > 0.5 * given["lr"], name
    return worst
