"""Pictures from noise: item ``i`` depends on the seed and ``i`` alone, whatever the batch size and the devices."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ..data.latents import Statistics
from ..generators import flow
from ..generators.generator import VELOCITY, Generator
from ..parallel import mesh as meshes
from ..parallel import platform
from ..types import Array
from .latents import Coder


def labels_of(numbers: np.ndarray, classes: int) -> np.ndarray:
    """Every class as often as any other: item ``i`` is of class ``i mod classes``; without classes, of none (0)."""
    return (numbers % classes if classes else np.zeros_like(numbers)).astype(np.int32)


@functools.partial(platform.jit, static_argnums=(0,))
def noise_of(shape: tuple[int, ...], key, numbers: Array) -> Array:
    """Standard normal ``(B, *shape)``; the same numbers for every tokenizer whose latents have that shape."""
    return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), shape))(numbers)


def samples(
    generator: Generator,
    coder: Coder,
    statistics: Statistics,
    *,
    count: int,
    classes: int,
    batch_size: int,
    mesh: jax.sharding.Mesh | None = None,
    seed: int = 0,
    points: int = 250,
    shift: float = 0.0,
    sampler: str = "euler",
    guidance: float = 1.0,
    guidance_start: float | None = None,
    guided_channels: int | None = None,
    matching: flow.Flow = VELOCITY,
) -> Iterator[tuple[Array, np.ndarray, np.ndarray]]:
    """Batches of decoded samples, the last one filled up.

    Args:
      generator, coder: over ``mesh``, where there is one.
      statistics: of the latents that the generator was trained on.
      count: samples in all.
      classes: of the labels; 0 is a generator without.
      batch_size: of all processes together.
      mesh: devices.
      seed: of the noise.
      points, shift, sampler, guidance, guidance_start, guided_channels: see `Generator.sample`.
      matching: what the generator predicts.

    Yields:
      ``(pictures uint8 (B, H, W, 3) on the devices, numbers (B,), labels (B,))``; those from ``count`` on are filling.
    """
    context = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    key = jax.random.key(seed)
    with context:
        for first in range(0, count, batch_size):
            numbers = np.arange(first, first + batch_size)
            labels = labels_of(numbers, classes)
            latents = generator.sample(
                None,
                placed(mesh, labels),
                noise=noise_of(generator.latent_shape, key, placed(mesh, numbers.astype(np.uint32))),
                points=points,
                shift=shift,
                sampler=sampler,
                guidance=guidance,
                guidance_start=guidance_start,
                guided_channels=guided_channels,
                matching=matching,
            )
            restored = statistics.restore(latents)
            if coder.snaps:
                restored = jnp.clip(restored, statistics.low, statistics.high)
            yield coder.decode(restored), numbers, labels


def placed(mesh, values: np.ndarray) -> Array:
    """The rows of this process, of values that every process has whole."""
    if mesh is None:
        return jnp.asarray(values)
    index, count = meshes.batch_share(mesh)
    return meshes.global_batch(mesh, values[index * len(values) // count : (index + 1) * len(values) // count])
