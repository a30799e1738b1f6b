"""What an evaluation keeps of every picture to measure understanding: features, embeddings, labels and captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..parallel import multihost, platform
from . import understanding
from .collect import Value, not_computed
from .understanding import Setup

METRICS = ("zero_shot", "retrieval", "linear_probe", "knn")
_KEYS = {
    "zero_shot": ("zero_shot_top1", "zero_shot_top5"),
    "retrieval": tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
    "linear_probe": ("linear_probe", "linear_probe_latents"),
    "knn": ("knn", "knn_latents"),
}
_LABELS = "labels: config.data.labels=True, with one folder per class or labels in shards, or source shapes"
_TEXTS = 256  # embedded at a time
_CAPTION_BYTES = 1024  # far more than the 77 tokens that CLIP reads


class Reader:
    """Reads what the wanted metrics need of a batch.

    Args:
      tokenizer: ``api.Tokenizer``, or anything with its methods.
      metrics: names; those of other modules are none of this one's business.
      setup: how understanding is measured.

    Attributes:
      metrics: those of `METRICS` that are wanted.
      learns: whether some of them learn from labelled data.
    """

    def __init__(self, tokenizer: Any, metrics: Iterable[str], setup: Setup):
        self._tokenizer, self._setup = tokenizer, setup
        self.metrics = tuple(name for name in METRICS if name in metrics)
        self.learns = bool({"linear_probe", "knn"} & set(self.metrics))
        module = getattr(tokenizer, "module", None)
        self._features = hasattr(module, "image_features") and self.learns
        self._embeds = bool(getattr(module, "clip", False)) and bool({"zero_shot", "retrieval"} & set(self.metrics))

    def given(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Labels and captions of a batch, with a row per item."""
        if not self.metrics:
            return {}
        found = {"label": np.asarray(batch["label"], np.int32)} if "label" in batch else {}
        return found | ({"caption": texts_as_bytes(batch["caption"], _CAPTION_BYTES)} if "caption" in batch else {})

    def __call__(self, pixels: jax.Array, latents: jax.Array, labelled: bool) -> dict[str, jax.Array]:
        """Features of a batch, with a row per item.

        Args:
          pixels: images ``(B, H, W, 3)`` or clips ``(B, T, H, W, 3)``, placed on the devices.
          latents: what the tokenizer makes of them.
          labelled: whether the items have labels.
        """
        found = {}
        if labelled and self.learns:
            found["latents"] = _pooled(latents)
        if pixels.ndim != 4:
            return found
        if self._embeds:
            found["embedding"] = self._tokenizer.image_embedding(pixels)
        if self._features and labelled:
            pairs = self._tokenizer.features(pixels, layers=self._layers())
            found["tokens"] = jnp.stack([first for first, _ in pairs], axis=1)  # the last block last
            found["patches"] = _pooled(pairs[-1][1])
        return found

    def _layers(self) -> tuple[int, ...]:
        depth = getattr(self._tokenizer.module, "encoder", (0, max(self._setup.blocks)))[1]
        return tuple(range(-min(depth, max(self._setup.blocks)), 0))

    def embed(self, texts: list[str]) -> np.ndarray:
        """Embeddings of texts, ``(n, E)`` of length 1."""
        # In batches of few sizes, each of which is compiled.
        size = min(_TEXTS, 1 << (len(texts) - 1).bit_length())
        found = []
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            filled = part + [""] * (size - len(part))
            found.append(multihost.gather(self._tokenizer.text_embedding(filled))[: len(part)])
        return np.concatenate(found)


class Read:
    """What was read of the items of one stream, batch by batch."""

    def __init__(self):
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds the rows of a batch, those that count."""
        for key, array in arrays.items():
            self._parts.setdefault(key, []).append(array)

    def __contains__(self, key: str) -> bool:
        return key in self._parts

    def __getitem__(self, key: str) -> np.ndarray:
        return np.concatenate(self._parts[key])

    def labelled(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Features and labels of the items that have a label."""
        labels = self["label"]
        kept = labels >= 0
        return {key: self[key][kept] for key in ("latents", "tokens", "patches") if key in self}, labels[kept]


def score(
    reader: Reader, setup: Setup, test: Read, train: Read | None, augmented: Read | None, mesh: Mesh | None
) -> dict[str, Value]:
    """The numbers of a stream, or what each of them needs.

    Args:
      reader: that has read both.
      setup: how understanding is measured.
      test: the items that are evaluated.
      train: those that classifiers learn from, or ``None``.
      augmented: those that linear ones learn from in their place, or ``None``.
      mesh: devices.
    """
    found: dict[str, Value] = {}
    for metric in reader.metrics:
        learned = augmented if metric == "linear_probe" and augmented is not None else train
        measured = _FUNCTIONS[metric](reader, setup, test, learned, mesh)
        if isinstance(measured, str):
            measured = dict.fromkeys(_KEYS[metric], not_computed(measured))
        found |= measured
    return found


