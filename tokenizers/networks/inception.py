"""The Inception network of the Frechet inception distance, https://arxiv.org/abs/1512.00567, and its input pipelines.

It is torchvision's Inception v3 with the weights of TensorFlow's 2015 graph: average pools do not count the padding,
the last block pools with max, 1008 classes (as in toshas/torch-fidelity and mseitzer/pytorch-fid). The published
distances of different tools differ mostly in how an image gets to 299 x 299: `preprocess_tensorflow`,
`preprocess_pytorch`, `preprocess_clean`.
"""

from __future__ import annotations

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ..convert.engine import to_tree
from ..convert.files import read_state_dict
from ..convert.inception import IGNORE, TABLE, torchvision_names
from ..errors import pick
from ..nn.conv import Conv2d
from . import weights

Array = jax.Array

SIZE = 299
CLASSES = 1008


class ConvBlock(nn.Module):
    """Convolution without bias, frozen batch normalization, ReLU."""

    features: int
    kernel_size: int | tuple[int, int] = 1
    strides: int = 1
    padding: int | tuple[int, int] = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b h w c) -> (b h' w' features)
        x = Conv2d(self.features, self.kernel_size, self.strides, self.padding, use_bias=False, name="conv")(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def _max_pool(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def _average_pool(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _same_max_pool(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


class Mixed(nn.Module):
    """Parallel branches, concatenated: (b h w c) -> (b h' w' c').

    Attributes:
      kind: ``A`` and ``E`` keep the size with 3x3 / 5x5 branches, ``C`` with 1x7 and 7x1, ``B`` and ``D`` halve it.
      width: of the pooled branch for ``A``, of the 7-wide ones for ``C``.
      max_pool: the pooled branch of ``E`` takes the maximum (the last block's does).
    """

    kind: str
    width: int = 0
    max_pool: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branches = pick("Inception block", self.kind, {kind: getattr(self, f"_{kind.lower()}") for kind in "ABCDE"})
        return jnp.concatenate(branches(x), axis=-1)

    def _chain(self, x: Array, name: str, *layers: tuple) -> Array:
        """Convolutions one after another, named like torchvision's: name_1, name_2, ..."""
        for i, layer in enumerate(layers, start=1):
            x = ConvBlock(*layer, name=f"{name}_{i}")(x)
        return x

    def _a(self, x):
        return [
            ConvBlock(64, name="branch1x1")(x),
            self._chain(x, "branch5x5", (48,), (64, 5, 1, 2)),
            self._chain(x, "branch3x3dbl", (64,), (96, 3, 1, 1), (96, 3, 1, 1)),
            ConvBlock(self.width, name="branch_pool")(_average_pool(x)),
        ]

    def _b(self, x):
        return [
            ConvBlock(384, 3, 2, name="branch3x3")(x),
            self._chain(x, "branch3x3dbl", (64,), (96, 3, 1, 1), (96, 3, 2)),
            _max_pool(x),
        ]

    def _c(self, x):
        w = self.width
        wide, tall = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        return [
            ConvBlock(192, name="branch1x1")(x),
            self._chain(x, "branch7x7", (w,), (w, *wide), (192, *tall)),
            self._chain(x, "branch7x7dbl", (w,), (w, *tall), (w, *wide), (w, *tall), (192, *wide)),
            ConvBlock(192, name="branch_pool")(_average_pool(x)),
        ]

    def _d(self, x):
        return [
            self._chain(x, "branch3x3", (192,), (320, 3, 2)),
            self._chain(x, "branch7x7x3", (192,), (192, (1, 7), 1, (0, 3)), (192, (7, 1), 1, (3, 0)), (192, 3, 2)),
            _max_pool(x),
        ]

    def _e(self, x):
        three = ConvBlock(384, name="branch3x3_1")(x)
        double = self._chain(x, "branch3x3dbl", (448,), (384, 3, 1, 1))
        pooled = _same_max_pool(x) if self.max_pool else _average_pool(x)
        wide, tall = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        return [
            ConvBlock(320, name="branch1x1")(x),
            ConvBlock(384, *wide, name="branch3x3_2a")(three),
            ConvBlock(384, *tall, name="branch3x3_2b")(three),
            ConvBlock(384, *wide, name="branch3x3dbl_3a")(double),
            ConvBlock(384, *tall, name="branch3x3dbl_3b")(double),
            ConvBlock(192, name="branch_pool")(pooled),
        ]


# Name and fields of `Mixed`, in order.
_BODY = (
    ("Mixed_5b", "A", 32), ("Mixed_5c", "A", 64), ("Mixed_5d", "A", 64),
    ("Mixed_6a", "B"), ("Mixed_6b", "C", 128), ("Mixed_6c", "C", 160), ("Mixed_6d", "C", 160), ("Mixed_6e", "C", 192),
    ("Mixed_7a", "D"), ("Mixed_7b", "E"), ("Mixed_7c", "E", 0, True),
)  # fmt: skip


class InceptionV3(nn.Module):
    """Features of images for FID, KID and the Inception score.

    Returns spatial means ``64``, ``192`` (after the stem's pools), ``768`` (Mixed_6e), ``2048`` (the FID features) and
    the ``logits`` and ``logits_unbiased`` (without the last bias, for the Inception score) of 1008 classes, all (B, n)
    float32. What is not used is not computed under jit. Float32 whatever the device's default precision.
    """

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        # x: (b 299 299 3), from one of the preprocess functions, about [-1, 1]
        with jax.default_matmul_precision("float32"):
            return self._features(jnp.asarray(x, jnp.float32))

    def _features(self, x: Array) -> dict[str, Array]:
        taps = {}
        x = ConvBlock(32, 3, 2, name="Conv2d_1a_3x3")(x)
        x = ConvBlock(32, 3, name="Conv2d_2a_3x3")(x)
        x = _max_pool(ConvBlock(64, 3, 1, 1, name="Conv2d_2b_3x3")(x))
        taps["64"] = x
        x = ConvBlock(80, name="Conv2d_3b_1x1")(x)
        x = _max_pool(ConvBlock(192, 3, name="Conv2d_4a_3x3")(x))
        taps["192"] = x
        for name, *fields in _BODY:
            x = Mixed(*fields, name=name)(x)
            if name == "Mixed_6e":
                taps["768"] = x
        taps["2048"] = x
        features = {name: tap.mean((1, 2)) for name, tap in taps.items()}
        kernel = self.param("logits_kernel", nn.initializers.lecun_normal(), (2048, CLASSES), jnp.float32)
        bias = self.param("logits_bias", nn.initializers.zeros, (CLASSES,), jnp.float32)
        unbiased = features["2048"] @ kernel
        return features | {"logits_unbiased": unbiased, "logits": unbiased + bias}


# --- from images to network input -------------------------------------------------------------------------------------


def preprocess_tensorflow(images: Array) -> Array:
    """TensorFlow's own pipeline (torch-fidelity, clean-fid's ``legacy_tensorflow``): TF1 bilinear, ``(x - 128) / 128``.

    images: (B, H, W, 3), uint8 or float in [0, 255] -> (B, 299, 299, 3) float32.
    """
    return (resize_tensorflow(jnp.asarray(images, jnp.float32), (SIZE, SIZE)) - 128) / 128


def preprocess_pytorch(images: Array) -> Array:
    """pytorch-fid's pipeline (``legacy_pytorch`` of clean-fid): half-pixel bilinear on [0, 1], then ``2 x - 1``.

    images: (B, H, W, 3), float in [0, 1], or uint8 -> (B, 299, 299, 3) float32.
    """
    images = jnp.asarray(images)
    images = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images.astype(jnp.float32)
    return 2 * resize_half_pixel(images, (SIZE, SIZE)) - 1


def preprocess_clean(images: np.ndarray) -> np.ndarray:
    """clean-fid's ``clean`` pipeline: Pillow's antialiased bicubic, clipped and not rounded, ``(x - 128) / 128``.

    images: (B, H, W, 3), uint8 or float in [0, 255], in host memory -> (B, 299, 299, 3) float32.
    """
    return (resize_pillow(images, (SIZE, SIZE)) - 128) / 128


def resize_tensorflow(images: Array, size: tuple[int, int]) -> Array:
    """TensorFlow 1's bilinear resizing: output pixel ``i`` reads at ``i * in / out``, no shift, no antialiasing.

    images: (B, H, W, C) float -> (B, *size, C).
    """
    for axis, new in zip((1, 2), size, strict=True):
        old = images.shape[axis]
        place = np.arange(new, dtype=np.float32) * np.float32(old / new)
        low = np.minimum(np.floor(place).astype(np.int32), old - 1)
        high = np.minimum(low + 1, old - 1)
        shape = [1] * images.ndim
        shape[axis] = new
        fraction = (place - low).reshape(shape)
        below, above = jnp.take(images, low, axis), jnp.take(images, high, axis)
        images = below + (above - below) * fraction
    return images


def resize_half_pixel(images: Array, size: tuple[int, int]) -> Array:
    """Bilinear resizing with half-pixel centres and no antialiasing (PyTorch's ``align_corners=False``).

    images: (..., H, W, C) float -> (..., *size, C).
    """
    return jax.image.resize(images, (*images.shape[:-3], *size, images.shape[-1]), "bilinear", antialias=False)


_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


def resize_pillow(images: np.ndarray, size: tuple[int, int], filter: str = "bicubic") -> np.ndarray:
    """Pillow's antialiased resizing of every channel in float, clipped to [0, 255], not rounded.

    images: (B, H, W, C), uint8 or float in [0, 255] -> (B, *size, C) float32; ``size`` is (height, width).
    """
    method = pick("resizing filter", filter, _FILTERS)
    images = np.asarray(images, np.float32)
    out = np.empty((images.shape[0], *size, images.shape[-1]), np.float32)
    for i in range(images.shape[0]):
        for c in range(images.shape[-1]):
            channel = Image.fromarray(np.ascontiguousarray(images[i, ..., c]))
            out[i, ..., c] = np.asarray(channel.resize(size[::-1], method))
    return np.clip(out, 0, 255)


def load(path: str | pathlib.Path | None = None) -> tuple[InceptionV3, dict]:
    """The network with its published weights, as ``(module, variables)``; ``None`` looks in ``$TOKENIZERS_WEIGHTS``."""
    module = InceptionV3()
    target = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32))
    state = torchvision_names(read_state_dict(weights.find("inception_fid", path)))
    return module, to_tree(TABLE, target, state, ignore=IGNORE)
