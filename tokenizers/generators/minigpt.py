"""The autoregressive prior of VQGAN (https://arxiv.org/abs/2012.09841, section 3.2): a GPT over a tokenizer's indices.

A decoder-only transformer (https://github.com/karpathy/minGPT) that guesses every index of a picture from those before
it, in raster or another order, behind a condition: the number of a class, a start token, or tokens of another picture.
Released code: CompVis/taming-transformers `modules/transformer/mingpt.py`, `models/cond_transformer.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import pick
from ..nn.attention import Attention, attend
from ..nn.blocks import MLP
from ..nn.norm import LayerNorm
from ..parallel import platform
from ..parallel.constrain import constrain
from ..types import Array, Variant

SYSTEM = "ar_prior"

_SMALL = nn.initializers.normal(0.02)

# Keys and values of all layers, ``(depth, B, block, heads, head_dim)`` each.
Cache = tuple[Array, Array]


# ------------------------------------------------------------------------------------------------------------- orders


def _interleaved(height: int, width: int, coarse_last: bool) -> np.ndarray:
    """Positions sorted by the bits of row and column in turn."""
    rows, columns = np.divmod(np.arange(height * width), width)
    bits = max(height, width).bit_length()
    key = np.zeros(height * width, np.int64)
    for bit in range(bits):
        place = bits - 1 - bit if coarse_last else bit
        key |= ((rows >> bit & 1) * 2 + (columns >> bit & 1)) << 2 * place
    return np.argsort(key, kind="stable")


def _inwards(height: int, width: int) -> np.ndarray:
    """From the last position up along the border, then left, down, right, and so on to the middle."""
    free = np.ones((height + 2, width + 2), bool)  # a frame of walls
    free[0], free[-1], free[:, 0], free[:, -1] = False, False, False, False
    place, turn, found = (height, width), 0, []
    steps = ((-1, 0), (0, -1), (1, 0), (0, 1))
    for _ in range(height * width):
        free[place] = False
        found.append((place[0] - 1) * width + place[1] - 1)
        for turned in (turn, (turn + 1) % 4):
            ahead = (place[0] + steps[turned][0], place[1] + steps[turned][1])
            if free[ahead]:
                place, turn = ahead, turned
                break
    return np.array(found)


def _there_and_back(height: int, width: int) -> np.ndarray:
    order = np.arange(height * width).reshape(height, width)
    order[1::2] = order[1::2, ::-1]
    return order.reshape(-1)


# ``(height, width) -> (height * width)``: the position in raster order of every token of a sequence.
ORDERS: Mapping[str, Callable[[int, int], np.ndarray]] = {
    "raster": lambda height, width: np.arange(height * width),
    "subsample": lambda height, width: _interleaved(height, width, coarse_last=True),  # every second one, then others
    "z_curve": lambda height, width: _interleaved(height, width, coarse_last=False),
    "spiral_out": lambda height, width: _inwards(height, width)[::-1],
    "spiral_in": _inwards,
    "random": lambda height, width: np.random.RandomState(1).permutation(height * width),
    "alternate": _there_and_back,
}


# --------------------------------------------------------------------------------------------------------- transformer


class CachedAttention(Attention):
    """Attention of new tokens to those before them, whose keys and values are remembered."""

    @nn.compact
    def __call__(self, x: Array, cache: tuple[Array, Array] | None, seen: Seen) -> tuple[Array, Any]:  # (b n c)
        query, key, value = self.project(x)
        if cache is not None:
            key, value = cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), seen.place, axis=1)
                for old, new in zip(cache, (key, value), strict=True)
            )
        mask = seen.mask(x.shape[1], key.shape[1])
        y = attend(query, key, value, mask=mask, is_causal=mask is None, implementation=self.implementation)
        return self.merge(y, x.shape[-1]), cache


@dataclasses.dataclass(frozen=True)
class Seen:
    """Which tokens a token sees: those before it, itself, and all of the first ``unmasked`` ones if it is of them."""

    place: Any = 0  # of the first new token
    unmasked: int = 0

    def mask(self, queries: int, keys: int) -> Array | None:  # -> (queries keys); None: causal
        if queries == keys and not self.unmasked:
            return None
        query, key = self.place + jnp.arange(queries)[:, None], jnp.arange(keys)
        return (key <= query) | ((query < self.unmasked) & (key < self.unmasked))


class Layer(nn.Module):
    """``x += attention(norm1(x))``, ``x += mlp(norm2(x))``."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, cache: tuple[Array, Array] | None, seen: Seen) -> tuple[Array, Any]:  # (b n c)
        norm = functools.partial(LayerNorm, epsilon=1e-5, dtype=self.dtype)
        attention = CachedAttention(self.heads, dtype=self.dtype, name="attention")
        y, cache = attention(norm(name="norm1")(x), cache, seen)
        x = x + y
        x = x + MLP(4 * x.shape[-1], dtype=self.dtype, name="mlp")(norm(name="norm2")(x))
        return constrain(x, "batch", None, None), cache


