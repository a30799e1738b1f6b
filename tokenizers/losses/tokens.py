"""Guesses of the tokens that another tokenizer gives: the loss of TiTok's first stage, https://arxiv.org/abs/2406.07550."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def cross_entropy(logits: Array, tokens: Array) -> Array:
    """Mean over all positions: logits ``(..., K)``, int tokens ``(...)`` -> float32 scalar, in nats."""
    _check(logits, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens).mean()


def accuracy(logits: Array, tokens: Array) -> Array:
    """Share of positions whose most likely token is the right one."""
    _check(logits, tokens)
    return (jnp.argmax(logits, axis=-1) == tokens).astype(jnp.float32).mean()


def _check(logits: Array, tokens: Array) -> None:
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits of {logits.shape[:-1]} tokens are compared with {tokens.shape} of them.")