def _zero_shot(reader: Reader, setup: Setup, test: Read, train, mesh) -> dict[str, Value] | str:
    missing = _no_embeddings(test) or ("" if "label" in test else _LABELS)
    if missing:
        return missing
    labels = test["label"]
    kept = labels >= 0
    if not kept.any() or labels.max() >= len(setup.classes):
        return f"the names of all classes: config.understanding.class_names; {len(setup.classes)} are known"
    weights = understanding.class_weights(setup.classes, setup.templates, reader.embed)
    scores = test["embedding"][kept].astype(np.float64) @ weights.T.astype(np.float64)
    found = understanding.accuracies(scores, labels[kept])
    fifth = found[5] if len(setup.classes) > 5 else not_computed(f"more than 5 classes, got {len(setup.classes)}")
    return {"zero_shot_top1": found[1], "zero_shot_top5": fifth}


def _retrieval(reader: Reader, setup: Setup, test: Read, train, mesh) -> dict[str, Value] | str:
    missing = _no_embeddings(test) or ("" if "caption" in test else "captions")
    if missing:
        return missing
    captions = [bytes_as_text(row) for row in test["caption"]]
    kept = np.array([bool(caption) for caption in captions])
    texts = sorted({caption for caption in captions if caption})
    if not texts:
        return "captions"
    numbers = {text: number for number, text in enumerate(texts)}
    pairs = np.array([numbers[caption] for caption in captions if caption], np.int32)
    return understanding.recalls(test["embedding"][kept], reader.embed(texts), pairs, mesh)


def _linear_probe(reader: Reader, setup: Setup, test: Read, train, mesh) -> dict[str, Value] | str:
    def measure(inputs, answers, others, labels, classes):
        return understanding.linear_probe(inputs, answers, others, labels, classes, setup, mesh)

    def best(found: Mapping[Any, Mapping[float, float]]) -> tuple[float, dict[str, Value]]:
        name, rate = max(((n, r) for n in found for r in found[n]), key=lambda pair: found[pair[0]][pair[1]])
        return found[name][rate], {"blocks": name, "learning_rate": rate}

    split = _split_or_reason(test, train)
    if isinstance(split, str):
        return split
    (features, answers), (others, labels), classes = split
    result: dict[str, Value] = {"linear_probe": _no_features()}
    if "tokens" in others:
        found = {}
        for blocks in dict.fromkeys(min(count, features["tokens"].shape[1]) for count in setup.blocks):
            pair = (_concatenated(side, blocks) for side in (features, others))
            first, second = pair
            found[blocks] = measure(first, answers, second, labels, classes)
        result["linear_probe"], result["linear_probe_choice"] = best(found)
    pair = understanding.standardized(features["latents"], others["latents"])
    found = {0: measure(pair[0], answers, pair[1], labels, classes)}
    result["linear_probe_latents"], choice = best(found)
    return result | {"linear_probe_latents_choice": {"learning_rate": choice["learning_rate"]}}


def _knn(reader: Reader, setup: Setup, test: Read, train, mesh) -> dict[str, Value] | str:
    split = _split_or_reason(test, train)
    if isinstance(split, str):
        return split
    (features, answers), (others, labels), classes = split

    def measure(bank, queries):
        how = (setup.neighbours, setup.temperature, mesh)
        votes = understanding.nearest_neighbour_scores(bank, answers, queries, classes, *how)
        return understanding.accuracies(votes, labels, (1,))[1]

    found: dict[str, Value] = {"knn": _no_features()}
    if "tokens" in others:
        found["knn"] = measure(features["tokens"][:, -1], others["tokens"][:, -1])
    return found | {"knn_latents": measure(*understanding.standardized(features["latents"], others["latents"]))}


_FUNCTIONS = {"zero_shot": _zero_shot, "retrieval": _retrieval, "linear_probe": _linear_probe, "knn": _knn}


def _no_embeddings(test: Read) -> str:
    return "" if "embedding" in test else "images, and a model with a text tower (VTP)"


def _no_features() -> str:
    return not_computed("images, and an encoder with features of its own (VTP)")


def _split_or_reason(test: Read, train: Read | None) -> tuple | str:
    """((features, labels) to learn from, (features, labels) to test on, number of classes)."""
    if "label" not in test or not (test["label"] >= 0).any():
        return _LABELS
    if train is None or "label" not in train or not (train["label"] >= 0).any():
        return "labelled data to learn from: config.understanding.training, or a held-out part of the data"
    sides = train.labelled(), test.labelled()
    return *sides, int(max(labels.max() for _, labels in sides)) + 1


def _concatenated(features: Mapping[str, np.ndarray], blocks: int) -> np.ndarray:
    """Class tokens of the last blocks, and the mean patch token of the last one: DINOv2's ``create_linear_input``."""
    tokens = features["tokens"][:, -blocks:]
    return np.concatenate([tokens.reshape(len(tokens), -1), features["patches"]], axis=1)


@platform.jit
def _pooled(x: jax.Array) -> jax.Array:  # (b ... d) -> (b d)
    return x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1]).mean(axis=1)


def texts_as_bytes(texts: Iterable[str], length: int, end: bool = False) -> np.ndarray:
    """Texts as an array ``(n, length)``, so that they are gathered like everything else; the beginning or the end."""
    encoded = [str(text).encode() for text in texts]
    cut = [(text[-length:] if end else text[:length]).ljust(length, b"\0") for text in encoded]
    return np.frombuffer(b"".join(cut), np.uint8).reshape(-1, length)


def bytes_as_text(row: np.ndarray) -> str:
    """The text of a row of `texts_as_bytes`."""
    return row.tobytes().rstrip(b"\0").decode(errors="ignore")
