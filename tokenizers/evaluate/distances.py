"""Distances between two sets of features: Frechet (FID, FVD), kernel (KID, KVD) and the inception score.

NumPy and float64 on the host: the matrices are small, float32 roots of nearly singular covariances noise.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import scipy.linalg

from ..errors import pick


@dataclasses.dataclass(frozen=True)
class GaussianStatistics:
    """Count, mean and scatter of feature rows; collected in any number of pieces, in any order.

    Attributes:
      count: number of rows.
      mean: float64 ``(D,)``.
      scatter: sum of outer products about the mean, float64 ``(D, D)``.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> GaussianStatistics:
        """Statistics of features ``(N, D)``."""
        features = np.asarray(features, np.float64)
        if features.ndim != 2:
            raise ValueError(f"features must be (N, D), got shape {features.shape}.")
        mean = features.mean(axis=0) if len(features) else np.zeros(features.shape[1])
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: GaussianStatistics) -> GaussianStatistics:
        """Statistics of both sets together (Chan, Golub, LeVeque 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return GaussianStatistics(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance ``(D, D)``, divided by N - 1; zeros for a single row."""
        return self.scatter / max(self.count - 1, 1)


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics, root: str = "eigenvalues") -> float:
    """``|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)``.

    Args:
      first, second: statistics of the two sets. FID and FVD are biased upwards for few samples and mean little while
        there are fewer of them than feature dimensions.
      root: how the trace of the root is taken, which matters for nearly singular covariances only:
        ``eigenvalues`` of the product (torch-fidelity, TokenBench), ``sqrtm`` of the product (clean-fid, pytorch-fid,
        StyleGAN-V), ``symmetric`` product of two symmetric roots (VideoGPT, OmniTokenizer).
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"feature sizes differ: {first.mean.shape} and {second.mean.shape}.")
    if min(first.count, second.count) < 1:
        raise ValueError(f"a Frechet distance needs samples in both sets, got {first.count} and {second.count}.")
    trace_of_root = pick("matrix root", root, ROOTS)
    s1, s2 = first.covariance, second.covariance
    difference = first.mean - second.mean
    return float(difference @ difference + np.trace(s1) + np.trace(s2) - 2 * trace_of_root(s1, s2))


def _root_by_eigenvalues(s1: np.ndarray, s2: np.ndarray) -> float:
    return float(np.sqrt(scipy.linalg.eigvals(s1 @ s2).astype(np.complex128)).real.sum())


def _root_by_sqrtm(s1: np.ndarray, s2: np.ndarray) -> float:
    with warnings.catch_warnings():
        # Singular products are the rule with few samples, and handled below as the authors do.
        warnings.simplefilter("ignore")
        product = scipy.linalg.sqrtm(s1 @ s2)
        if not np.isfinite(product).all():
            offset = 1e-6 * np.eye(len(s1))
            product = scipy.linalg.sqrtm((s1 + offset) @ (s2 + offset))
    return float(np.trace(product).real)


def _root_by_symmetric_roots(s1: np.ndarray, s2: np.ndarray) -> float:
    half = _symmetric_root(s1)
    return float(np.trace(_symmetric_root(half @ s2 @ half)))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix)
    # Below the threshold the authors keep the singular value itself instead of its root.
    return (u * np.where(s < 1e-10, s, np.sqrt(s))) @ vt


ROOTS = {"eigenvalues": _root_by_eigenvalues, "sqrtm": _root_by_sqrtm, "symmetric": _root_by_symmetric_roots}


def kernel_distance(
    first: np.ndarray, second: np.ndarray, *, subset: int = 1000, subsets: int = 100, seed: int = 0
) -> float:
    """KID: unbiased squared maximum mean discrepancy with the kernel ``(x.y / D + 1)^3`` (Binkowski et al. 2018).

    Args:
      first, second: features ``(N1, D)`` and ``(N2, D)``.
      subset: rows drawn from each set at a time, at most the smaller set's; two sets of that size are taken whole.
      subsets: number of draws that are averaged.
      seed: of the draws.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    size = min(len(first), len(second), subset)
    if size < 2:
        raise ValueError(f"a kernel distance needs two samples in each set, got {len(first)} and {len(second)}.")
    if size == len(first) == len(second):
        return polynomial_discrepancy(first, second)
    generator = np.random.default_rng(seed)
    draws = [
        polynomial_discrepancy(
            first[generator.choice(len(first), size, replace=False)],
            second[generator.choice(len(second), size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return float(np.mean(draws))


def polynomial_discrepancy(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased squared MMD of two whole sets, ``(N1, D)`` and ``(N2, D)`` (the KVD of video papers)."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal_mean(gram):
        return (gram.sum() - np.trace(gram)) / (len(gram) * (len(gram) - 1))

    within = off_diagonal_mean(kernel(first, first)) + off_diagonal_mean(kernel(second, second))
    return float(within - 2 * kernel(first, second).mean())


def inception_score(logits: np.ndarray, splits: int = 10, shuffle_seed: int | None = 2020) -> tuple[float, float]:
    """Mean and population standard deviation over splits of ``exp(mean KL(p(y|x) || p(y)))`` (torch-fidelity).

    Args:
      logits: classifier logits without bias, ``(N, classes)``.
      splits: number of parts of the (shuffled) rows.
      shuffle_seed: of the permutation; ``None`` keeps the order.
    """
    logits = np.asarray(logits, np.float64)
    if len(logits) < splits:
        raise ValueError(f"an inception score of {splits} splits needs as many samples, got {len(logits)}.")
    if shuffle_seed is not None:
        # The legacy generator is part of the published protocol.
        order = np.random.RandomState(shuffle_seed).permutation(len(logits))  # noqa: NPY002
        logits = logits[order]
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        part = log_p[start:stop]
        p = np.exp(part)
        scores.append(np.exp(np.mean(np.sum(p * (part - np.log(p.mean(axis=0))), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))
