"""How good the EMA weights are on held-out input, while training goes on."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .. import pixels as pixel_values
from ..data.pipeline import Pipeline
from ..parallel import mesh as meshes
from ..parallel import platform
from .autoencoder import apply_to_clips
from .state import TrainState
from .step import Trainable


def has_held_out(data: Mapping) -> bool:
    """Whether a data config says what is held out; the embedded photographs have a split of their own."""
    streams = list(data["streams"].values())
    own = any(stream.get("held_out") for stream in streams)
    return bool(data["held_out"]) or own or not (data["path"] or any(stream.get("path") for stream in streams))


class HeldOut:
    """Scores a state on the first ``config.evaluation.max_items`` held-out items of each stream, always the same.

    Args:
      config: the run's config.
      recipe: of the run.
      mesh: devices.
    """

    def __init__(self, config: Mapping, recipe: Trainable, mesh):
        index, count = meshes.batch_share(mesh)
        self._data = Pipeline(
            config["data"], seed=config["seed"], split="held_out", process_index=index, process_count=count
        )
        self._mesh, self._limit = mesh, config["evaluation"]["max_items"]
        self._batches: list[tuple[str, dict[str, jax.Array], jax.Array]] | None = None

        self._recipe, networks = recipe, {name: recipe.networks[name] for name in recipe.reads}
        self._networks = jax.device_put(networks, meshes.replicated(mesh))

        def reconstruct(params, model_state, networks, inputs, valid):
            pixels = inputs["pixels"]
            prediction, _ = apply_to_clips(
                recipe.model,
                {"params": params, **model_state},
                pixel_values.to_float(pixels),
                **recipe.text(networks, inputs),
            )
            levels = pixel_values.to_uint8(prediction)
            # PSNR of 8-bit pictures, item by item: what a person who saves them gets.
            error = (levels.astype(jnp.float32) - pixels.astype(jnp.float32)) ** 2
            error = error.mean(axis=tuple(range(1, error.ndim)))
            return levels, pixels, valid, 10 * jnp.log10(255.0**2 / jnp.maximum(error, 1e-3))

        # Every process scores every item of the global batch, whoever has loaded it.
        self._reconstruct = platform.jit(reconstruct, out_shardings=meshes.replicated(mesh))

    def __call__(
        self, state: TrainState
    ) -> tuple[float, dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(score, scores, pictures by name, clips by name); the score is the PSNR, mean over streams.

        Pictures are uint8 ``(H, W, 3)`` with input above reconstruction; clips uint8 ``(T, H, W, 3)`` likewise.
        """
        scores: dict[str, list[float]] = {}
        pictures, clips = {}, {}
        for name, inputs, valid in self._items():
            found = self._reconstruct(state.ema, state.model_state, self._networks, inputs, valid)
            levels, shown, valid, psnr = jax.device_get(found)
            room = self._limit - len(scores.setdefault(name, []))
            scores[name].extend(float(value) for value in psnr[valid][:room])
            if name not in pictures:
                both = np.concatenate([shown[:6], levels[:6]], axis=2)  # (N, T, 2 H, W, 3)
                pictures[name] = np.concatenate(list(both[:, 0]), axis=1)
                if both.shape[1] > 1:
                    clips[name] = np.concatenate(list(both), axis=2)
        means = {f"held_out/{name}_psnr": float(np.mean(values)) for name, values in scores.items() if values}
        score = float(np.mean(list(means.values())))
        return score, {"held_out/psnr": score, **means}, pictures, clips

    def _items(self) -> list[tuple[str, dict[str, jax.Array], jax.Array]]:
        """(stream, inputs, whether each row counts) of the batches that hold the first items of each stream."""
        if self._batches is None:
            taken: dict[str, int] = {}
            self._batches = []
            with self._data.batches() as batches:
                for batch in batches:
                    name, rows = batch["stream"], batch["pixels"].shape[0] * meshes.batch_share(self._mesh)[1]
                    if taken.get(name, 0) >= self._limit:
                        continue
                    taken[name] = taken.get(name, 0) + rows
                    arrays = (self._recipe.shown(batch), np.asarray(batch["valid"]))
                    place = functools.partial(meshes.global_batch, self._mesh)
                    self._batches.append((name, *jax.tree.map(place, arrays)))
        return self._batches
