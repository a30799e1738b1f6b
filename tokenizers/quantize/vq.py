"""Vector quantization with a learned or a moving-average codebook (VQ-VAE, https://arxiv.org/abs/1711.00937)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import errors
from ..types import Encoding
from .codebook import (
    AffineState,
    CodebookState,
    RowPicker,
    affine_state,
    clustered,
    counted_rows,
    kmeans_state,
    moving_average,
    random_rows,
    restart_dead_codes,
    to_metric,
)
from .entropy import FORMS, code_entropies
from .gradients import ESTIMATORS, unit_norm
from .nearest import DISTANCES, nearest

Array = jax.Array
LEARNING = ("gradient", "ema", "clustering")
COMMITMENTS = ("distance", "cross_entropy")
MASKED = -1  # index of positions that do not count
_EMA_FIELDS = (
    "decay",
    "epsilon",
    "initial_cluster_size",
    "debias",
    "dead_code_threshold",
    "kmeans_iterations",
    "pick_rows",
    "affine",
)


def uniform_codebook(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    """Uniform in +-1/K for a table ``(K, D)``: the initial codebook of VQ-VAE and VQGAN."""
    return jax.random.uniform(key, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])


def orthogonality(table: Array) -> Array:
    """How far codes ``(K, D)`` are from orthogonal: sum of squared cosines of all pairs / K^2 - 1 / K -> scalar.

    (Shin et al., https://arxiv.org/abs/2112.00384, equation 2, over all codes.) The sum over pairs is the squared
    Frobenius norm of the D x D Gram matrix, so that K x K never exists.
    """
    unit, size = unit_norm(table), table.shape[0]
    gram = jnp.matmul(unit.T, unit, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(gram)) / size**2 - 1.0 / size


class VectorQuantizer(nn.Module):
    """Replaces every vector of ``z (..., D)`` by the nearest of K codes.

    ``losses["commitment"]`` = mean((sg(code) - z)^2) trains the encoder, ``losses["codebook"]`` =
    mean((code - sg(z))^2) a learned codebook; with ``learning="ema"`` the latter is absent. Means run over all
    elements, channels included. Weights of known losses as (commitment, codebook): VQ-VAE and MAGVIT (0.25, 1); VQGAN
    (1, 0.25), since its released code has them swapped; a moving-average codebook (0.25, -).

    With ``distance="cosine"`` z and the codes are normalised to length one first; latents are unit vectors and the
    losses compare unit vectors. With ``distance="direction"`` (MAGVIT's ``latent_normalize``) the choice is the same,
    but a code is the entry of the table with its own length, which the losses compare with the unit vector z.

    ``orthogonal=True`` adds ``losses["orthogonality"]`` while a learned codebook trains (`orthogonality`), ``entropy``
    the terms ``entropy_sample`` and ``entropy_codebook`` (weights w and -w; MaskGIT and MAGVIT: 0.1) of
    softmax(-distance^2 / temperature).

    Moving averages live in the collection ``codebook``: ``codes (K, D)``, ``cluster_size (K,)``, ``embed_avg (K, D)``,
    the flag ``initialised`` and, with ``debias``, the count ``updates``. They change when ``train=True`` (the
    collection must be mutable then). One call works on the codes before its own update: k-means on the first batch,
    quantization, average, restart.

    ``learning="clustering"`` (`codebook.clustered`, TA-TiTok) has a learned codebook whose unused codes also move to
    inputs. A module cannot change its parameters, so the collection ``codebook`` holds how far they ``moved (K, D)``
    beside the optimizer's steps, and the ``usage (K,)`` of codes; a code is the sum of parameter and movement.

    With ``affine`` (Huh et al., https://arxiv.org/abs/2305.08842, section 4.2) moving averages of mean and deviation of
    inputs and codes live there too. A code is the entry of the table, moved from the codes' mean and deviation to those
    of the inputs; averages and restarts see inputs the other way round.

    A ``mask`` says which positions count. The others get index -1 and code 0, and are in no loss and no average.

    Attributes:
      codebook_size: K.
      code_dim: D.
      distance: ``euclidean``, ``cosine`` or ``direction``; the last one needs ``learning="gradient"``.
      learning: ``gradient`` (parameter ``codebook``), ``ema`` or ``clustering``.
      estimator: ``straight_through`` or ``rotation_trick``: the gradient that z receives from the latents.
      codebook_init: initializer of the table.
      decay, epsilon: of the moving averages and of the Laplace smoothing of counts; clustering has only the first.
      initial_cluster_size: count of every code at the start: 1 as in vector-quantize-pytorch; 0 as in taming, where
        codes that are rarely hit grow large in the first steps.
      debias: both averages start at zero and are corrected for it, as in Sonnet: the initial table leaves no trace, and
        a code that was never hit is zero after the first update. Needs ``initial_cluster_size=0`` and neither restarts
        nor k-means, which set averages to values that need no correction.
      dead_code_threshold: codes whose average count falls below it are replaced by inputs of the batch; 0 never.
      kmeans_iterations: steps of k-means on the first training batch; 0 keeps the initial table.
      pick_rows: which inputs become codes in k-means and restarts: ``(key, rows (N, D), count) -> (count, D)``.
      orthogonal: also return ``orthogonality`` of the table while training.
      entropy: also return the entropy terms in this form (``entropy.FORMS``) while training: ``smoothed`` for MaskGIT.
      inverse_temperature: of the entropy terms; 100 for MaskGIT.
      entropy_chunk_size: positions of the global batch handled at once by the entropy terms.
      sample_temperature: while training, codes are drawn with probability softmax(-distance / temperature), from the
        rng stream ``bottleneck``, in place of the nearest one; 0 never.
      commitment: what ``losses["commitment"]`` is: ``distance``, or ``cross_entropy`` of softmax(-distance) with the
        chosen code (vector-quantize-pytorch); that and the next one compute positions x codes at once.
      diversity: while training, ``losses["diversity"]`` is minus the entropy of softmax(-distance * diversity),
        averaged over the batch before it is taken and over positions after; 0 leaves it out.
      affine: decays of the statistics of (inputs, codes), (0.99, 0.9) in vector-quantize-pytorch; ``None`` takes codes
        as the table has them. Needs the Euclidean distance.

    Those from ``decay`` to ``pick_rows``, and ``affine``, need ``learning="ema"``: elsewhere the optimizer owns the
    table.
    """

    codebook_size: int
    code_dim: int
    distance: str = "euclidean"
    learning: str = "gradient"
    estimator: str = "straight_through"
    codebook_init: Callable[..., Array] = uniform_codebook
    decay: float = 0.99
    epsilon: float = 1e-5
    initial_cluster_size: float = 1.0
    debias: bool = False
    dead_code_threshold: float = 0.0
    kmeans_iterations: int = 0
    pick_rows: RowPicker = random_rows
    orthogonal: bool = False
    entropy: str | None = None
    inverse_temperature: float = 100.0
    entropy_chunk_size: int = 256
    sample_temperature: float = 0.0
    commitment: str = "distance"
    diversity: float = 0.0
    affine: tuple[float, float] | None = None

    def __post_init__(self):
        if self.entropy is not None:
            errors.pick("entropy form", self.entropy, FORMS)
        errors.pick("distance", self.distance, DISTANCES)
        if self.commitment not in COMMITMENTS:
            raise errors.unknown("commitment", self.commitment, COMMITMENTS)
        errors.pick("gradient estimator", self.estimator, ESTIMATORS)
        if self.learning not in LEARNING:
            raise errors.unknown("learning of the codebook", self.learning, LEARNING)
        if self.distance == "direction" and self.learning != "gradient":
            raise ValueError(f"distance='direction' needs learning='gradient', got {self.learning!r}.")
        if self.learning != "ema":
            for field in _EMA_FIELDS[self.learning == "clustering" :]:
                default = type(self).__dataclass_fields__[field].default
                if getattr(self, field) != default:
                    raise ValueError(f"{field}={getattr(self, field)!r} needs learning='ema', got {self.learning!r}.")
        elif self.orthogonal:
            raise ValueError("orthogonal=True needs a learned codebook: moving averages do not follow a gradient.")
        if self.affine is not None and self.distance != "euclidean":
            raise ValueError(f"affine={self.affine} needs distance='euclidean', got {self.distance!r}.")
        if self.debias and (self.initial_cluster_size or self.dead_code_threshold or self.kmeans_iterations):
            raise ValueError(
                "debias=True needs initial_cluster_size=0, dead_code_threshold=0 and kmeans_iterations=0, got "
                f"{self.initial_cluster_size}, {self.dead_code_threshold} and {self.kmeans_iterations}."
            )
        super().__post_init__()

    def setup(self):
        shape = (self.codebook_size, self.code_dim)
        if self.learning != "ema":
            self.table = self.param("codebook", self.codebook_init, shape, jnp.float32)
            if self.learning == "clustering":
                self.moved = self.variable("codebook", "moved", jnp.zeros, shape, jnp.float32)
                self.usage = self.variable("codebook", "usage", jnp.zeros, shape[:1], jnp.float32)
            return
        self.codes = self.variable(
            "codebook",
            "codes",
            lambda: to_metric(self.codebook_init(self.make_rng("params"), shape, jnp.float32), self.distance),
        )
        self.cluster_size = self.variable(
            "codebook", "cluster_size", lambda: jnp.full(shape[:1], self.initial_cluster_size, jnp.float32)
        )
        # A copy: a state that holds one buffer twice cannot be donated to a training step.
        start = jnp.zeros_like if self.debias else functools.partial(jnp.array, copy=True)
        self.embed_avg = self.variable("codebook", "embed_avg", lambda: start(self.codes.value))
        self.updates = self.variable("codebook", "updates", lambda: jnp.zeros((), jnp.int32)) if self.debias else None
        self.initialised = self.variable("codebook", "initialised", lambda: jnp.asarray(self.kmeans_iterations == 0))
        if self.affine is not None:
            self.affine_statistics = self.variable(
                "codebook", "affine", lambda: AffineState.start(self.code_dim)._asdict()
            )

    def input_channels(self, latent_channels: int) -> int:
        """Channels of ``z`` for codes of that many channels."""
        if latent_channels != self.code_dim:
            raise ValueError(f"a codebook of code_dim={self.code_dim} does not make {latent_channels} channels.")
        return latent_channels

    def __call__(self, z: Array, train: bool = False, mask: Array | None = None) -> Encoding:
        """Quantizes ``z (..., D)``, any float dtype -> float32 codes, int32 indices ``(...)`` and the loss terms.

        ``mask``, bool ``(...)``, is true where a position counts; ``None`` counts all.
        """
        self._check(z.shape)
        if mask is not None:
            self._check_mask(mask.shape, z.shape)
        inputs, z = z, to_metric(jnp.asarray(z, jnp.float32), self.distance)
        training = train and not self.is_initializing()
        follow = training and self.learning == "ema"
        rows = jax.lax.stop_gradient(z).reshape(-1, self.code_dim)
        counted = None if mask is None else jnp.asarray(mask).reshape(-1)
        if follow and self.kmeans_iterations:
            self._store(self._clustered(rows, counted))
            self.initialised.value = jnp.ones_like(self.initialised.value)
        if follow and self.affine is not None:
            state = affine_state(
                AffineState(**self.affine_statistics.value), rows, self.codes.value, self.affine, counted
            )
            self.affine_statistics.value = state._asdict()
        codebook = self.codebook()
        table = to_metric(codebook, self.distance)
        indices = self._sampled(z, table) if train and self.sample_temperature else nearest(z, table, self.distance)
        codes = jnp.take(codebook, indices, axis=0)
        losses = {"commitment": self._committed(z, table, codes, indices, mask)}
        if self.learning != "ema":
            losses["codebook"] = _mean(jnp.square(codes - jax.lax.stop_gradient(z)), mask)
        if self.orthogonal and train:
            losses["orthogonality"] = orthogonality(self._learned())
        if self.entropy is not None and train:
            losses["entropy_sample"], losses["entropy_codebook"] = self._entropies(z, table, mask)
        if self.diversity and train:
            losses["diversity"] = self._diversity(z, table)
        if follow:
            self._store(self._averaged(rows, indices.reshape(-1), counted))
        if training and self.learning == "clustering":
            self._cluster(jax.lax.stop_gradient(inputs).reshape(rows.shape), rows, indices.reshape(-1))
        latents = ESTIMATORS[self.estimator](z, codes)
        if mask is not None:
            latents, indices = jnp.where(mask[..., None], latents, 0.0), jnp.where(mask, indices, MASKED)
        return Encoding(latents=latents, indices=indices, losses=losses)

    def codebook(self) -> Array:
        """The table of codes ``(K, D)``, float32; unit vectors for the cosine distance."""
        if self.affine is not None:
            return self._affine().to_inputs(self.codes.value)
        if self.learning == "ema":
            return self.codes.value
        return to_metric(self._learned(), self.distance) if self.distance == "cosine" else self._learned()

    def _learned(self) -> Array:
        return self.table + self.moved.value if self.learning == "clustering" else self.table

    def _cluster(self, inputs: Array, rows: Array, indices: Array):
        """``inputs`` are anchors as they come, ``rows`` what distances compare."""
        anchors = inputs.astype(jnp.float32)[nearest(self.codebook(), rows, self.distance)]
        table, usage = jax.lax.stop_gradient(self._learned()), self.usage.value
        table, self.usage.value = clustered(table, usage, rows, indices, anchors, self.decay)
        self.moved.value = table - jax.lax.stop_gradient(self.table)

    def indices_to_codes(self, indices: Array) -> Array:
        """int ``(...)`` in [0, K) -> float32 codes ``(..., D)``: 0 for -1 (masked), NaN for others out of range."""
        codes = jnp.take(self.codebook(), indices, axis=0)
        return jnp.where(jnp.asarray(indices)[..., None] == MASKED, 0.0, codes)

    def codes_to_indices(self, codes: Array) -> Array:
        """Codes ``(..., D)`` -> int32 ``(...)``: the nearest code, the lowest index of equal ones."""
        self._check(codes.shape)
        table = to_metric(self.codebook(), self.distance)
        return nearest(to_metric(codes.astype(jnp.float32), self.distance), table, self.distance)

    def _scores(self, z: Array, table: Array) -> Array:
        """Minus the distances, or cosines, of ``z (..., D)`` to all codes: ``(..., K)``."""
        products = jnp.matmul(z, table.T, precision=jax.lax.Precision.HIGHEST)
        if self.distance != "euclidean":
            return products
        squares = jnp.sum(jnp.square(z), -1, keepdims=True) + jnp.sum(jnp.square(table), -1) - 2 * products
        return -jnp.sqrt(jnp.maximum(squares, 1e-8))

    def _sampled(self, z: Array, table: Array) -> Array:
        scores = self._scores(jax.lax.stop_gradient(z), jax.lax.stop_gradient(table))
        noise = jax.random.gumbel(self.make_rng("bottleneck"), scores.shape, jnp.float32)
        return jnp.argmax(scores / self.sample_temperature + noise, axis=-1).astype(jnp.int32)

    def _committed(self, z: Array, table: Array, codes: Array, indices: Array, mask: Array | None) -> Array:
        if self.commitment == "distance":
            return _mean(jnp.square(jax.lax.stop_gradient(codes) - z), mask)
        log_p = jax.nn.log_softmax(self._scores(z, jax.lax.stop_gradient(table)), axis=-1)
        return -_mean(jnp.take_along_axis(log_p, indices[..., None], axis=-1), mask)

    def _diversity(self, z: Array, table: Array) -> Array:
        scores = self._scores(z, table).reshape(z.shape[0], -1, self.codebook_size)
        mean = jax.nn.softmax(scores * self.diversity, axis=-1).mean(0)
        return jnp.mean(jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-5)), axis=-1))

    def _entropies(self, z: Array, table: Array, mask: Array | None) -> tuple[Array, Array]:
        # -|z - e|^2 is 2 <z, e> - |e|^2 and a part that all codes share: one more channel makes it an inner product.
        z = jnp.concatenate([z, jnp.ones_like(z[..., :1])], axis=-1)
        table = jnp.concatenate([table, -jnp.sum(jnp.square(table), axis=-1, keepdims=True) / 2], axis=-1)
        return code_entropies(z, table, 2 * self.inverse_temperature, self.entropy, self.entropy_chunk_size, mask)

    def _affine(self) -> AffineState:
        return AffineState(**self.affine_statistics.value)

    def _statistics(self) -> CodebookState:
        return CodebookState(self.codes.value, self.cluster_size.value, self.embed_avg.value)

    def _store(self, state: CodebookState):
        self.codes.value, self.cluster_size.value, self.embed_avg.value = state

    def _clustered(self, rows: Array, counted: Array | None) -> CodebookState:
        key = self.make_rng("bottleneck")

        def cluster(_) -> CodebookState:
            return kmeans_state(
                rows,
                key,
                self.codebook_size,
                self.kmeans_iterations,
                self.epsilon,
                self.distance,
                self.pick_rows,
                counted,
            )

        return jax.lax.cond(self.initialised.value, lambda state: state, cluster, self._statistics())

    def _averaged(self, rows: Array, indices: Array, counted: Array | None) -> CodebookState:
        updates = None
        if self.debias:
            updates = self.updates.value = self.updates.value + 1
        if self.affine is not None:
            rows = self._affine().to_codes(rows)
        if counted is not None:
            indices = jnp.where(counted, indices, self.codebook_size)  # the number of no code
        state = moving_average(self._statistics(), rows, indices, self.decay, self.epsilon, self.distance, updates)
        if self.dead_code_threshold:
            key = self.make_rng("bottleneck")
            rows = rows if counted is None else counted_rows(rows, counted)
            state = restart_dead_codes(state, rows, key, self.dead_code_threshold, self.pick_rows)
        return state

    def _check(self, shape: tuple[int, ...]):
        if shape[-1] != self.code_dim:
            raise ValueError(f"the codebook has codes of {self.code_dim} channels, got shape {shape}.")

    def _check_mask(self, mask: tuple[int, ...], shape: tuple[int, ...]):
        if mask != shape[:-1]:
            raise ValueError(f"the mask must have the shape {shape[:-1]} of the positions, got {mask}.")
        if self.learning == "clustering" or self.diversity:
            raise ValueError(
                "a mask goes neither with learning='clustering' nor with diversity, which look at all positions; got "
                f"learning={self.learning!r}, diversity={self.diversity}."
            )


def _mean(x: Array, mask: Array | None) -> Array:
    """Mean of ``x (..., D)`` over all elements, or those of the positions that count."""
    if mask is None:
        return jnp.mean(x)
    return jnp.sum(jnp.where(mask[..., None], x, 0.0)) / (jnp.maximum(jnp.sum(mask), 1) * x.shape[-1])
