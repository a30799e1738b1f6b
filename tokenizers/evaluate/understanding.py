"""What features know of classes and texts: zero-shot and linear classification, nearest neighbours, retrieval.

Functions of features on the host, ``(N, D)`` float32 with any number of rows; they compute in chunks, spread over a
mesh where there is one. Nothing is drawn at random but what a fixed seed decides, and the numbers do not depend on the
devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..parallel import mesh as meshes
from ..parallel import multihost, platform

Array = jax.Array

# The seven that OpenAI's notebook on prompts picks out of eighty; they do nearly as well as all of them.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
# DINOv2's, at a batch of 256 (`dinov2/eval/linear.py`); VTP has the same.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)

_ROWS = 1024  # rows of a chunk
_FLOATS = 2**24  # of the training features that one program reads


@dataclasses.dataclass(frozen=True)
class Setup:
    """How understanding is measured.

    Attributes:
      classes: names of the classes, in the order of the labels; empty where only numbers are known.
      templates: sentences around a name, which stands for ``{}``.
      training: stream name -> labelled batches that linear and nearest-neighbour classifiers learn from.
      augmented: stream name -> random crops of the same pictures, that linear classifiers learn from in their place.
      blocks: numbers of last blocks whose class tokens a linear probe reads; the best is reported.
      epochs, batch_size, learning_rates: of linear probes. Rates are those for a batch of 256 and scale with it.
      neighbours, temperature: of nearest-neighbour classification.
      seed: of the order of the training features and the first weights.
    """

    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = TEMPLATES
    training: Callable[[str], Iterable[Mapping[str, Any]]] | None = None
    augmented: Callable[[str], Iterable[Mapping[str, Any]]] | None = None
    blocks: tuple[int, ...] = (1, 4)
    epochs: float = 10
    batch_size: int = 256
    learning_rates: tuple[float, ...] = LEARNING_RATES
    neighbours: int = 20
    temperature: float = 0.07
    seed: int = 0

    def __post_init__(self):
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong or not self.templates:
            raise ValueError(f"templates are sentences with one {{}} for the name of the class; got {wrong or 'none'}.")


# Zero-shot -----------------------------------------------------------------------------------------------------------


def class_weights(classes: Sequence[str], templates: Sequence[str], embed: Callable[[list[str]], Array]) -> np.ndarray:
    """One direction per class, ``(C, E)``: the normalized mean over templates of normalized embeddings.

    CLIP (https://arxiv.org/abs/2103.00020, section 3.1.4); the same in VTP's ``tools/``.

    Args:
      classes: names.
      templates: sentences with ``{}``.
      embed: texts -> embeddings ``(n, E)``.
    """
    texts = [template.format(name) for name in classes for template in templates]
    every = _unit(np.asarray(embed(texts), np.float64)).reshape(len(classes), len(templates), -1)
    return _unit(every.mean(axis=1)).astype(np.float32)


def accuracies(scores: np.ndarray, labels: np.ndarray, top: Sequence[int] = (1, 5)) -> dict[int, float]:
    """``{k: share of rows whose label is among the k best scored classes}``; scores ``(N, C)``, labels ``(N,)``.

    In [0, 1], more is better. Of equal scores the lower class counts as better.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    lower = np.arange(scores.shape[1]) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & lower)).sum(axis=1)
    return {k: float(np.mean(rank < k)) for k in top}


# Nearest neighbours --------------------------------------------------------------------------------------------------


