"""Flow matching (https://arxiv.org/abs/2210.02747) as in SiT (https://arxiv.org/abs/2401.08740) and LightningDiT.

Time runs from noise (0) to data (1). A path mixes both, ``x_t = alpha(t) data + sigma(t) noise``; a network that sees
``x_t`` and t predicts the velocity of that mixture, or the noise, or the score; following the velocity makes data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import ode

from ..errors import pick

Array = jax.Array
Function = Callable[[Array], Array]
# (x_t, t (B,)) -> what the network predicts, the shape of x_t
Network = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Path:
    """Weights of data and noise, their derivatives, and the diffusion whose probability flow has the same marginals.

    Attributes:
      alpha, sigma: of data and noise.
      d_alpha, d_sigma: derivatives.
      log_slope: derivative of the logarithm of ``alpha``.
      diffusion: squared diffusion coefficient, half of it for a variance-preserving path as in SiT's code.
    """

    alpha: Function
    sigma: Function
    d_alpha: Function
    d_sigma: Function
    log_slope: Function
    diffusion: Function


def _of(alpha: Function, sigma: Function, d_alpha: Function, d_sigma: Function, log_slope: Function) -> Path:
    return Path(
        alpha,
        sigma,
        d_alpha,
        d_sigma,
        log_slope,
        lambda t: log_slope(t) * sigma(t) ** 2 - sigma(t) * d_sigma(t),
    )


def _preserving(smallest: float = 0.1, largest: float = 20.0) -> Path:
    """Variance preserving, https://arxiv.org/abs/2011.13456, with a linear rate of noise."""

    def exponent(t):
        return -0.25 * (1 - t) ** 2 * (largest - smallest) - 0.5 * (1 - t) * smallest

    def rate(t):
        return smallest + (1 - t) * (largest - smallest)

    def alpha(t):
        return jnp.exp(exponent(t))

    def sigma(t):
        return jnp.sqrt(1 - jnp.exp(2 * exponent(t)))

    return Path(
        alpha=alpha,
        sigma=sigma,
        d_alpha=lambda t: alpha(t) * rate(t) / 2,
        d_sigma=lambda t: -jnp.exp(2 * exponent(t)) * rate(t) / (2 * sigma(t)),
        log_slope=lambda t: rate(t) / 2,
        diffusion=lambda t: rate(t) / 2,
    )


_HALF_PI = jnp.pi / 2
PATHS = {
    "linear": _of(lambda t: t, lambda t: 1 - t, jnp.ones_like, lambda t: -jnp.ones_like(t), lambda t: 1 / t),
    "cosine": _of(
        lambda t: jnp.sin(_HALF_PI * t),
        lambda t: jnp.cos(_HALF_PI * t),
        lambda t: _HALF_PI * jnp.cos(_HALF_PI * t),
        lambda t: -_HALF_PI * jnp.sin(_HALF_PI * t),
        lambda t: _HALF_PI / jnp.tan(_HALF_PI * t),
    ),
    "variance_preserving": _preserving(),
}
PREDICTIONS = ("velocity", "noise", "score")
WEIGHTS = (None, "velocity", "likelihood")


