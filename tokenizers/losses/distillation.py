"""Self-distillation without labels: a student predicts what a teacher, its moving average, makes of other views.

DINO (https://arxiv.org/abs/2104.14294) on class tokens, iBOT (https://arxiv.org/abs/2111.07832) on masked patches,
with the practice of DINOv2 (https://arxiv.org/abs/2304.07193): the teacher's logits become targets by Sinkhorn-Knopp
or by centering, and KoLeo spreads the features. All in float32. Means and sums run over the global batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def sinkhorn(logits: Array, temperature: Array | float, valid: Array | None = None, iterations: int = 3) -> Array:
    """Targets that use all prototypes alike, https://arxiv.org/abs/2006.09882 (`sinkhorn_knopp_teacher`).

    Args:
      logits: of the teacher, ``(B, K)``.
      temperature: of the teacher.
      valid: boolean ``(B,)``, rows that are there; ``None`` is all. The others get zeros.
      iterations: how often prototypes, then samples, are made to sum alike.

    Returns:
      float32 ``(B, K)``, every valid row sums to 1.
    """
    logits = logits.astype(jnp.float32) / temperature
    rows = jnp.ones(logits.shape[:1]) if valid is None else valid.astype(jnp.float32)
    samples = rows.sum()
    # Subtracting the largest logit changes nothing but what overflows.
    logits = jnp.where(rows[:, None] > 0, logits, -jnp.inf)
    q = jnp.exp(logits - jax.lax.stop_gradient(logits.max()))
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(axis=0) / q.shape[1]
        q = q / jnp.where(rows > 0, q.sum(axis=1), 1.0)[:, None] / samples
    return jax.lax.stop_gradient(q * samples)


def centered(logits: Array, center: Array, temperature: Array | float) -> Array:
    """Softmax of the teacher's logits ``(..., K)`` minus their running mean ``(K,)``, sharpened by the temperature."""
    return jax.lax.stop_gradient(jax.nn.softmax((logits.astype(jnp.float32) - center) / temperature, axis=-1))


def next_center(center: Array, logits: Array, momentum: float = 0.9, valid: Array | None = None) -> Array:
    """The running mean ``(K,)`` for the next step; logits ``(..., K)``, the mean is that of the ``valid`` ones."""
    flat = logits.astype(jnp.float32).reshape(-1, logits.shape[-1])
    weights = jnp.ones(flat.shape[0]) if valid is None else valid.reshape(-1).astype(jnp.float32)
    mean = weights @ flat / jnp.maximum(weights.sum(), 1.0)
    return jax.lax.stop_gradient(momentum * center + (1 - momentum) * mean)


def cross_entropy(logits: Array, targets: Array, temperature: float = 0.1) -> Array:
    """``(..., K)`` student logits and targets to ``(...)``."""
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)).sum(axis=-1)


def dino_loss(student: Array, targets: Array, temperature: float = 0.1) -> Array:
    """Every student view against every target, summed over the pairs, mean over images (`DINOLoss`).

    Args:
      student: logits ``(views, B, K)``.
      targets: ``(views', B, K)``.
      temperature: of the student.
    """
    return cross_entropy(student[:, None], targets[None], temperature).mean(axis=-1).sum()


def dino_losses(
    student_global: Array, student_local: Array, targets: Array, temperature: float = 0.1
) -> tuple[Array, Array]:
    """DINOv2's (global, local) terms: each view against both global ones, but no view against itself; mean over pairs.

    Args:
      student_global: logits of the two global views ``(2, B, K)``.
      student_local: of the local ones ``(n, B, K)``; n may be 0.
      targets: of the teacher's two global views ``(2, B, K)``, in the same order.
      temperature: of the student.
    """
    pairs = 2 + 2 * student_local.shape[0]
    across = cross_entropy(student_global, targets[::-1], temperature).mean(axis=-1).sum()
    local = dino_loss(student_local, targets, temperature) if student_local.shape[0] else jnp.zeros((), jnp.float32)
    return across / pairs, local / pairs


def masked_patches(masks: Array, size: int) -> tuple[Array, Array]:
    """Where the masked patches are, in a buffer of static size.

    Args:
      masks: boolean ``(B, N)``.
      size: of the buffer, at least the number of masked patches there can be (more are cut off).

    Returns:
      ``(indices, weights)``, both ``(size,)``: into the ``B * N`` patches, in order; and 1 / (masked patches of the
      image), 0 where the buffer is not full.
    """
    flat = masks.reshape(-1)
    indices = jnp.nonzero(flat, size=size, fill_value=0)[0]
    share = 1.0 / jnp.maximum(masks.sum(axis=1), 1)
    filled = jnp.arange(size) < flat.sum()
    return indices, jnp.where(filled, share[indices // masks.shape[1]], 0.0)


def ibot_loss(student: Array, targets: Array, weights: Array, images: int, temperature: float = 0.1) -> Array:
    """Masked patches: mean within an image, then over all images, masked or not (`iBOTPatchLoss.forward_masked`).

    Args:
      student: logits of masked patches ``(M, K)``.
      targets: of the teacher, ``(M, K)``.
      weights: ``(M,)`` of `masked_patches`.
      images: how many there are.
      temperature: of the student.
    """
    return (cross_entropy(student, targets, temperature) * weights).sum() / images


def koleo_loss(features: Array, epsilon: float = 1e-8) -> Array:
    """Minus the mean logarithm of the distance to the nearest neighbour, of normalised features ``(B, D)``.

    https://arxiv.org/abs/1806.03198, as in DINOv2 (`KoLeoLoss`).
    """
    x = features.astype(jnp.float32)
    x = x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True)), epsilon)
    similarity = jax.lax.stop_gradient(x @ x.T)
    nearest = jnp.where(jnp.eye(x.shape[0], dtype=jnp.bool_), -1.0, similarity).argmax(axis=1)
    distance = jnp.sqrt(jnp.square(x - x[nearest] + epsilon).sum(axis=-1))
    return -jnp.log(distance + epsilon).mean()
