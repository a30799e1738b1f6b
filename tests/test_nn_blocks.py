"""Composed blocks: names, definitions, causality, streaming, dtypes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizers.nn.attention import Attention, SpatialAttention, TemporalAttention
from tokenizers.nn.blocks import MLP, AttentionBlock, ResBlock, SwiGLU, TransformerBlock
from tokenizers.nn.conv import CausalConv3d, Conv2d, Conv3d
from tokenizers.nn.norm import GroupNorm, LayerNorm, RMSNorm

partial = functools.partial


def apply(module, variables, *args, **options):
    return jax.jit(functools.partial(module.apply, **options))(variables, *args)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def init(module, *args):
    return jax.jit(module.init)(jax.random.key(0), *args)


@pytest.mark.parametrize(("conv", "shape"), [(Conv2d, (1, 6, 6, 4)), (Conv3d, (1, 3, 6, 6, 4))], ids=["2d", "3d"])
def test_res_block_is_norm_swish_conv_twice_plus_shortcut(conv, shape):
    x = normal(0, *shape)
    module = ResBlock(6, conv=conv, norm=partial(GroupNorm, num_groups=2))
    params = init(module, x)["params"]
    assert set(params) == {"norm1", "conv1", "norm2", "conv2", "shortcut"}
    y = x
    for i in "12":
        y = jax.nn.swish(apply(GroupNorm(num_groups=2), {"params": params[f"norm{i}"]}, y))
        y = apply(conv(6), {"params": params[f"conv{i}"]}, y)
    kernel = params["shortcut"]["kernel"].reshape(4, 6)
    expected = y + x @ kernel
    np.testing.assert_allclose(apply(module, {"params": params}, x), expected, atol=1e-5)
    assert set(init(module.clone(features=4), x)["params"]) == {"norm1", "conv1", "norm2", "conv2"}


def test_a_block_whose_last_convolution_starts_at_zero_passes_its_input():
    x = normal(0, 1, 6, 6, 4)
    zeros = partial(Conv2d, kernel_init=jax.nn.initializers.zeros)
    module = ResBlock(4, conv=Conv2d, norm=partial(GroupNorm, num_groups=2), last=zeros)
    variables = init(module, x)
    assert jnp.abs(variables["params"]["conv1"]["kernel"]).max() > 0
    np.testing.assert_array_equal(apply(module, variables, x), x)


def test_a_shortcut_of_another_kind_and_dropout():
    x = normal(0, 1, 3, 6, 6, 4)
    module = ResBlock(
        6,
        conv=partial(CausalConv3d, time_mode="zeros"),
        norm=RMSNorm,
        shortcut=partial(Conv2d, kernel_size=1),
        dropout=0.5,
    )
    variables = init(module, x)
    assert variables["params"]["shortcut"]["kernel"].shape == (1, 1, 4, 6)
    quiet = apply(module, variables, x)
    noisy = apply(module, variables, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert np.abs(noisy - quiet).max() > 0.1


def test_a_causal_res_block_is_causal_and_streams():
    x = normal(0, 1, 5, 4, 4, 4)
    module = ResBlock(6, conv=CausalConv3d, norm=partial(GroupNorm, num_groups=2, per_frame=True))
    variables = init(module, x)
    step = jax.jit(partial(module.apply, mutable="stream"))
    whole = apply(module, variables, x)
    changed = apply(module, variables, x.at[:, 3:].add(1.0))
    np.testing.assert_array_equal(changed[:, :3], whole[:, :3])
    first, stream = step(variables, x[:, :1])
    second, stream = step({**variables, **stream}, x[:, 1:3])
    third, _ = step({**variables, **stream}, x[:, 3:])
    np.testing.assert_allclose(jnp.concatenate([first, second, third], 1), whole, atol=1e-5)


@pytest.mark.parametrize("mlp", [partial(MLP, 16), partial(SwiGLU, 12, use_bias=False)], ids=["mlp", "swiglu"])
def test_transformer_block_is_pre_norm(mlp):
    x = normal(0, 2, 5, 8)
    attention = partial(Attention, num_heads=2)
    module = TransformerBlock(attention=attention, mlp=mlp, norm=LayerNorm, layer_scale=0.5)
    params = init(module, x)["params"]
    assert set(params) == {"norm1", "attention", "scale1", "norm2", "mlp", "scale2"}

    def run(part, name, x, **options):
        return part.apply({"params": params[name]}, x, **options)

    y = x + 0.5 * run(attention(), "attention", run(LayerNorm(), "norm1", x), is_causal=True)
    y = y + 0.5 * run(mlp(), "mlp", run(LayerNorm(), "norm2", y))
    np.testing.assert_allclose(apply(module, {"params": params}, x, is_causal=True), y, atol=1e-5)
    assert "scale1" not in init(module.clone(layer_scale=None), x)["params"]


def test_gated_and_plain_mlps_are_their_formulas():
    x = normal(0, 3, 4)
    for module in (MLP(5, features=2), SwiGLU(5, features=2)):
        params = init(module, x)["params"]
        dense = {name: lambda a, p=p: a @ p["kernel"] + p["bias"] for name, p in params.items()}
        if isinstance(module, MLP):
            expected = dense["fc2"](jax.nn.gelu(dense["fc1"](x), approximate=False))
        else:
            expected = dense["down"](jax.nn.swish(dense["gate"](x)) * dense["up"](x))
        np.testing.assert_allclose(apply(module, {"params": params}, x), expected, atol=1e-5)


def test_blocks_stay_in_the_compute_dtype():
    x = normal(0, 1, 3, 4, 4, 8).astype(jnp.bfloat16)
    half = {"dtype": jnp.bfloat16}
    modules = (
        ResBlock(6, conv=partial(CausalConv3d, **half), norm=partial(GroupNorm, num_groups=2)),
        AttentionBlock(attention=partial(SpatialAttention, **half), norm=partial(GroupNorm, num_groups=2)),
        TransformerBlock(
            attention=partial(TemporalAttention, **half), mlp=partial(MLP, 8, **half), norm=RMSNorm, layer_scale=0.1
        ),
    )
    for module in modules:
        y, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
        assert y.dtype == jnp.bfloat16
        chex.assert_trees_all_equal_dtypes(variables, jax.tree.map(lambda a: a.astype(jnp.float32), variables))


def test_an_attention_block_is_residual():
    x = normal(0, 1, 4, 4, 8)
    module = AttentionBlock(attention=SpatialAttention, norm=LayerNorm)
    variables = init(module, x)
    variables["params"]["attention"]["out"] = jax.tree.map(jnp.zeros_like, variables["params"]["attention"]["out"])
    np.testing.assert_array_equal(apply(module, variables, x), x)
