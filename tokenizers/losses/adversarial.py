"""Adversarial losses over discriminator logits, and the regularisers that go with them.

A generator loss is ``(fake_logits) -> scalar`` and a discriminator loss ``(real_logits, fake_logits) -> scalar``.
Logits have one item per leading index and any number of patches: ``(N, h, w, 1)``, ``(N, t, h, w, 1)`` or ``(N, 1)``.
The two are chosen by name and separately, since published recipes mix them (VidTok: a hinge discriminator, a
non-saturating generator); `ADVERSARIAL` holds the usual pairs. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


def linear_generator(fake_logits: Array) -> Array:
    """-mean(logits): the generator's side of the hinge loss, and of VQGAN's "vanilla" option too."""
    return -jnp.mean(fake_logits.astype(jnp.float32))


def non_saturating_generator(fake_logits: Array) -> Array:
    """mean(softplus(-logits)) over all patches (https://arxiv.org/abs/1406.2661, section 3)."""
    return jnp.mean(jax.nn.softplus(-fake_logits.astype(jnp.float32)))


def non_saturating_item_generator(fake_logits: Array) -> Array:
    """mean over items of softplus(-mean of the item's logits): patches vote before the loss bends.

    The generator loss of VidTok and Open-MAGVIT2 (a cross-entropy with label 1 of the mean logit).
    """
    items = jnp.mean(fake_logits.astype(jnp.float32).reshape(fake_logits.shape[0], -1), axis=1)
    return jnp.mean(jax.nn.softplus(-items))


def hinge_discriminator(real_logits: Array, fake_logits: Array) -> Array:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2, https://arxiv.org/abs/1705.02894; the 1/2 is VQGAN's."""
    real, fake = real_logits.astype(jnp.float32), fake_logits.astype(jnp.float32)
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def vanilla_discriminator(real_logits: Array, fake_logits: Array) -> Array:
    """(mean softplus(-real) + mean softplus(fake)) / 2: half the cross-entropy, as in VQGAN."""
    return 0.5 * non_saturating_discriminator(real_logits, fake_logits)


def non_saturating_discriminator(real_logits: Array, fake_logits: Array) -> Array:
    """mean softplus(-real) + mean softplus(fake): the cross-entropy, as in StyleGAN, MaskGIT and MAGVIT."""
    real, fake = real_logits.astype(jnp.float32), fake_logits.astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))


class Adversarial(NamedTuple):
    """A pair of losses: ``generator(fake_logits)`` and ``discriminator(real_logits, fake_logits)``."""

    generator: Callable[[Array], Array]
    discriminator: Callable[[Array, Array], Array]


GENERATOR: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "hinge": linear_generator,
        "vanilla": linear_generator,
        "non_saturating": non_saturating_generator,
        "non_saturating_item": non_saturating_item_generator,
    }
)
DISCRIMINATOR: Mapping[str, Callable[[Array, Array], Array]] = MappingProxyType(
    {
        "hinge": hinge_discriminator,
        "vanilla": vanilla_discriminator,
        "non_saturating": non_saturating_discriminator,
    }
)
ADVERSARIAL: Mapping[str, Adversarial] = MappingProxyType(
    {name: Adversarial(GENERATOR[name], discriminator) for name, discriminator in DISCRIMINATOR.items()}
)


class LeCamState(NamedTuple):
    """Running means of the discriminator's logits, float32 scalars."""

    real: Array
    fake: Array


def lecam_init(real: float = 0.0, fake: float = 0.0) -> LeCamState:
    """The state before the first step: both anchors 0 in the published recipes."""
    return LeCamState(jnp.asarray(real, jnp.float32), jnp.asarray(fake, jnp.float32))


def lecam_observe(state: LeCamState, real_logits: Array, fake_logits: Array, decay: float = 0.999) -> LeCamState:
    """Moves the anchors towards the mean logits of this (global) batch. No gradient flows into the anchors."""

    def moved(anchor: Array, logits: Array) -> Array:
        return decay * anchor + (1.0 - decay) * jax.lax.stop_gradient(jnp.mean(logits.astype(jnp.float32)))

    return LeCamState(moved(state.real, real_logits), moved(state.fake, fake_logits))


