"""Whole training steps of VQGAN and latent diffusion through `train.step.make_step`, set up from a reference case.

The library's step stays as it is. Around it: weights of the case in generator, discriminator and LPIPS; optimizers that
keep the gradient they saw; the case's noise in place of random numbers.
"""

from __future__ import annotations

import contextlib
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reference import relative_l2
from test_discriminators import from_official, official_entry

import tokenizers
from configs import base
from tokenizers.convert import lpips as lpips_table
from tokenizers.convert.engine import to_official, to_tree
from tokenizers.discriminators.patchgan import patchgan_2d
from tokenizers.losses import adversarial, perceptual, reconstruction
from tokenizers.losses.balance import adaptive_weight
from tokenizers.networks.lpips import LPIPS
from tokenizers.train import optim
from tokenizers.train.adversary import Adversary
from tokenizers.train.autoencoder import Recipe
from tokenizers.train.objective import Objective, Term, logvar_reduction, mean_reduction
from tokenizers.train.schedules import Schedules
from tokenizers.train.state import AdversaryState, new_state
from tokenizers.train.step import make_step


def remembered(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, with the last gradient in its state: ``(gradient, state)``."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params), optimizer.init(params)

    def update(gradients, state, params=None):
        updates, inner = optimizer.update(gradients, state[1], params)
        return updates, (gradients, inner)

    return optax.GradientTransformation(init, update)


def lpips_variables(case):
    state = lpips_table.torchvision_names(case.weights("loss.perceptual_loss."))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    target = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)
    return to_tree(lpips_table.table("vgg"), target, state, ignore=lpips_table.IGNORE)


@contextlib.contextmanager
def drawn(name, noises):
    """While a program is traced, its calls of that function of `jax.random` for noise of that shape give these."""
    if name is None:
        yield
        return
    given, original = list(noises), getattr(jax.random, name)

    def draw(key, shape, dtype=jnp.float32):
        return given.pop(0) if given and tuple(shape) == given[0].shape else original(key, shape, dtype)

    with mock.patch.object(jax.random, name, draw):
        yield
    assert not given, "the step drew less noise than the case has"


class Training:
    """A run of a reference case.

    Args:
      case: with ``loss.*`` weights and a ``lossconfig``.
      system: name of the tokenizer's system.
      table: its conversion table.
      bottleneck: weights of the bottleneck's loss terms.
      fresh_forward: whether the generator runs again before the discriminator's turn.
      noise: name of the function of `jax.random` that makes the bottleneck's noise, if any.
      schedules: of the recipe.
    """

    def __init__(self, case, system, table, bottleneck, fresh_forward, noise=None, schedules=None):
        self.case, self.table, self.noise = case, table, noise
        loss = case.meta["config"]["lossconfig"]["params"]
        inner = {k: v for k, v in case.meta["config"].items() if k != "lossconfig"}
        weights = {k: v for k, v in case.weights().items() if not k.startswith("loss.")}
        tok = tokenizers.from_official(system, inner, weights)
        self.pixels = jnp.asarray(case.input("image"))[:, None]
        official = case.weights("loss.discriminator.")
        self.discriminator_names = [n for n in official if re.search(r"\.(weight|bias)$", n)]
        self.last = max(int(name.split(".")[1]) for name in official)
        discriminator = patchgan_2d(width=loss.get("disc_ndf", 64), layers=loss.get("disc_num_layers", 3))
        judge = from_official(discriminator, official, self.pixels[:, 0])
        logvar = "logvar" in case.weights("loss.")
        self.recipe = Recipe(
            model=tok.module,
            objective=Objective(
                terms=(
                    Term("l1", 1.0, lambda p, t, _: reconstruction.l1(p, t)),
                    Term(
                        "lpips",
                        loss.get("perceptual_weight", 1.0),
                        lambda p, t, v: perceptual.lpips_loss(LPIPS(), v)(p, t),
                        "lpips",
                    ),
                ),
                reduction=logvar_reduction if logvar else mean_reduction,
                bottleneck=bottleneck,
                frozen={},
                params={},
            ),
            # The log-variance belongs to no optimizer of the authors.
            optimizer=remembered(self._optimizer(frozen=("objective/logvar",) if logvar else ())),
            learning_rate=optax.constant_schedule(case.meta["learning_rate"]),
            adversary=Adversary(
                module=discriminator,
                generator_loss=adversarial.GENERATOR[loss.get("disc_loss", "hinge")],
                discriminator_loss=adversarial.DISCRIMINATOR[loss.get("disc_loss", "hinge")],
                optimizer=remembered(self._optimizer()),
                weight=adaptive_weight(loss["disc_weight"]),
                factor=loss.get("disc_factor", 1.0),
                start=loss["disc_start"],
                generator_start=loss["disc_start"],
                lecam_weight=0.0,
                lecam_decay=0.999,
                feature_matching_weight=0.0,
                r1_weight=0.0,
                r1_every=16,
                ema_decay=0.0,
                fresh_forward=fresh_forward,
            ),
            seed=0,
            ema_decay=0.0,
            ema_warmup=False,
            accumulate=1,
            schedules=schedules or Schedules(),
        )
        params = {"model": tok.params, "objective": {}}
        if logvar:
            params["objective"] = {"logvar": jnp.asarray(case.weights("loss.")["logvar"])}
        opponent = judge.pop("params")
        adversary = AdversaryState(
            params=opponent,
            statistics=judge,
            ema=None,
            optimizer=self.recipe.adversary.optimizer.init(opponent),
            lecam=adversarial.lecam_init(),
            balance=self.recipe.adversary.weight.init(self.pixels),
        )
        self.state = new_state(params, {}, tok.params, self.recipe.optimizer.init(params), adversary)
        self.frozen = {"lpips": lpips_variables(case)}
        self.programs = {}

    def _optimizer(self, frozen=()):
        config = base.optimizer(lr=self.case.meta["learning_rate"], b1=0.5, b2=0.9, clip=0.0, frozen=frozen)
        return optim.make(config, 1)[0]

    def step(self, number: int, noises=()):
        """Takes the step of that number; ``noises`` are those of its passes through the generator, in order."""
        recipe = self.recipe.at(number)
        if recipe.adversary.runs not in self.programs:

            def program(state, frozen, pixels, noises):
                with drawn(self.noise, noises):
                    return make_step(recipe)(state, frozen, {"pixels": pixels})

            # As a user's program is compiled. Quicker compilation orders sums otherwise, and the kinks of ReLUs, hinges
            # and L1 make 6e-3 of a gradient of that (observed): tolerances were found at this level.
            options = {"xla_backend_optimization_level": 3}
            self.programs[recipe.adversary.runs] = jax.jit(program, compiler_options=options)
        self.before = self.state
        state = self.state.replace(step=jnp.int32(number))
        program = self.programs[recipe.adversary.runs]
        self.state, metrics = program(state, self.frozen, self.pixels, tuple(noises))
        return metrics

    # What the authors' names stand for.

    def gradients(self):
        return to_official(self.table, {"params": self.state.optimizer[0]["model"]})

    def change(self, name):
        """Of a generator's parameter in the last step."""
        before, after = (
            to_official(self.table, {"params": s.params["model"]})[name] for s in (self.before, self.state)
        )
        return after - before

    def running_statistics(self, name):
        return official_entry(self.state.adversary.statistics["batch_stats"], name, self.last)

    def count_discriminator_steps(self, count):
        """Sets the number of steps that the discriminator's optimizer has seen."""
        gradients, inner = self.state.adversary.optimizer
        inner = optax.tree.set(inner, count=jnp.int32(count))
        self.state = self.state.replace(adversary=self.state.adversary.replace(optimizer=(gradients, inner)))

    def discriminator_gradient(self, name):
        return torch_layout(official_entry(self.state.adversary.optimizer[0], name, self.last))

    def discriminator_change(self, name):
        before, after = (
            torch_layout(official_entry(s.adversary.params, name, self.last)) for s in (self.before, self.state)
        )
        return after - before