class Model(nn.Module):
    """Logits of the next token.

    Attributes:
      vocabulary: number of tokens. Conditions share it: class 7 is token 7.
      block: longest sequence, condition included; the last token of a picture never enters.
      size: depth, width, heads.
      unmasked: so many first tokens see each other, whatever their order.
      grid: height and width of a picture's tokens, for sampling; ``None`` leaves sequences as they are.
      order: of them in a sequence, one of `ORDERS`.
      classes: labels, each its own condition; 0 is none.
      start: the condition where there are no classes; ``None``: tokens of something else are the condition.
      keep: share of a picture's tokens that enter as they are in training; the others are drawn (``pkeep``).
      remat: recompute layers in the backward pass instead of keeping their activations.
      dtype: compute dtype; parameters, norms' statistics, softmax and logits are float32.
    """

    vocabulary: int = 16384
    block: int = 256
    size: tuple[int, int, int] = (48, 1536, 24)
    unmasked: int = 0
    grid: tuple[int, int] | None = None
    order: str = "raster"
    classes: int = 0
    start: int | None = 0
    keep: float = 1.0
    remat: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self):
        pick("order of tokens", self.order, ORDERS)
        if self.order != "raster" and self.grid is None:
            raise ValueError(f"order={self.order!r} needs a grid of tokens.")
        super().__post_init__()

    def __call__(self, tokens: Array, prefix: Array | None = None) -> Array:
        """``(B, N)``, vectors in front of them ``(B, P, width)`` -> float32 logits ``(B, P + N, vocabulary)``."""
        return self.extend(tokens, None, prefix=prefix)[0]

    @nn.compact
    def extend(
        self, tokens: Array, cache: Cache | None, place: Array | int = 0, prefix: Array | None = None
    ) -> tuple[Array, Cache | None]:
        """Logits of tokens ``(B, N)`` that stand at ``place`` behind the remembered ones, and the memory with them.

        ``cache`` begins as `empty_cache`; ``None`` remembers nothing.
        """
        depth, width, heads = self.size
        x = nn.Embed(self.vocabulary, width, embedding_init=_SMALL, dtype=self.dtype, name="token")(tokens)
        x = x if prefix is None else jnp.concatenate([prefix.astype(x.dtype), x], axis=1)
        if x.shape[1] > self.block:
            raise ValueError(f"a sequence has at most {self.block} tokens, got {x.shape[1]}.")
        positions = self.param("positions", nn.initializers.zeros, (self.block, width), jnp.float32)
        x = x + jax.lax.dynamic_slice_in_dim(positions, place, x.shape[1]).astype(x.dtype)
        seen = Seen(place, self.unmasked)

        def step(layer: Layer, x: Array, cache: Any) -> tuple[Array, Any]:
            return layer(x, cache, seen)

        step = nn.remat(step, prevent_cse=False) if self.remat else step  # a scan keeps the two passes apart
        run = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)
        x, cache = run(Layer(heads, self.dtype, name="layers"), constrain(x, "batch", None, None), cache)
        x = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_out")(x)
        logits = nn.Dense(self.vocabulary, use_bias=False, kernel_init=_SMALL, dtype=self.dtype, name="logits")(x)
        return logits.astype(jnp.float32), cache

    def empty_cache(self, batch: int) -> Cache:
        """Room for a whole sequence."""
        depth, width, heads = self.size
        shape = (depth, batch, self.block, heads, width // heads)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

    def example(self) -> tuple[Array, ...]:
        """Inputs to initialize it with."""
        return (jnp.zeros((1, 1), jnp.int32),)


# ------------------------------------------------------------------------------------------------------------ training


def corrupted(key: Array, tokens: Array, keep: float, vocabulary: int) -> Array:
    """Tokens ``(B, N)`` of which a share ``keep`` stays; the others are any of the vocabulary."""
    kept, drawn = jax.random.split(key)
    stays = jax.random.bernoulli(kept, keep, tokens.shape)
    return jnp.where(stays, tokens, jax.random.randint(drawn, tokens.shape, 0, vocabulary))


def loss(
    module: Model, variables: Mapping[str, Any], condition: Array, tokens: Array, key: Array | None = None
) -> tuple[Array, Array]:
    """Mean cross entropy of a picture's tokens ``(B, N)`` behind their condition ``(B, M)``, and the logits.

    With a ``key``, the share ``1 - module.keep`` of the tokens enters as others; what is to be guessed stays clean.
    """
    seen = tokens if key is None or module.keep == 1.0 else corrupted(key, tokens, module.keep, module.vocabulary)
    sequence = jnp.concatenate([condition, seen], axis=1)[:, :-1]
    logits = module.apply(variables, sequence)[:, condition.shape[1] - 1 :]
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    return -jnp.mean(found), logits


# ------------------------------------------------------------------------------------------------------------ sampling


def filtered(logits: Array, top_k: int | None = None, top_p: float | None = None) -> Array:
    """Logits ``(..., K)`` with minus infinity for all but the likely ones.

    Kept are those not below the k-th largest, and of these (https://arxiv.org/abs/1904.09751) the most likely ones
    until their probabilities add up to more than ``top_p``; the one that exceeds it is kept, too.
    """
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None and top_p < 1.0:
        order = jnp.argsort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(share, axis=-1) - share  # of those that are more likely
        out = jnp.take_along_axis(before > top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(out, -jnp.inf, logits)
    return logits


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a token is chosen from logits.

    Attributes:
      temperature: the logits are divided by it.
      top_k, top_p: see `filtered`.
      greedy: the most likely one.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False

    def __call__(self, logits: Array, noise: Array) -> Array:  # (b k), Gumbel noise (b k) -> (b)
        logits = logits / self.temperature
        if not self.greedy:
            logits = filtered(logits, self.top_k, self.top_p) + noise
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.lru_cache(maxsize=16)
def _sampler(module: Model, choice: Choice, given_noise: bool):
    def noise_of(x: Array, shape: tuple[int, ...]) -> Array:
        return x if given_noise else jax.random.gumbel(x, shape, jnp.float32)

    @platform.jit
    def run(variables, begin: Array, draws: Array) -> Array:
        """Tokens behind ``begin`` ``(B, M)``, one per key or noise ``(B, K)`` of ``draws``."""
        extend = functools.partial(module.apply, variables, method="extend")
        logits, cache = extend(begin, module.empty_cache(begin.shape[0]))
        shape = logits[:, -1].shape

        def step(state, inputs):
            logits, cache = state
            draw, place = inputs
            token = choice(logits, noise_of(draw, shape))
            logits, cache = extend(token[:, None], cache, place)
            return (logits[:, -1], cache), token

        places = begin.shape[1] + jnp.arange(draws.shape[0] - 1)
        (logits, _), tokens = jax.lax.scan(step, (logits[:, -1], cache), (draws[:-1], places))
        last = choice(logits, noise_of(draws[-1], shape))
        return jnp.concatenate([tokens.T, last[:, None]], axis=1)

    return run


@dataclasses.dataclass(frozen=True)
class Generator:
    """Module, variables and name of a network that makes tokens, one after the other."""

    module: Model
    variables: Mapping[str, Any]
    name: str

    def condition(self, labels: Any = None, batch: int | None = None) -> Array:
        """The tokens ``(B, 1)`` in front: those of classes ``(B,)``, or ``batch`` start tokens."""
        if self.module.classes:
            labels = jnp.asarray([] if labels is None else labels, jnp.int32)
            if labels.ndim != 1 or not labels.size or labels.min() < 0 or labels.max() >= self.module.classes:
                raise ValueError(f"labels must be (B,) integers from 0 to {self.module.classes - 1}; got {labels}.")
            return labels[:, None]
        if labels is not None or self.module.start is None or batch is None:
            needed = "tokens as its condition" if self.module.start is None else "the number of pictures as batch"
            raise ValueError(f"this generator knows no classes; it needs {needed}, and no labels.")
        return jnp.full((batch, 1), self.module.start, jnp.int32)

    def to_sequence(self, indices: Any) -> Array:
        """Indices of pictures ``(B, h, w)`` in the order of sequences: ``(B, h w)``."""
        return jnp.asarray(indices).reshape(len(indices), -1)[:, self._order()]

    def to_grid(self, tokens: Any) -> Array:
        """The way back: ``(B, h w) -> (B, h, w)``, for `Tokenizer.decode_indices`."""
        return jnp.asarray(tokens)[:, np.argsort(self._order())].reshape(len(tokens), *self.module.grid)

    def sample(
        self,
        key: Any,
        labels: Any = None,
        *,
        batch: int | None = None,
        condition: Any = None,
        known: Any = None,
        steps: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        noise: Any = None,
    ) -> Array:
        """Indices ``(B, h, w)`` for `Tokenizer.decode_indices`, or ``(B, steps)`` where the model has no grid.

        Args:
          key: of the choices.
          labels: int ``(B,)``, for models of classes.
          batch: number of pictures, for models with a start token.
          condition: tokens ``(B, M)`` in place of these two.
          known: the first tokens of the sequences, ``(B, n)``, see `to_sequence`; the rest is sampled.
          steps: how many to sample, where the model has no grid.
          temperature, top_k, top_p, greedy: see `Choice`.
          noise: Gumbel noise ``(steps, B, vocabulary)`` in place of ``key``'s.
        """
        begin = self.condition(labels, batch) if condition is None else jnp.asarray(condition, jnp.int32)
        known = jnp.zeros((len(begin), 0), jnp.int32) if known is None else jnp.asarray(known, jnp.int32)
        grid = self.module.grid
        if (steps is None) == (grid is None):
            raise ValueError(f"steps={steps} with grid={grid}: the number of steps is for models without a grid.")
        steps = steps if grid is None else grid[0] * grid[1] - known.shape[1]
        longest = begin.shape[1] + known.shape[1] + steps - 1
        if steps < 1 or longest > self.module.block:
            raise ValueError(
                f"a sequence of {begin.shape[1]} condition tokens, {known.shape[1]} known ones and {steps} to sample "
                f"does not fit: the last one must be at least one and see at most {self.module.block}."
            )
        run = _sampler(self.module, Choice(temperature, top_k, top_p, greedy), noise is not None)
        draws = jax.random.split(key, steps) if noise is None else jnp.asarray(noise, jnp.float32)
        tokens = run(self.variables, jnp.concatenate([begin, known], axis=1), draws)
        tokens = jnp.concatenate([known, tokens], axis=1)
        return tokens if grid is None else self.to_grid(tokens)

    def _order(self) -> np.ndarray:
        if self.module.grid is None:
            raise ValueError("this generator does not know the grid of a picture; its field grid says it.")
        return ORDERS[self.module.order](*self.module.grid)


# ------------------------------------------------------------------------------------------------------------- variants

_PAPER, _CODE = "https://arxiv.org/abs/2012.09841", "https://github.com/CompVis/taming-transformers"

VARIANTS = {
    "minigpt-cin-vqgan-f16-16384": Variant(
        config={"grid": (16, 16), "classes": 1000},
        paper=_PAPER,
        source=_CODE,
        license="MIT",
        note="ImageNet at 256 x 256 by class (cin_transformer): FID 15.78; 5.20 with rejection by a classifier",
    ),
    "minigpt-faceshq-vqgan-f16-1024": Variant(
        config={"vocabulary": 1024, "block": 512, "size": (24, 1024, 16), "grid": (16, 16), "start": None},
        paper=_PAPER,
        source=_CODE,
        license="MIT",
        note="faceshq_transformer and drin_transformer: behind the 256 tokens of coordinates or of a depth map",
    ),
}