def lecam_penalty(state: LeCamState, real_logits: Array, fake_logits: Array) -> Array:
    """mean relu(real - anchor_fake)^2 + mean relu(anchor_real - fake)^2 -> float32 scalar.

    Tseng et al., "Regularizing generative adversarial networks under limited data", https://arxiv.org/abs/2104.03310,
    with the rectifier of the public code. TiTok's recipe passes the mean logits instead of the maps.
    """
    real, fake = real_logits.astype(jnp.float32), fake_logits.astype(jnp.float32)
    above = jax.nn.relu(real - state.fake)
    below = jax.nn.relu(state.real - fake)
    return jnp.mean(jnp.square(above)) + jnp.mean(jnp.square(below))


def lecam_update(
    state: LeCamState, real_logits: Array, fake_logits: Array, decay: float = 0.999
) -> tuple[Array, LeCamState]:
    """`lecam_observe`, then `lecam_penalty` against the anchors just moved, as in VidTok and Open-MAGVIT2.

    Recipes that measure first use `lecam_of_means`. The anchors move from the first step,
    also while the discriminator waits for its start.

    Returns:
      (unweighted penalty, new state).
    """
    state = lecam_observe(state, real_logits, fake_logits, decay)
    return lecam_penalty(state, real_logits, fake_logits), state


def lecam_of_means(
    state: LeCamState, real_logits: Array, fake_logits: Array, decay: float = 0.999
) -> tuple[Array, LeCamState]:
    """TiTok's order: the penalty of the mean logits against the anchors of the steps before; then these move."""
    penalty = lecam_penalty(state, real_logits.mean(), fake_logits.mean())
    return penalty, lecam_observe(state, real_logits, fake_logits, decay)


LECAM = MappingProxyType({"patches": lecam_update, "means": lecam_of_means})


def r1_penalty(discriminator: Callable[[Array], Array], real: Array, norm: float = 0.0) -> Array:
    """mean over items of (|d sum(logits of the item) / d pixels| - norm)^2 -> float32 scalar, without weight or 1/2.

    Mescheder et al., https://arxiv.org/abs/1801.04406, equation 9 (there: weight gamma / 2; MaskGIT and MAGVIT: 10);
    with a norm of 1 the penalty of Gulrajani et al., https://arxiv.org/abs/1704.00028, at real pixels.

    Args:
      discriminator: pixels -> logits, parameters closed over, e.g. ``lambda x: d.apply(variables, x)``. Its items must
        not influence each other, or the sum over the batch mixes their gradients: with batch normalisation use the
        running statistics (``train=False``).
      real: real pixels ``(N, ...)``.
      norm: length of an item's gradient that is not penalised.
    """

    def total(pixels: Array) -> Array:
        return jnp.sum(discriminator(pixels).astype(jnp.float32))

    slope = jax.grad(total)(real).astype(jnp.float32)
    squares = jnp.sum(jnp.square(slope.reshape(real.shape[0], -1)), axis=1)
    # The root has no gradient at 0, where R1 needs none of it.
    return jnp.mean(jnp.square(jnp.sqrt(jnp.maximum(squares, 1e-16)) - norm) if norm else squares)


def feature_matching(real_features: Sequence[Array], fake_features: Sequence[Array]) -> Array:
    """Sum over layers of mean |fake - sg(real)| -> float32 scalar.

    The features of the discriminator for real and reconstructed pixels, layer by layer (Wang et al.,
    https://arxiv.org/abs/1711.11585, equation 4; as a sum over layers like OmniTokenizer, which leaves the logits out).
    """
    if len(real_features) != len(fake_features) or not real_features:
        raise ValueError(
            f"feature_matching needs the same layers of both, at least one: got {len(real_features)} real and "
            f"{len(fake_features)} fake."
        )
    total = jnp.zeros((), jnp.float32)
    for real, fake in zip(real_features, fake_features, strict=True):
        if real.shape != fake.shape:
            raise ValueError(f"features of one layer must have one shape, got {real.shape} and {fake.shape}.")
        real = jax.lax.stop_gradient(real).astype(jnp.float32)
        total += jnp.mean(jnp.abs(fake.astype(jnp.float32) - real))
    return total
