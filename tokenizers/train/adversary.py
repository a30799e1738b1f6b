"""The discriminator's side of a step: how it takes part, what it tells the generator, how it learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from .. import errors
from .. import pixels as pixel_values
from ..losses import adversarial
from ..parallel.constrain import whole
from . import optim
from .frames import View, all_frames
from .state import AdversaryState

AGAINST = ("reconstruction", "perceptual")


@dataclasses.dataclass(frozen=True)
class Adversary:
    """The discriminator and how it takes part.

    Attributes:
      module: logits from pixels, ``module(pixels, train)``.
      network: names the frozen network whose variables it reads as its collection ``frozen``, if any.
      generator_loss: ``fake_logits -> scalar``.
      discriminator_loss: ``(real_logits, fake_logits) -> scalar``.
      optimizer: its own optimizer.
      weight: optax transformation that balances the two cotangents of the generator.
      factor: scales the adversarial parts of both losses.
      start: first step whose discriminator is trained.
      generator_start: first step whose generator sees the discriminator.
      example: shape of pixels that its parameters are made for.
      lecam_weight, lecam_decay: LeCam regularization; weight 0 leaves it out.
      lecam: ``(state, real logits, fake logits, decay) -> (penalty, state)``, of `adversarial.LECAM`.
      feature_matching_weight: of the distance of its hidden features, added to ``generator_loss``.
      r1_weight, r1_every: gradient penalty on real pixels, every so many steps; weight 0 leaves it out.
      r1_norm: length of the gradient at which that penalty is zero.
      ema_decay: of an average of its parameters; 0 keeps none.
      clips_only: batches of single frames do without it.
      fresh_forward: run the generator again, with its updated parameters, for the discriminator's loss (VQGAN);
        otherwise the reconstruction of the generator's pass serves both (VidTok).
      leads: its turn comes first, and the generator's pass faces the updated discriminator (IBQ).
      runs: whether this program runs it at all, see `Recipe.at`.
      frames: of a clip, which ones it sees, of `frames.FRAMES`.
      against: the adaptive weight compares its gradient with that of the ``reconstruction`` loss, or of its
        ``perceptual`` terms alone.
      ramp: steps from ``generator_start`` on over which its part in the generator's loss grows from 0 to all of it.
    """

    module: nn.Module
    generator_loss: Callable
    discriminator_loss: Callable
    optimizer: optax.GradientTransformation
    weight: optax.GradientTransformationExtraArgs
    factor: float
    start: int
    generator_start: int
    lecam_weight: float
    lecam_decay: float
    feature_matching_weight: float
    r1_weight: float
    r1_every: int
    ema_decay: float
    fresh_forward: bool
    leads: bool = False
    clips_only: bool = False
    runs: bool = True
    ramp: int = 0
    network: str = ""
    lecam: Callable = adversarial.lecam_update
    example: tuple[int, ...] = ()
    frames: Callable[[jax.Array, tuple[int, ...]], View] = all_frames
    against: str = "reconstruction"
    r1_norm: float = 0.0

    def __post_init__(self):
        if self.against not in AGAINST:
            raise errors.unknown("loss that the adversarial one is weighed against", self.against, AGAINST)

    def seen(self, step: jax.Array) -> jax.Array:
        """How much of the adversarial loss the generator sees at that step, in [0, 1]."""
        since = step - self.generator_start
        return jnp.clip((since + 1) / self.ramp, 0, 1) if self.ramp else (since >= 0).astype(jnp.float32)


def initialize(adversary: Adversary, key: jax.Array) -> AdversaryState:
    example = jnp.zeros(adversary.example)
    variables = dict(adversary.module.init(key, example))
    params = variables.pop("params")
    variables.pop("frozen", None)  # an argument of the step
    return AdversaryState(
        params=params,
        statistics=variables,
        ema=jax.tree.map(jnp.copy, params) if adversary.ema_decay else None,
        optimizer=adversary.optimizer.init(params),
        lecam=adversarial.lecam_init(),
        balance=adversary.weight.init(example),
    )


def fool(adversary: Adversary, opponent: AdversaryState, frozen, reconstruction, target):
    """(generator loss, its gradient at the reconstruction, adversary state); zeros while the discriminator waits."""
    if not adversary.runs:
        return jnp.zeros((), jnp.float32), jnp.zeros_like(reconstruction), opponent

    def loss(y):
        logits, fake, statistics = _discriminate(adversary, opponent.params, opponent.statistics, frozen, y)
        value = adversary.generator_loss(logits)
        if adversary.feature_matching_weight:
            _, real, _ = _discriminate(adversary, opponent.params, opponent.statistics, frozen, target)
            value = value + adversary.feature_matching_weight * adversarial.feature_matching(real, fake)
        return value, statistics

    (value, statistics), cotangent = jax.value_and_grad(loss, has_aux=True)(reconstruction)
    return value, cotangent, opponent.replace(statistics=statistics)


def _variables(adversary: Adversary, params, statistics, frozen) -> dict[str, Any]:
    network = {"frozen": whole(frozen[adversary.network])} if adversary.network else {}
    return {"params": whole(params), **statistics, **network}


def _discriminate(adversary: Adversary, params, statistics, frozen, pixels):
    """(logits, hidden features, statistics); what is not used of them costs nothing."""
    variables = _variables(adversary, params, statistics, frozen)
    (logits, features), new = adversary.module.apply(
        variables, pixels, train=True, mutable=list(statistics), method="features"
    )
    return logits.astype(jnp.float32), features, new


def learn(adversary: Adversary, opponent: AdversaryState, frozen, step, reconstruction, pixels):
    """(gradients, adversary state, metrics) of one micro-batch; zeros while the discriminator waits."""
    real = pixel_values.to_float(pixels)
    fake = jax.lax.stop_gradient(reconstruction)

    def loss(params):
        real_logits, _, statistics = _discriminate(adversary, params, opponent.statistics, frozen, real)
        fake_logits, _, statistics = _discriminate(adversary, params, statistics, frozen, fake)
        value = adversary.discriminator_loss(real_logits, fake_logits)
        penalty, lecam = adversary.lecam(opponent.lecam, real_logits, fake_logits, adversary.lecam_decay)
        value = adversary.factor * (value + adversary.lecam_weight * penalty)
        if adversary.r1_weight:
            value = value + _r1(adversary, params, statistics, frozen, real, step)
        metrics = {
            "loss/discriminator": value,
            "logits/real": real_logits.mean(),
            "logits/fake": fake_logits.mean(),
        }
        return value, (statistics, lecam, metrics)

    if not adversary.runs:
        metrics = dict.fromkeys(("loss/discriminator", "logits/real", "logits/fake"), jnp.zeros((), jnp.float32))
        return jax.tree.map(jnp.zeros_like, opponent.params), opponent, metrics
    grads, (statistics, lecam, metrics) = jax.grad(loss, has_aux=True)(opponent.params)
    return grads, opponent.replace(statistics=statistics, lecam=lecam), metrics


def _r1(adversary: Adversary, params, statistics, frozen, real, step):
    """R1 penalty every ``r1_every`` steps, scaled up by that number (lazy regularization, StyleGAN2)."""

    def penalty():
        # Running statistics: with those of the batch its items would influence each other.
        variables = _variables(adversary, params, statistics, frozen)
        return adversarial.r1_penalty(lambda x: adversary.module.apply(variables, x), real, adversary.r1_norm)

    if adversary.r1_every == 1:  # always due: convolutions in a branch are slow on a CPU (`platform.scan`)
        return adversary.r1_weight * penalty()
    due = step % adversary.r1_every == 0
    value = jax.lax.cond(due, penalty, lambda: jnp.zeros((), jnp.float32))
    return adversary.r1_weight * adversary.r1_every * value


def update(
    adversary: Adversary, before: AdversaryState, after: AdversaryState, grads, step, ema_warmup: bool, finite
) -> AdversaryState:
    """The state after one step of its optimizer, or as it was before if the step does not count.

    Args:
      before: the state at the start of the step.
      after: that with what `fool` and `learn` have changed in it.
    """
    kept = {name: (getattr(after, name), getattr(before, name)) for name in ("statistics", "lecam", "balance")}
    after = before.replace(**{name: optim.held(finite, *states) for name, states in kept.items()})
    if not adversary.runs:
        return after
    params, optimizer = optim.descend(adversary.optimizer, grads, before.optimizer, before.params, finite)
    ema = before.ema
    if adversary.ema_decay:
        ema = optim.ema_update(ema, params, adversary.ema_decay, step - adversary.start, ema_warmup, finite)
    return after.replace(params=params, optimizer=optimizer, ema=ema)