def nearest_neighbour_scores(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Votes ``(N, C)`` of the nearest of the bank's rows by cosine, each with weight ``exp(cosine / temperature)``.

    DINO's ``eval_knn.py`` (https://arxiv.org/abs/2104.14294, appendix F; after Wu et al., 2018). With fewer rows in the
    bank than ``neighbours`` all of them vote.
    """
    k = min(neighbours, len(bank))
    bank, queries = _unit(bank), _unit(queries)
    votes = []
    for rows, count in _chunks(queries, _parts(mesh)):
        placed = _split(mesh, rows)
        best = np.full((len(rows), k), -np.inf, np.float32), np.zeros((len(rows), k), np.int32)
        best = tuple(_split(mesh, array) for array in best)
        for start in range(0, len(bank), 4 * _ROWS):
            part = slice(start, start + 4 * _ROWS)
            best = _nearer(*best, placed, _whole(mesh, bank[part]), _whole(mesh, bank_labels[part]))
        cosines, labels = (multihost.gather(array)[:count] for array in best)
        weights = np.exp(cosines.astype(np.float64) / temperature)
        voted = np.zeros((count, classes))
        np.add.at(voted, (np.arange(count)[:, None], labels), weights)
        votes.append(voted)
    return np.concatenate(votes)


@platform.jit
def _nearer(cosines: Array, labels: Array, queries: Array, bank: Array, bank_labels: Array) -> tuple[Array, Array]:
    """The k nearest of the k found so far and a further part of the bank; of equally near ones the earlier."""
    found = jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
    both = jnp.concatenate([cosines, found], axis=1)
    names = jnp.concatenate([labels, jnp.broadcast_to(bank_labels, found.shape)], axis=1)
    best, places = jax.lax.top_k(both, cosines.shape[1])
    return best, jnp.take_along_axis(names, places, axis=1)


# Linear probe --------------------------------------------------------------------------------------------------------


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    setup: Setup,
    mesh: Mesh | None = None,
) -> dict[float, float]:
    """``{learning rate: top-1 accuracy on the test features}`` of linear classifiers, all trained at once.

    As DINOv2's ``eval/linear.py`` and VTP's: weights normal(0, 0.01), no bias at first, SGD with momentum 0.9 and no
    weight decay, a cosine to 0, rates times batch / 256. The best rate is found on the test set, as there: with 13 of
    them that flatters a small test set. Unlike there, features are computed before, and may be of fewer views of a
    picture than there are epochs. In [0, 1], more is better.
    """
    rates = np.asarray(setup.learning_rates, np.float32) * (setup.batch_size / 256)
    rng = np.random.default_rng(setup.seed)
    first = rng.normal(0, 0.01, (features.shape[1], classes)).astype(np.float32)
    weights = {"w": np.repeat(first[None], len(rates), 0), "b": np.zeros((len(rates), classes), np.float32)}
    state = jax.tree.map(lambda array: _whole(mesh, array), (weights, jax.tree.map(np.zeros_like, weights)))
    for rows, answers, valid, factors in _lessons(features, labels, setup, rng, _parts(mesh)):
        placed = (_split(mesh, array, axis=1) for array in (rows, answers, valid))
        state = _learn(state, *placed, _whole(mesh, factors[:, None] * rates))
    right = np.zeros(len(rates))
    for (rows, count), (answers, _) in zip(
        _chunks(test_features, _parts(mesh)), _chunks(test_labels, _parts(mesh)), strict=True
    ):
        found = multihost.gather(_classify(state[0], _split(mesh, rows)))
        right += (found[:, :count] == answers[:count]).sum(axis=1)
    return {rate: float(share) for rate, share in zip(setup.learning_rates, right / len(test_labels), strict=True)}


def _lessons(features, labels, setup: Setup, rng: np.random.Generator, parts: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Steps in pieces of one shape: rows ``(S, B, D)``, answers, whether each row counts, and the rates' factors."""
    total = max(1, round(setup.epochs * len(features) / setup.batch_size))
    epochs = -(-total * setup.batch_size // len(features))
    order = np.concatenate([rng.permutation(len(features)) for _ in range(epochs)])[: total * setup.batch_size]
    order = np.pad(order.reshape(total, setup.batch_size), ((0, 0), (0, -setup.batch_size % parts)))
    counts = np.arange(order.shape[1]) < setup.batch_size
    factors = (0.5 * (1 + np.cos(np.pi * np.arange(total) / total))).astype(np.float32)
    size = min(total, max(1, _FLOATS // (order.shape[1] * features.shape[1])))
    size = -(-total // -(-total // size))  # of equal pieces, so that few steps are added
    for start in range(0, total, size):
        steps, rest = order[start : start + size], max(0, start + size - total)
        # What fills the last piece learns at a rate of 0.
        steps = np.pad(steps, ((0, rest), (0, 0)))
        chosen = np.broadcast_to(counts, steps.shape)
        yield features[steps], labels[steps], chosen, np.pad(factors[start : start + size], (0, rest))


@platform.jit
def _learn(state, rows: Array, answers: Array, valid: Array, rates: Array):
    """SGD over ``S`` batches for ``L`` classifiers: rows ``(S, B, D)``, rates ``(S, L)``."""

    def loss(weights, x, y, counted):
        taken = _cross_entropy(x @ weights["w"] + weights["b"], y)
        return jnp.sum(taken * counted) / jnp.sum(counted)

    def step(state, batch):
        x, y, counted, rate = batch

        def update(weights, momentum, rate):
            gradients = jax.grad(loss)(weights, x, y, counted)
            momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradients)
            return jax.tree.map(lambda w, m: w - rate * m, weights, momentum), momentum

        return jax.vmap(update)(*state, rate), None

    with jax.default_matmul_precision("float32"):
        return jax.lax.scan(step, state, (rows, answers, valid, rates))[0]


def _cross_entropy(logits: Array, labels: Array) -> Array:
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


@platform.jit
def _classify(weights, rows: Array) -> Array:  # (n d) -> (l n)
    logits = jnp.einsum("nd,ldc->lnc", rows, weights["w"], precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(logits + weights["b"][:, None], axis=-1)


def standardized(features: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """All of them with the first ones' mean and standard deviation per channel at 0 and 1; constants become 0."""
    mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = np.where(std > 1e-12, 1 / np.maximum(std, 1e-12), 0.0)
    return tuple(((array - mean) * scale).astype(np.float32) for array in (features, *others))


# Retrieval -----------------------------------------------------------------------------------------------------------


def recalls(
    images: np.ndarray, texts: np.ndarray, pairs: np.ndarray, mesh: Mesh | None = None, at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall of pictures' texts and of texts' pictures: ``{"image_to_text_r1": ..., "text_to_image_r1": ...}``.

    The share of queries with a right answer among the k most similar. In [0, 1], more is better; a smaller set is
    easier. Texts that are the same count once: any of their pictures is right. What is as similar as the right answer
    counts as more similar, so that an encoder that says the same of everything finds nothing.

    Args:
      images: embeddings ``(N, E)`` of length 1.
      texts: embeddings ``(M, E)`` of the different texts.
      pairs: number of each picture's text, ``(N,)``.
    """
    numbers = np.arange(len(texts), dtype=np.int32)
    both = {
        "image_to_text": _ranks(images, pairs, texts, numbers, mesh),
        "text_to_image": _ranks(texts, numbers, images, pairs, mesh),
    }
    return {f"{name}_r{k}": float(np.mean(ranks < k)) for name, ranks in both.items() for k in at}


def _ranks(queries, numbers, bank, bank_numbers, mesh: Mesh | None) -> np.ndarray:
    placed = _whole(mesh, bank), _whole(mesh, bank_numbers.astype(np.int32))
    found = []
    for (rows, count), (names, _) in zip(
        _chunks(queries, _parts(mesh)), _chunks(numbers.astype(np.int32), _parts(mesh)), strict=True
    ):
        found.append(multihost.gather(_rank(_split(mesh, rows), _split(mesh, names), *placed))[:count])
    return np.concatenate(found)


@platform.jit
def _rank(queries: Array, numbers: Array, bank: Array, bank_numbers: Array) -> Array:
    """How many wrong ones are at least as similar as the most similar right one, ``(n,)``."""
    found = jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
    right = numbers[:, None] == bank_numbers[None]
    best = jnp.max(jnp.where(right, found, -jnp.inf), axis=1, keepdims=True)
    return jnp.sum(~right & (found >= best), axis=1)


# Chunks and devices --------------------------------------------------------------------------------------------------


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _parts(mesh: Mesh | None) -> int:
    return 1 if mesh is None else meshes.batch_parts(mesh)


def _chunks(array: np.ndarray, parts: int) -> Iterator[tuple[np.ndarray, int]]:
    """(rows, how many count): chunks of one size, filled up, that the devices divide."""
    size = min(_ROWS, len(array))
    size += -size % parts
    for start in range(0, len(array), size):
        rows = array[start : start + size]
        yield np.pad(rows, ((0, size - len(rows)), *((0, 0),) * (array.ndim - 1))), len(rows)


def _split(mesh: Mesh | None, array: np.ndarray, axis: int = 0) -> Array:
    """An array that every process has whole, its rows spread over the devices."""
    if mesh is None:
        return jnp.asarray(array)
    spec = PartitionSpec(*(None,) * axis, meshes.batch_axes(mesh))
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def _whole(mesh: Mesh | None, array: np.ndarray) -> Array:
    if mesh is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, meshes.replicated(mesh), lambda index: array[index])
