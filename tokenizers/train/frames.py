"""Which frames of clips are judged one by one, by perceptual losses and discriminators of images."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Clips ``(B, T, H, W, C)`` as they are judged.
View = Callable[[jax.Array], jax.Array]


def all_frames(key: jax.Array, shape: tuple[int, ...]) -> View:
    """Clips as they are."""
    return lambda clips: clips


def one_frame(key: jax.Array, shape: tuple[int, ...]) -> View:
    """One frame of each clip, any of them: ``(B, T, H, W, C) -> (B, 1, H, W, C)``."""
    index = jax.random.randint(key, shape[:1], 0, shape[1])
    return lambda clips: jnp.take_along_axis(clips, index[:, None, None, None, None], axis=1)


# Makes the view for a batch of clips of that shape.
FRAMES: dict[str, Callable[[jax.Array, tuple[int, ...]], View]] = {"all": all_frames, "one": one_frame}
