"""Agreement of reconstructions of overlapping windows of a video.

It is the VideoConsistencyLoss of nvidia-cosmos/cosmos-predict1 (tokenizer/training/losses/continuous.py).
A clip is cut into windows that overlap, which the tokenizer sees as a batch; where two neighbours show the same frames,
their reconstructions and latents should be the same. Other losses see the average of the windows::

    windows = to_windows(clip, frames=9, step=4)                       # (B * n, 9, H, W, 3)
    reconstructions, encoding = model(windows)
    clip_again = from_windows(reconstructions, n, step=4)              # for L1, perceptual, ...
    loss = disagreement(reconstructions, n, shift=4)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def to_windows(clip: Array, frames: int, step: int) -> Array:
    """``(B, frames + (n - 1) * step, ...)`` -> ``(B * n, frames, ...)``, the windows of an item side by side."""
    total = clip.shape[1]
    if not 0 < step <= frames <= total or (total - frames) % step:
        raise ValueError(f"{total} frames are no windows of {frames} frames at steps of {step}.")
    parts = [clip[:, start : start + frames] for start in range(0, total - frames + 1, step)]
    return jnp.stack(parts, axis=1).reshape(-1, frames, *clip.shape[2:])


def from_windows(windows: Array, count: int, step: int) -> Array:
    """The inverse of `to_windows`, ``count`` windows per item; frames that several of them show are averaged."""
    windows = _items(windows, count)
    frames = windows.shape[2]
    total = frames + (count - 1) * step
    shape = (windows.shape[0], total, *windows.shape[3:])
    clip, times = jnp.zeros(shape, windows.dtype), [0] * total
    for i in range(count):
        clip = clip.at[:, i * step : i * step + frames].add(windows[:, i])
        times = [n + (i * step <= t < i * step + frames) for t, n in enumerate(times)]
    return clip / jnp.asarray(times, windows.dtype).reshape(-1, *(1,) * (len(shape) - 2))


def disagreement(windows: Array, count: int, shift: int) -> Array:
    """Mean absolute difference of what neighbouring windows show of the same frames, float32 scalar.

    Args:
      windows: pixels or latents ``(B * count, frames, ...)``.
      count: windows per item.
      shift: frames between the starts of two neighbours. For latents it is the step divided (rounding down) by the
        frames per latent frame, itself ``frames // latent frames``.
    """
    items = _items(windows, count).astype(jnp.float32)
    if not (count > 1 and 0 < shift < items.shape[2]):
        raise ValueError(f"{count} windows of {items.shape[2]} frames, {shift} apart, have nothing in common.")
    return jnp.abs(items[:, :-1, shift:] - items[:, 1:, :-shift]).mean()


def latent_scale(pixels: tuple[int, ...], latents: tuple[int, ...]) -> float:
    """What `disagreement` of latents counts next to that of pixels: how many values of a window there are for each.

    Args:
      pixels: shape of the windows ``(N, frames, H, W, 3)``.
      latents: of their latents ``(N, t, h, w, C)``.
    """
    time, height, width = (p // q for p, q in zip(pixels[1:4], latents[1:4], strict=True))
    return pixels[-1] * time * height * width / latents[-1]


def _items(windows: Array, count: int) -> Array:
    if windows.shape[0] % count:
        raise ValueError(f"{windows.shape[0]} windows are no multiple of {count} per item.")
    return windows.reshape(-1, count, *windows.shape[1:])
