"""How a codebook is used, what a token costs, and how the latents are distributed. NumPy, float64, mergeable."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class CodeHistogram:
    """Counts of the codes that occurred. Sparse: 2^18 codes cost nothing until they are used.

    Attributes:
      size: codebook size K.
      codes: sorted distinct codes, int64 ``(U,)``.
      counts: how often each occurred, int64 ``(U,)``.
    """

    size: int
    codes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, indices: np.ndarray, size: int) -> CodeHistogram:
        """Histogram of int token ids of any shape; ids outside ``[0, size)`` are an error."""
        codes, counts = np.unique(np.asarray(indices).ravel(), return_counts=True)
        if len(codes) and not (codes[0] >= 0 and codes[-1] < size):
            raise ValueError(f"token ids must lie in [0, {size}), got {codes[0]} to {codes[-1]}.")
        return cls(size, codes.astype(np.int64), counts.astype(np.int64))

    def merge(self, other: CodeHistogram) -> CodeHistogram:
        """Histogram of both sets of tokens together."""
        if self.size != other.size:
            raise ValueError(f"codebook sizes differ: {self.size} and {other.size}.")
        codes, where = np.unique(np.concatenate([self.codes, other.codes]), return_inverse=True)
        counts = np.zeros(len(codes), np.int64)
        np.add.at(counts, where, np.concatenate([self.counts, other.counts]))
        return CodeHistogram(self.size, codes, counts)

    @property
    def tokens(self) -> int:
        """Number of tokens counted."""
        return int(self.counts.sum())

    @property
    def usage(self) -> float:
        """Share of the codebook that occurred. N tokens cannot use more than N codes: see `reachable_usage`."""
        return len(self.codes) / self.size

    @property
    def reachable_usage(self) -> float:
        """Distinct codes over the most that this many tokens could have used, min(K, N)."""
        return len(self.codes) / max(min(self.size, self.tokens), 1)

    def entropy(self, epsilon: float = 0.0) -> float:
        """Bits per token, ``-sum p log2(p + epsilon)``; TiTok's code has ``epsilon`` 1e-8."""
        if not self.tokens:
            return 0.0
        p = self.counts / self.tokens
        return float(max(0.0, -np.sum(p * np.log2(p + epsilon))))

    def perplexity(self, epsilon: float = 0.0) -> float:
        """``2^entropy``; Cosmos-Predict1's code has ``epsilon`` 1.19e-7."""
        return 2.0 ** self.entropy(epsilon)


def bits_per_pixel(tokens: int, bits_per_token: float, frames: int, height: int, width: int) -> float:
    """Bits of an item's tokens over its pixels (a pixel is one position of one frame, with all its channels)."""
    return tokens * bits_per_token / (frames * height * width)


def bits_of_token(codebook_size: int | None, latent_channels: int) -> float:
    """Fixed-rate bits of a token: log2 K, or, for continuous latents, 16 bits a channel (stored as bfloat16)."""
    return 16.0 * latent_channels if codebook_size is None else math.log2(codebook_size)


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
    """Moments of every latent channel over items and positions.

    Attributes:
      count: vectors seen.
      mean, scatter: float64 ``(D,)``, scatter is the sum of squares about the mean.
      low, high: float64 ``(D,)``, smallest and largest value.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def merge(self, other: LatentStatistics) -> LatentStatistics:
        """Statistics of both sets together."""
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        return LatentStatistics(
            count,
            self.mean + difference * (other.count / count),
            self.scatter + other.scatter + difference**2 * (self.count * other.count / count),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation of every channel, ``(D,)``."""
        return np.sqrt(self.scatter / max(self.count, 1))

    def summary(self) -> dict[str, float | int | list[float]]:
        """JSON values: the overall moments and those of every channel."""
        variance = self.std**2
        mean = float(self.mean.mean())
        return {
            "vectors": self.count,
            "channels": len(self.mean),
            "mean": mean,
            "std": float(np.sqrt(variance.mean() + np.mean((self.mean - mean) ** 2))),
            "low": float(self.low.min()),
            "high": float(self.high.max()),
            "channel_mean": [float(value) for value in self.mean],
            "channel_std": [float(value) for value in self.std],
        }
