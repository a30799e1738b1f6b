"""Scanned layers: the same numbers as one after the other, a program whose size does not grow, recomputation."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizers.nn.attention import Attention
from tokenizers.nn.blocks import MLP, TransformerBlock
from tokenizers.nn.norm import LayerNorm
from tokenizers.nn.posemb import apply_rotary
from tokenizers.nn.scan import scan_layers

partial = functools.partial


def block(name=None):
    return TransformerBlock(partial(Attention, 2), partial(MLP, 16), LayerNorm, name=name)


class Network(nn.Module):
    depth: int
    remat: str = "none"
    collect: bool = False

    @nn.compact
    def __call__(self, x, each=None, **options):
        layer = block("layers")
        return scan_layers(layer, self.depth, x, each=each or {}, remat=self.remat, collect=self.collect, **options)


X = jax.random.normal(jax.random.key(0), (2, 5, 8))


def initial(depth):
    return jax.jit(Network(depth).init)(jax.random.key(1), X)


def one_by_one(variables, x, angles, mask):
    every = []
    for i, turned in enumerate(angles):
        layer = jax.tree.map(lambda leaf: leaf[i], variables["params"]["layers"])  # noqa: B023
        x = block().apply({"params": layer}, x, rotate=partial(apply_rotary, angles=turned), mask=mask)
        every.append(x)
    return x, jnp.stack(every)


def test_it_is_one_layer_after_the_other_each_with_its_own_keywords():
    variables = initial(3)
    kernels = variables["params"]["layers"]["mlp"]["fc1"]["kernel"]
    chex.assert_shape(kernels, (3, 8, 16))
    assert not np.allclose(kernels[0], kernels[1])  # initial values differ
    angles = jax.random.normal(jax.random.key(2), (3, 5, 2))
    mask = jnp.tri(5, dtype=bool)
    each = {"rotate": jax.tree_util.Partial(apply_rotary, angles=angles)}
    found, every = jax.jit(Network(3, collect=True).apply)(variables, X, each, mask=mask)
    expected, all_expected = jax.jit(one_by_one)(variables, X, angles, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(every, all_expected, atol=1e-5)


def test_the_program_does_not_grow_with_the_depth():
    lines = []
    for depth in (2, 12):
        program = jax.jit(Network(depth).apply).lower(jax.eval_shape(lambda: initial(depth)), X)  # noqa: B023
        lines.append(program.as_text().count("\n"))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_recomputation_changes_memory_and_nothing_else(remat):
    def gradient(remat):
        def loss(params):
            return jnp.square(Network(2, remat).apply({"params": params}, X)).sum()

        return jax.grad(loss)

    params = initial(2)["params"]
    # Sums run in another order: 1e-6 where the gradients are about 1.
    found, expected = jax.jit(lambda p: (gradient(remat)(p), gradient("none")(p)))(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    products = {k: str(jax.make_jaxpr(gradient(k))(params)).count("dot_general") for k in ("none", "dots", "full")}
    assert products["none"] <= products["dots"] < products["full"], products


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="unknown remat 'some'.*none, full, dots"):
        Network(2, "some").init(jax.random.key(0), X)