@dataclasses.dataclass(frozen=True)
class Flow:
    """A path, what the network predicts on it, and how its error counts.

    Attributes:
      path: one of `PATHS`.
      prediction: ``velocity``, ``noise`` or ``score``.
      weighting: of the errors of noise and score: ``None``, ``velocity`` or ``likelihood``.
      cosine: add one minus the cosine of predicted and true velocity over the channels (LightningDiT).
      time_mean, time_std: t is the sigmoid of a normal number with these (https://arxiv.org/abs/2403.03206); ``None``
        as standard deviation draws it uniformly.
    """

    path: str = "linear"
    prediction: str = "velocity"
    weighting: str | None = None
    cosine: bool = False
    time_mean: float = 0.0
    time_std: float | None = 1.0

    def __post_init__(self):
        for what, value, accepted in (
            ("path", self.path, PATHS),
            ("prediction", self.prediction, dict.fromkeys(PREDICTIONS)),
            ("weighting", self.weighting, dict.fromkeys(WEIGHTS)),
        ):
            pick(what, value, accepted)

    def draw_times(self, key: Any, count: int) -> Array:
        """Times of training, ``(count,)`` in (0, 1)."""
        if self.time_std is None:
            return jax.random.uniform(key, (count,))
        return jax.nn.sigmoid(self.time_mean + self.time_std * jax.random.normal(key, (count,)))

    def mix(self, data: Array, noise: Array, t: Array) -> tuple[Array, Array]:
        """``(x_t, its velocity)`` of data and noise ``(B, ...)`` at times ``(B,)``."""
        path, t = PATHS[self.path], _beside(t, data)
        return path.alpha(t) * data + path.sigma(t) * noise, path.d_alpha(t) * data + path.d_sigma(t) * noise

    def losses(self, predicted: Array, data: Array, noise: Array, t: Array) -> dict[str, Array]:
        """``{"flow": (B,), "cosine": (B,) if asked for}``: squared error, and direction of the velocity, per item."""
        axes = tuple(range(1, data.ndim))
        predicted = predicted.astype(jnp.float32)
        path, at = PATHS[self.path], _beside(t, data)
        if self.prediction == "velocity":
            velocity = self.mix(data, noise, t)[1]
            found = {"flow": jnp.square(predicted - velocity).mean(axes)}
            if self.cosine:
                found["cosine"] = (1 - _cosine(predicted, velocity)).mean(axes[:-1])
            return found
        sigma = path.sigma(at)
        strength = {"velocity": path.diffusion(at) / sigma, "likelihood": jnp.sqrt(path.diffusion(at)) / sigma}
        weight = jnp.square(strength[self.weighting]) if self.weighting else 1.0
        error = predicted - noise if self.prediction == "noise" else predicted * sigma + noise
        return {"flow": (weight * jnp.square(error)).mean(axes)}

    def velocity(self, predicted: Array, x: Array, t: Array) -> Array:
        """The velocity at ``x`` ``(B, ...)`` that a prediction means."""
        if self.prediction == "velocity":
            return predicted
        path, t = PATHS[self.path], _beside(t, x)
        score = predicted if self.prediction == "score" else -predicted / path.sigma(t)
        return path.log_slope(t) * x + path.diffusion(t) * score


def _beside(t: Array, x: Array) -> Array:
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def _cosine(a: Array, b: Array, epsilon: float = 1e-8) -> Array:
    lengths = [jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1), epsilon**2)) for x in (a, b)]
    return (a * b).sum(-1) / (lengths[0] * lengths[1])


def times(points: int, shift: float = 0.0) -> Array:
    """``points`` times from 0 to 1; a ``shift`` below 1 spends more of them near the noise, 0 leaves them equal."""
    t = jnp.linspace(0.0, 1.0, points)
    return shift * t / (1 + (shift - 1) * t) if shift else t


def guided(network: Callable[..., Array], scale: float, *, start: float | None = None, channels: int | None = 3):
    """Classifier-free guidance, https://arxiv.org/abs/2207.12598.

    Args:
      network: ``(x (B, ...), t (B,), labels (B,)) -> prediction``.
      scale: 1 is no guidance.
      start: no guidance before that time; ``None`` guides always.
      channels: how many of the first channels are guided; the published DiT and LightningDiT guide three, ``None`` is
        all.

    Returns:
      ``(x, t, labels, null labels) -> prediction``.
    """

    def run(x: Array, t: Array, labels: Array, nothing: Array) -> Array:
        both = network(*(jnp.concatenate(pair) for pair in ((x, x), (t, t), (labels, nothing))))
        with_label, without = jnp.split(both, 2)
        count = both.shape[-1] if channels is None else channels
        toward = with_label[..., :count], without[..., :count]
        mixed = toward[1] + scale * (toward[0] - toward[1])
        if start is not None:
            mixed = jnp.where(_beside(t, x) < start, toward[0], mixed)
        return jnp.concatenate([mixed, with_label[..., count:]], axis=-1)

    return run


def euler(velocity: Network, noise: Array, at: Array) -> Array:
    """Follows the velocity in straight steps between the times ``at``; ``len(at) - 1`` calls of the network."""

    def step(x: Array, interval: tuple[Array, Array]) -> tuple[Array, None]:
        now, then = interval
        return x + (then - now) * velocity(x, jnp.full(x.shape[:1], now)), None

    return jax.lax.scan(step, noise, (at[:-1], at[1:]))[0]


def dopri5(velocity: Network, noise: Array, at: Array, *, rtol: float = 1e-3, atol: float = 1e-6) -> Array:
    """Follows the velocity by an adaptive Runge-Kutta method of fifth order from ``at[0]`` to ``at[-1]``."""
    ends = jnp.stack([at[0], at[-1]])
    return ode.odeint(lambda x, t: velocity(x, jnp.full(x.shape[:1], t)), noise, ends, rtol=rtol, atol=atol)[-1]
