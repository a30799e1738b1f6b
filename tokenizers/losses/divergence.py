"""Terms on distributions and latents: the KL of a diagonal Gaussian, entropies of assignments, commitment.

Bottlenecks report their own terms in `Encoding.losses`; these functions are for recipes that need a term over something
else, or with another reduction.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def gaussian_kl(mean: Array, logvar: Array) -> Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)): summed over the values of an item, averaged over the batch.

    Args:
      mean: posterior means ``(B, ...)``.
      logvar: posterior log-variances, the same shape. Not clamped here: posteriors clamp theirs (usually to [-30, 20]).

    Returns:
      float32 scalar (Kingma & Welling, https://arxiv.org/abs/1312.6114, appendix B).
    """
    if mean.shape != logvar.shape:
        raise ValueError(f"mean and logvar must have one shape, got {mean.shape} and {logvar.shape}.")
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar) / mean.shape[0]


def entropy(probabilities: Array, minimum: float = 1e-5) -> Array:
    """-sum p log p over the last axis, in nats: ``(..., K) -> (...)``, float32.

    The logarithm sees no probability below ``minimum``, which keeps its gradient finite at zero.
    """
    probabilities = probabilities.astype(jnp.float32)
    return -jnp.sum(probabilities * jnp.log(jnp.maximum(probabilities, minimum)), axis=-1)


def sample_entropy(probabilities: Array, minimum: float = 1e-5) -> Array:
    """Mean over all positions of the entropy of the assignment: low when every position is sure. ``(..., K) -> ()``."""
    return jnp.mean(entropy(probabilities, minimum))


def batch_entropy(probabilities: Array, minimum: float = 1e-5) -> Array:
    """Entropy of the mean assignment over all positions: high when all codes are in use. ``(..., K) -> ()``.

    The mean runs over the global batch. Lookup-free quantization minimises ``sample_entropy - batch_entropy``
    (MAGVIT-v2, https://arxiv.org/abs/2310.05737, equation 5).
    """
    probabilities = probabilities.astype(jnp.float32)
    return entropy(jnp.mean(probabilities.reshape(-1, probabilities.shape[-1]), axis=0), minimum)


def commitment(latents: Array, codes: Array) -> Array:
    """mean((latents - sg(codes))^2): pulls the encoder to its codes, never the codes. -> float32 scalar.

    van den Oord et al., https://arxiv.org/abs/1711.00937, equation 3, last term, without its weight.
    """
    if latents.shape != codes.shape:
        raise ValueError(f"latents and codes must have one shape, got {latents.shape} and {codes.shape}.")
    codes = jax.lax.stop_gradient(codes)
    return jnp.mean(jnp.square(latents.astype(jnp.float32) - codes.astype(jnp.float32)))