def torch_layout(value):
    value = np.asarray(value)
    return np.moveaxis(value, (-1, -2), (0, 1)) if value.ndim == 4 else value


def underscored(name):
    return name.replace(".", "_")


def check_gradients(training, prefix, expected, tolerance):
    """Norms of all gradients of the generator but those that are zero up to rounding, and the stored ones."""
    meta, gradients = training.case.meta, training.gradients()
    noise = set(meta["noise_gradients_g"])
    norms = {name: np.linalg.norm(gradients[name]) for name in meta["grad_norm_ae_names"]}
    theirs = dict(zip(meta["grad_norm_ae_names"], expected[f"{prefix}_grad_norms"], strict=True))
    largest = max(theirs.values())
    for name, value in theirs.items():
        if name in noise:
            assert norms[name] < 1e-4 * largest, name
        else:
            np.testing.assert_allclose(norms[name], value, rtol=tolerance, err_msg=name)
    worst = 0.0
    for name in meta["grad_tensors"][0]:
        if f"{prefix}_grad__{underscored(name)}" in expected:
            worst = max(worst, relative_l2(gradients[name], expected[f"{prefix}_grad__{underscored(name)}"]))
    assert worst < tolerance
    return worst


def check_discriminator_gradients(training, prefix, expected, tolerance):
    names = training.discriminator_names
    assert [f"loss.discriminator.{name}" for name in names] == training.case.meta["grad_norm_disc_names"]
    norms = [np.linalg.norm(training.discriminator_gradient(name)) for name in names]
    assert relative_l2(norms, expected[f"{prefix}_grad_norms"]) < tolerance
    for name in training.case.meta["grad_tensors"][1]:
        key = f"{prefix}_grad__{underscored(name)}"
        if key in expected:
            ours = training.discriminator_gradient(name.removeprefix("loss.discriminator."))
            assert relative_l2(ours, expected[key]) < tolerance, key


def check_changes(training, generator, discriminator, expected, tolerance):
    """Changes of the parameters. Adam makes a step of full size of the smallest gradient, whatever its rounding."""
    found = {}
    for name in training.case.meta["step_tensors"][0]:
        key = f"{generator}_delta__{underscored(name)}"
        if key in expected:
            found[key] = relative_l2(training.change(name), expected[key])
    for name in training.case.meta["step_tensors"][1]:
        key = f"{discriminator}_delta__{underscored(name)}"
        if key in expected and np.abs(expected[key]).max():
            ours = training.discriminator_change(name.removeprefix("loss.discriminator."))
            found[key] = relative_l2(ours, expected[key])
    assert all(value < tolerance for value in found.values()), found
    return found
