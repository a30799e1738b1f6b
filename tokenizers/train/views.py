"""Random views of images, made on the device: crops at several sizes, changed colours, and masks of patches.

What DINOv2 does (https://arxiv.org/abs/2304.07193, `data/augmentations.py`, `data/masking.py`), as pure functions of a
key: nothing random happens in the processes that load images, and step k sees the same views wherever it runs.
Images are float ``(B, H, W, 3)`` in [-1, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Crops:
    """Random resized crops, and what happens to their colours.

    Attributes:
      count: crops of each image.
      size: height and width in pixels.
      scale: range of the crop's share of the image's area.
      ratio: range of its width over its height.
      flip: probability of a mirror image.
      jitter: probability that brightness, contrast, saturation and hue change.
      strength: of these four, how much.
      gray: probability of no colour at all.
      blur: probability of a Gaussian blur, for each crop of an image.
      sigma: range of its standard deviation in pixels.
      solarize: probability that the brighter half of the values is inverted, for each crop of an image.
    """

    count: int
    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    gray: float = 0.2
    blur: tuple[float, ...] = (0.5,)
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, ...] = (0.0,)

    def __call__(self, key: Array, images: Array) -> Array:
        """``(B, H, W, 3)`` -> ``(B, count, size, size, 3)``."""
        keys = jax.random.split(key, (images.shape[0], self.count))
        rates = (jnp.resize(jnp.asarray(values, jnp.float32), self.count) for values in (self.blur, self.solarize))
        of_image = jax.vmap(self._view, in_axes=(0, None, 0, 0))
        return jax.vmap(of_image, in_axes=(0, 0, None, None))(keys, images, *rates)

    def _view(self, key: Array, image: Array, blur: Array, solarize: Array) -> Array:
        keys = jax.random.split(key, 6)
        x = crop(keys[0], image, self.size, self.scale, self.ratio)
        x = jnp.where(jax.random.uniform(keys[1]) < self.flip, x[:, ::-1], x)
        x = jnp.clip((x + 1) / 2, 0, 1)
        x = _sometimes(keys[2], self.jitter, x, lambda k, x: jitter(k, x, self.strength))
        x = _sometimes(keys[3], self.gray, x, lambda k, x: jnp.broadcast_to(_luminance(x), x.shape))
        x = _sometimes(keys[4], blur, x, lambda k, x: _blurred(x, jax.random.uniform(k, (), x.dtype, *self.sigma)))
        x = _sometimes(keys[5], solarize, x, lambda k, x: jnp.where(x >= 0.5, 1 - x, x))
        return 2 * x - 1


def _sometimes(key: Array, rate, x: Array, change) -> Array:
    decide, draw = jax.random.split(key)
    return jnp.where(jax.random.uniform(decide) < rate, change(draw, x), x)


def crop(key: Array, image: Array, size: int, scale: Sequence[float], ratio: Sequence[float]) -> Array:
    """A random part of ``(H, W, 3)`` as ``(size, size, 3)``, bicubic and antialiased (``RandomResizedCrop``)."""
    height, width = image.shape[:2]
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(area_key, minval=scale[0], maxval=scale[1])
    shape = jnp.exp(jax.random.uniform(ratio_key, minval=np.log(ratio[0]), maxval=np.log(ratio[1])))
    # What does not fit becomes as large as it can be.
    sides = jnp.minimum(jnp.sqrt(jnp.stack([area / shape, area * shape])), jnp.asarray([height, width]))
    room = jnp.asarray([height, width]) - sides
    start = room * jnp.stack([jax.random.uniform(top_key), jax.random.uniform(left_key)])
    factor = size / sides
    return jax.image.scale_and_translate(
        image, (size, size, image.shape[2]), (0, 1), factor, -start * factor, "cubic", antialias=True
    )


# ------------------------------------------------------------------------------------------------------------- colours


def jitter(key: Array, x: Array, strength: Sequence[float]) -> Array:
    """Brightness, contrast, saturation and hue of values in [0, 1], in that order (``ColorJitter``)."""
    brightness, contrast, saturation, hue = strength
    keys = jax.random.split(key, 4)
    by = [
        1 + amount * jax.random.uniform(k, minval=-1, maxval=1)
        for k, amount in zip(keys, (brightness, contrast, saturation), strict=False)
    ]
    x = jnp.clip(x * by[0], 0, 1)
    x = jnp.clip(by[1] * x + (1 - by[1]) * _luminance(x).mean(), 0, 1)
    x = jnp.clip(by[2] * x + (1 - by[2]) * _luminance(x), 0, 1)
    return shift_hue(x, hue * jax.random.uniform(keys[3], minval=-1, maxval=1))


def shift_hue(x: Array, turns: Array | float) -> Array:
    """Values in [0, 1] whose hue goes that part of a turn further around the circle of colours (HSV)."""
    largest, smallest = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
    span = largest - smallest
    red, green, blue = jnp.split(x, 3, axis=-1)
    safe = jnp.where(span > 0, span, 1)
    sector = jnp.where(
        largest == red,
        (green - blue) / safe,
        jnp.where(largest == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    place = jnp.where(span > 0, sector, 0) / 6 + turns
    # Each colour falls from the value, and rises to it again, once around the circle.
    away = 6 * place + jnp.asarray([5.0, 3.0, 1.0], x.dtype)
    away = jnp.mod(away, 6)
    return largest - span * jnp.clip(jnp.minimum(away, 4 - away), 0, 1)


def _luminance(x: Array) -> Array:
    return (x * jnp.asarray([0.2989, 0.587, 0.114], x.dtype)).sum(-1, keepdims=True)


# DINOv2's kernel of 9 places for crops of 224 pixels.
_BLUR = 9


def _blurred(x: Array, sigma: Array) -> Array:
    half = _BLUR // 2
    kernel = jnp.exp(-0.5 * (jnp.arange(-half, half + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in (0, 1):
        pad = [(0, 0)] * 3
        pad[axis] = (half, half)
        padded = jnp.pad(x, pad, mode="reflect")
        x = sum(
            kernel[i] * jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(_BLUR)
        )  # a sum of shifts: the kernel is another one for every crop
    return x


# --------------------------------------------------------------------------------------------------------------- masks


@dataclasses.dataclass(frozen=True)
class Masks:
    """Blocks of patches that the student does not see (https://arxiv.org/abs/2106.08254, as in DINOv2).

    Crops come in groups, so that the number of masked patches has a bound that depends on the group alone and devices
    choose theirs without the others: of ``group`` crops a random ``share`` is masked, one crop for each of as many
    equal steps from the smallest to the largest ratio.

    Attributes:
      grid: height and width in patches.
      group: crops in a group.
      share: of them that are masked at all.
      ratios: smallest and largest share of a masked crop's patches.
      aspect: smallest height over width of a block; the largest is its inverse.
      smallest: patches in a block, where there is room for them.
      tries: blocks that are thrown; one that would mask too many patches is left out.
    """

    grid: tuple[int, int]
    group: int
    share: float = 0.5
    ratios: tuple[float, float] = (0.1, 0.5)
    aspect: float = 0.3
    smallest: int = 4
    tries: int = 40

    @property
    def most(self) -> int:
        """The largest number of masked patches of a group."""
        patches = self.grid[0] * self.grid[1]
        return sum(int(patches * ratio) for ratio in self._edges[1:])

    @property
    def _edges(self) -> np.ndarray:
        return np.linspace(*self.ratios, int(self.group * self.share) + 1)

    def __call__(self, key: Array, crops: int) -> Array:
        """bool ``(crops, h, w)``."""
        if crops % self.group:
            raise ValueError(f"masks are made for groups of {self.group} crops; got {crops} crops.")
        keys = jax.random.split(key, crops // self.group)
        return jax.vmap(self._group)(keys).reshape(crops, *self.grid)

    def _group(self, key: Array) -> Array:
        order_key, ratio_key, block_key = jax.random.split(key, 3)
        low, high = self._edges[:-1], self._edges[1:]
        ratios = jax.random.uniform(ratio_key, low.shape, minval=jnp.asarray(low), maxval=jnp.asarray(high))
        counts = jnp.floor(self.grid[0] * self.grid[1] * ratios).astype(jnp.int32)
        counts = jnp.concatenate([counts, jnp.zeros(self.group - len(low), jnp.int32)])
        counts = jax.random.permutation(order_key, counts)
        return jax.vmap(self._mask)(jax.random.split(block_key, self.group), counts)

    def _mask(self, key: Array, count: Array) -> Array:
        """``count`` patches: blocks first, single ones where no block fits any more."""
        height, width = self.grid
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)

        def throw(mask, key):
            area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
            room = count - mask.sum()
            more = jnp.maximum(room - self.smallest, 0)
            area = self.smallest + jax.random.uniform(area_key) * more
            shape = jnp.exp(jax.random.uniform(aspect_key, minval=np.log(self.aspect), maxval=-np.log(self.aspect)))
            h = jnp.round(jnp.sqrt(area * shape)).astype(jnp.int32)
            w = jnp.round(jnp.sqrt(area / shape)).astype(jnp.int32)
            top = jnp.floor(jax.random.uniform(top_key) * (height - h + 1)).astype(jnp.int32)
            left = jnp.floor(jax.random.uniform(left_key) * (width - w + 1)).astype(jnp.int32)
            block = (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)
            both = mask | block
            fits = (h < height) & (w < width) & (both.sum() <= count)
            return jnp.where(fits, both, mask), None

        throw_key, fill_key = jax.random.split(key)
        empty = jnp.zeros(self.grid, bool)
        mask, _ = jax.lax.scan(throw, empty, jax.random.split(throw_key, self.tries))
        # What blocks have left: single patches, in random order.
        order = jnp.where(mask, -1.0, jax.random.uniform(fill_key, self.grid)).reshape(-1)
        rank = jnp.argsort(jnp.argsort(order)).reshape(self.grid)
        return rank < count
