"""Statistics of a codebook that follows its inputs: moving averages, k-means, restart of dead codes. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .gradients import unit_norm
from .nearest import nearest

Array = jax.Array
# (key, rows (N, D), count) -> (count, D): which inputs become codes.
RowPicker = Callable[[Array, Array, int], Array]


class CodebookState(NamedTuple):
    """Attributes: codes ``(K, D)``, cluster_size ``(K,)`` and embed_avg ``(K, D)``: averages of counts and of sums."""

    codes: Array
    cluster_size: Array
    embed_avg: Array


class AffineState(NamedTuple):
    """Moving averages of mean and variance, each ``(D,)``, of inputs and of codes, and whether there are any yet."""

    input_mean: Array
    input_variance: Array
    code_mean: Array
    code_variance: Array
    begun: Array

    @classmethod
    def start(cls, channels: int) -> AffineState:
        """Before the first batch: the map between both is the identity."""
        zeros, ones = (lambda: jnp.zeros(channels, jnp.float32)), (lambda: jnp.ones(channels, jnp.float32))
        return cls(zeros(), ones(), zeros(), ones(), jnp.zeros((), bool))

    def to_inputs(self, codes: Array) -> Array:
        """``(..., D)``, from mean and deviation of the codes to those of the inputs."""
        return (codes - self.code_mean) * (_deviation(self.input_variance) / _deviation(self.code_variance)) + (
            self.input_mean
        )

    def to_codes(self, inputs: Array) -> Array:
        """``(..., D)``, the way back."""
        return (inputs - self.input_mean) * (_deviation(self.code_variance) / _deviation(self.input_variance)) + (
            self.code_mean
        )


def _deviation(variance: Array) -> Array:
    return jnp.sqrt(jnp.maximum(variance, 1e-5))


def affine_state(
    state: AffineState, rows: Array, codes: Array, decays: tuple[float, float], mask: Array | None = None
) -> AffineState:
    """One update with rows ``(N, D)``, those of the mask ``(N,)``, and codes ``(K, D)``; the first one sets it."""
    weights = jnp.ones(rows.shape[0]) if mask is None else mask.astype(jnp.float32)
    mean = jnp.average(rows, axis=0, weights=weights)
    variance = jnp.average(jnp.square(rows - mean), axis=0, weights=weights)
    new = (mean, variance, jnp.mean(codes, axis=0), jnp.var(codes, axis=0))
    kept = (decays[0], decays[0], decays[1], decays[1])
    averages = (
        jnp.where(state.begun, decay * old + (1.0 - decay) * value, value)
        for old, value, decay in zip(state[:4], new, kept, strict=True)
    )
    return AffineState(*averages, jnp.ones_like(state.begun))


def assignment_sums(rows: Array, indices: Array, codebook_size: int) -> tuple[Array, Array]:
    """How many rows each code got, and their sum: rows ``(N, D)``, indices ``(N,)`` -> float32 ``(K,)``, ``(K, D)``.

    A row with the index K counts for no code.
    """
    counts = jax.ops.segment_sum(jnp.ones(rows.shape[0], jnp.float32), indices, codebook_size)
    return counts, jax.ops.segment_sum(rows, indices, codebook_size)


def smoothed_mean(cluster_size: Array, embed_avg: Array, epsilon: float, distance: str) -> Array:
    """Codes ``(K, D)``: sums over Laplace-smoothed counts; unit vectors for the cosine distance."""
    total = jnp.sum(cluster_size)
    smoothed = (cluster_size + epsilon) / (total + cluster_size.shape[0] * epsilon) * total
    return to_metric(embed_avg / smoothed[:, None], distance)


def moving_average(
    state: CodebookState,
    rows: Array,
    indices: Array,
    decay: float,
    epsilon: float,
    distance: str,
    updates: Array | None = None,
) -> CodebookState:
    """One update (van den Oord et al., https://arxiv.org/abs/1711.00937, appendix A.1).

    With ``updates``, the int32 number of updates so far with this one, codes are made of both averages divided by
    ``1 - decay**updates``: the correction for averages that started at zero.
    """
    counts, sums = assignment_sums(rows, indices, state.codes.shape[0])
    cluster_size = decay * state.cluster_size + (1.0 - decay) * counts
    embed_avg = decay * state.embed_avg + (1.0 - decay) * sums
    weight = 1.0 if updates is None else 1.0 - jnp.power(jnp.float32(decay), updates.astype(jnp.float32))
    codes = smoothed_mean(cluster_size / weight, embed_avg / weight, epsilon, distance)
    return CodebookState(codes, cluster_size, embed_avg)


def clustered(
    table: Array, usage: Array, rows: Array, indices: Array, anchors: Array, decay: float
) -> tuple[Array, Array]:
    """One update of CVQ: codes move to inputs, the further the less they are used.

    (Zheng and Vedaldi, https://arxiv.org/abs/2307.15139, equations 4 and 5, with the constants of the released code.)

    Args:
      table: codes ``(K, D)``.
      usage: moving average of the share of inputs that each code gets ``(K,)``; zeros at first.
      rows: inputs ``(N, D)``.
      indices: the code of each ``(N,)``.
      anchors: the input nearest to each code ``(K, D)``.
      decay: of the average.

    Returns:
      (codes, usage).
    """
    counts, _ = assignment_sums(rows, indices, table.shape[0])
    usage = decay * usage + (1.0 - decay) * counts / rows.shape[0]
    pull = jnp.exp(-(usage * table.shape[0] * 10) / (1.0 - decay) - 1e-3)[:, None]
    return table * (1.0 - pull) + anchors * pull, usage


def restart_dead_codes(
    state: CodebookState, rows: Array, key: Array, threshold: float, pick_rows: RowPicker
) -> CodebookState:
    """Codes whose average count is below the threshold become inputs, with the threshold as their count.

    The j-th dead code gets the j-th picked row (Zeghidour et al., https://arxiv.org/abs/2107.03312, section 3.3).
    """
    dead = state.cluster_size < threshold

    def restart(state: CodebookState) -> CodebookState:
        picked = pick_rows(key, rows, dead.shape[0])[jnp.cumsum(dead) - 1]
        return CodebookState(
            jnp.where(dead[:, None], picked, state.codes),
            jnp.where(dead, threshold, state.cluster_size),
            jnp.where(dead[:, None], picked * threshold, state.embed_avg),
        )

    return jax.lax.cond(jnp.any(dead), restart, lambda state: state, state)


def kmeans(rows: Array, means: Array, iterations: int, distance: str, mask: Array | None = None) -> tuple[Array, Array]:
    """Lloyd's algorithm: rows ``(N, D)``, initial means ``(K, D)`` -> means and counts ``(K,)`` of the last assignment.

    A cluster without rows keeps its mean. With the cosine distance rows and means are unit vectors. Only rows of the
    mask ``(N,)`` count.
    """

    def iterate(_, means_and_counts):
        means, _ = means_and_counts
        indices = nearest(rows, means, distance)
        indices = indices if mask is None else jnp.where(mask, indices, means.shape[0])
        counts, sums = assignment_sums(rows, indices, means.shape[0])
        moved = to_metric(sums / jnp.maximum(counts, 1.0)[:, None], distance)
        return jnp.where(counts[:, None] > 0, moved, means), counts

    return jax.lax.fori_loop(0, iterations, iterate, (means, jnp.zeros(means.shape[0], jnp.float32)))


def kmeans_state(
    rows: Array,
    key: Array,
    codebook_size: int,
    iterations: int,
    epsilon: float,
    distance: str,
    pick_rows: RowPicker,
    mask: Array | None = None,
) -> CodebookState:
    """A codebook whose codes and averages are those of a k-means clustering of the rows ``(N, D)`` of the mask."""
    candidates = rows if mask is None else counted_rows(rows, mask)
    means, counts = kmeans(rows, pick_rows(key, candidates, codebook_size), iterations, distance, mask)
    embed_avg = means * counts[:, None]
    return CodebookState(smoothed_mean(counts, embed_avg, epsilon, distance), counts, embed_avg)


def to_metric(x: Array, distance: str) -> Array:
    """The vectors that a distance compares: ``x`` itself for ``euclidean``, unit vectors for the others."""
    return x if distance == "euclidean" else unit_norm(x)


def random_rows(key: Array, rows: Array, count: int) -> Array:
    """``count`` rows in random order, none twice before all were used: ``(N, D) -> (count, D)``."""
    order = jax.random.permutation(key, rows.shape[0])
    return rows[order[jnp.arange(count) % rows.shape[0]]]


def counted_rows(rows: Array, mask: Array) -> Array:
    """Rows ``(N, D)`` of the mask ``(N,)`` in their order, from the beginning again until there are N."""
    order = jnp.argsort(~mask, stable=True)
    return jnp.take(rows, order[jnp.arange(rows.shape[0]) % jnp.maximum(jnp.sum(mask), 1)], axis=0)


def first_rows(key: Array, rows: Array, count: int) -> Array:
    """The first ``count`` rows, from the beginning again when there are fewer. Ignores the key: for reproductions."""
    return rows[jnp.arange(count) % rows.shape[0]]
