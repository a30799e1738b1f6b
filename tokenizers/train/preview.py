"""How good the EMA weights are on held-out input, while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from .. import pixels as pixel_values
from ..data.pipeline import Pipeline
from ..parallel import mesh as meshes
from .state import TrainState
from .step import Recipe


class HeldOut:
    """Scores a state on the first ``config.evaluation.items`` held-out items of each stream; the same ones each time.

    Args:
      config: the run's config.
      recipe: of the run.
      mesh: devices.
    """

    def __init__(self, config: Mapping, recipe: Recipe, mesh):
        self._data = Pipeline(
            config["data"],
            seed=config["seed"],
            split="held_out",
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self._mesh, self._limit = mesh, config["evaluation"]["items"]
        self._batches: list[dict] | None = None

        def reconstruct(params, model_state, pixels):
            target = pixel_values.to_float(pixels)
            prediction, _ = recipe.model.apply({"params": params, **model_state}, target)
            levels = pixel_values.to_uint8(prediction)
            # PSNR of 8-bit pictures, item by item: what a person who saves them gets.
            error = (levels.astype(np.float32) - pixel_values.to_uint8(target).astype(np.float32)) ** 2
            error = error.mean(axis=tuple(range(1, error.ndim)))
            return levels, 10 * jax.numpy.log10(255.0**2 / jax.numpy.maximum(error, 1e-3))

        self._reconstruct = jax.jit(reconstruct, out_shardings=meshes.replicated(mesh))

    def __call__(self, state: TrainState) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(scores, pictures by name, clips by name): ``held_out/psnr`` is the mean over streams.

        Pictures are uint8 ``(H, W, 3)`` with input above reconstruction; clips uint8 ``(T, H, W, 3)`` likewise.
        """
        scores: dict[str, list[float]] = {}
        pictures, clips = {}, {}
        for batch in self._items():
            pixels = meshes.global_batch(self._mesh, batch["pixels"])
            levels, psnr = jax.device_get(self._reconstruct(state.ema, state.model_state, pixels))
            name, valid = batch["stream"], batch["valid"]
            scores.setdefault(name, []).extend(float(value) for value in psnr[valid])
            if name not in pictures:
                shown = np.concatenate([batch["shown"][:6], levels[:6]], axis=2)  # (N, T, 2 H, W, 3)
                pictures[name] = np.concatenate(list(shown[:, 0]), axis=1)
                if shown.shape[1] > 1:
                    clips[name] = np.concatenate(list(shown), axis=2)
        means = {f"held_out/{name}_psnr": float(np.mean(values)) for name, values in scores.items()}
        return {"held_out/psnr": float(np.mean(list(means.values()))), **means}, pictures, clips

    def _items(self) -> list[dict]:
        if self._batches is not None:
            return self._batches
        kept, seen = [], {}
        with self._data.batches() as batches:
            for batch in batches:
                count = seen.get(batch["stream"], 0)
                if count >= self._limit:
                    continue
                pixels = np.ascontiguousarray(batch["pixels"])
                # Every process scores every item of the global batch, whoever has loaded it.
                whole, valid = _gathered(pixels), _gathered(np.asarray(batch["valid"]))
                seen[batch["stream"]] = count + int(valid.sum())
                kept.append({"pixels": pixels, "stream": batch["stream"], "valid": valid, "shown": whole})
        self._batches = kept
        return kept


def _gathered(local: np.ndarray) -> np.ndarray:
    if jax.process_count() == 1:
        return local
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(local, tiled=True))
