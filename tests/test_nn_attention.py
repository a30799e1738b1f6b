"""Attention against a plain softmax in float64; causality, windows, streaming, dtypes, sharding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenizers.nn import posemb
from tokenizers.nn.attention import Attention, SpatialAttention, TemporalAttention, WindowAttention, attend, with_room

# float32 products of up to 8 channels and 24 keys in another order.
CLOSE = {"atol": 1e-5}


def apply(module, variables, *args, **options):
    return jax.jit(functools.partial(module.apply, **options))(variables, *args)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def init(module, *args):
    return jax.jit(module.init)(jax.random.key(0), *args)


def plain(query, key, value, mask=None, bias=0.0, scale=None):
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    logits = np.einsum("...nhd,...mhd->...hnm", query, key) * (scale or query.shape[-1] ** -0.5) + bias
    logits = np.where(True if mask is None else mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("...hnm,...mhd->...nhd", weights / weights.sum(-1, keepdims=True), value)


def qkv(*lead, n=5, m=6, heads=2, depth=4):
    return normal(0, *lead, n, heads, depth), normal(1, *lead, m, heads, depth), normal(2, *lead, m, heads, depth)


def test_attend_is_softmax_attention():
    query, key, value = qkv(3)
    np.testing.assert_allclose(attend(query, key, value), plain(query, key, value), **CLOSE)
    bias, mask = normal(3, 2, 5, 6), normal(4, 5, 6) > -1
    actual = attend(query, key, value, mask=mask, bias=bias, scale=0.3)
    np.testing.assert_allclose(actual, plain(query, key, value, mask, np.asarray(bias), 0.3), **CLOSE)
    causal = attend(query, key[:, :5], value[:, :5], is_causal=True)
    np.testing.assert_allclose(causal, plain(query, key[:, :5], value[:, :5], np.tril(np.ones((5, 5)))), **CLOSE)


def test_attend_takes_any_number_of_batch_axes():
    query, key, value = qkv(2, 3, 2)
    mask = normal(4, 2, 1, 5, 6) > -1
    actual = jax.jit(attend)(query, key, value, mask=mask)
    np.testing.assert_allclose(actual, plain(query, key, value, np.asarray(mask)), **CLOSE)


def test_softmax_is_float32_for_half_precision():
    query, key, value = (a.astype(jnp.bfloat16) for a in qkv(2))
    y = attend(query * 4, key, value)
    assert y.dtype == jnp.bfloat16
    expected = plain(query * 4, key, value)
    # Weights and result are rounded to 8 bits; logits in bfloat16 would be wrong by several percent.
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.02)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'cudnn'"):
        attend(*qkv(1), implementation="cudn")
    with pytest.raises(ValueError, match="query of shape"):
        attend(*qkv())
    with pytest.raises(ValueError, match="num_heads must divide the channels 6; got 4"):
        Attention(num_heads=4).init(jax.random.key(0), jnp.zeros((1, 3, 6)))
    with pytest.raises(ValueError, match="Accepted: rms, layer, None"):
        Attention(qk_norm="group").init(jax.random.key(0), jnp.zeros((1, 3, 6)))
    with pytest.raises(ValueError, match="must divide height and width"):
        WindowAttention(window=(2, 3)).init(jax.random.key(0), jnp.zeros((1, 4, 4, 6)))


def test_self_and_cross_attention_are_projections_around_attend():
    x, context = normal(0, 2, 5, 8), normal(1, 2, 6, 4)
    module = Attention(num_heads=2, features=3)
    params = init(module, x, context)["params"]
    dense = {name: lambda a, p=p: np.asarray(a) @ p["kernel"] + p["bias"] for name, p in params.items()}
    split = {
        name: dense[name](a).reshape(2, -1, 2, 4)
        for name, a in zip(("query", "key", "value"), (x, context, context), strict=True)
    }
    expected = dense["out"](plain(*split.values()).reshape(2, 5, 8))
    np.testing.assert_allclose(apply(module, {"params": params}, x, context), expected, **CLOSE)


def test_the_fused_matrix_is_the_three_side_by_side():
    x = normal(0, 2, 5, 8)
    module = Attention(num_heads=2, qkv_bias=False)
    params = init(module, x)["params"]
    kernels = [params[name]["kernel"] for name in ("query", "key", "value")]
    fused = {"qkv": {"kernel": jnp.concatenate(kernels, 1)}, "out": params["out"]}
    actual = apply(module.clone(fused_qkv=True), {"params": fused}, x)
    np.testing.assert_allclose(actual, apply(module, {"params": params}, x), **CLOSE)
    with pytest.raises(ValueError, match="need fused_qkv=False"):
        apply(module.clone(fused_qkv=True), {"params": fused}, x, x)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_normalized_queries_ignore_their_scale(kind):
    x = normal(0, 1, 5, 8)
    module = Attention(num_heads=2, qk_norm=kind, qkv_bias=False)
    variables = init(module, x)
    assert variables["params"]["query_norm"]["scale"].shape == (4,)
    scaled = jax.tree.map(lambda a: a, variables)
    scaled["params"]["query"]["kernel"] *= 30
    np.testing.assert_allclose(apply(module, scaled, x), apply(module, variables, x), atol=1e-4)


def test_rotary_self_attention_sees_relative_positions():
    x = jnp.tile(normal(0, 1, 3, 8), (1, 4, 1))  # period 3
    rotate = functools.partial(posemb.apply_rotary, angles=posemb.rotary_angles(np.arange(12), 8))
    module = Attention()
    variables = init(module, x)
    without = apply(module, variables, x)
    np.testing.assert_allclose(without[:, 0], without[:, 3], **CLOSE)
    assert (
        np.abs(np.subtract(*apply(module, variables, x, rotate=rotate)[:, np.array([0, 3])].swapaxes(0, 1))).max()
        > 1e-3
    )


def test_spatial_attention_is_that_of_every_frame():
    x = normal(0, 2, 3, 4, 2, 8)
    module = SpatialAttention(num_heads=2)
    variables = init(module, x)
    y = apply(module, variables, x)
    tokens = apply(Attention(num_heads=2), variables, x.reshape(6, 8, 8))
    np.testing.assert_allclose(y, tokens.reshape(x.shape), **CLOSE)
    np.testing.assert_allclose(apply(module, variables, x[:, 1]), y[:, 1], **CLOSE)


def test_windows_do_not_see_each_other():
    x = normal(0, 1, 4, 6, 4)
    module = WindowAttention(window=(2, 3))
    variables = init(module, x)
    y = apply(module, variables, x)
    window = apply(SpatialAttention(), variables, x[:, 2:, 3:])
    np.testing.assert_allclose(y[:, 2:, 3:], window, **CLOSE)
    np.testing.assert_array_equal(apply(module, variables, x.at[:, :2].add(1.0))[:, 2:], y[:, 2:])
    biased = apply(module, variables, x, bias=jnp.where(jnp.arange(6) == 0, 0.0, -1e9)[None])
    np.testing.assert_allclose(biased[:, 2:, 3:], jnp.broadcast_to(biased[:, 2:3, 3:4], (1, 2, 3, 4)), **CLOSE)


def test_temporal_attention_is_that_of_every_position():
    x = normal(0, 2, 5, 2, 3, 8)
    for causal in (True, False):
        module = TemporalAttention(num_heads=2, causal=causal)
        variables = init(module, x)
        tokens = apply(Attention(num_heads=2), variables, x[:, :, 1, 2], is_causal=causal)
        np.testing.assert_allclose(apply(module, variables, x)[:, :, 1, 2], tokens, **CLOSE)


def rotate_frames(tokens):
    return posemb.apply_rotary(tokens, posemb.rotary_angles(np.arange(tokens.shape[-3]), 4))


@pytest.mark.parametrize("rotate", [None, rotate_frames], ids=["plain", "rotary"])
def test_causal_temporal_attention_is_causal_and_streams(rotate):
    x = normal(0, 1, 7, 2, 2, 8)
    module = TemporalAttention(num_heads=2)
    variables = init(module, x)
    whole = apply(module, variables, x, rotate=rotate)
    np.testing.assert_array_equal(apply(module, variables, x.at[:, 4:].add(1.0), rotate=rotate)[:, :4], whole[:, :4])
    stream, outputs = {}, []
    for chunk in (x[:, :1], x[:, 1:4], x[:, 4:]):
        y, stream = apply(module, {**variables, **stream}, chunk, rotate=rotate, mutable="stream")
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, **CLOSE)
    with pytest.raises(ValueError, match="cannot stream"):
        apply(module.clone(causal=False), variables, x, mutable="stream")


@pytest.mark.parametrize("rotate", [None, rotate_frames], ids=["plain", "rotary"])
def test_with_room_the_state_of_a_stream_changes_its_shape_only_when_the_clip_has_doubled(rotate):
    x = normal(0, 1, 23, 2, 2, 8)
    module = TemporalAttention(num_heads=2)
    variables = init(module, x)
    step = jax.jit(lambda chunk, stream: module.apply(variables | stream, chunk, rotate=rotate, mutable=["stream"]))
    stream, outputs, sizes, start = {}, [], [], 0
    for length in (1, 3, *[1] * 12, 7):
        y, stream = step(x[:, start : start + length], stream)
        stream, start = with_room(stream), start + length
        outputs.append(y)
        sizes.append(stream["stream"]["key"].shape[-3])
        assert sizes[-1] >= 2 * start
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), apply(module, variables, x, rotate=rotate), **CLOSE)
    assert sizes == [2, 8, *[16] * 4, *[32] * 8, 64]
    assert step._cache_size() == 6  # (1, no past), (3, 2), (1, 8), (1, 16), (1, 32), (7, 32)


def masked(shape):
    return jax.random.bernoulli(jax.random.key(9), 0.7, shape).at[..., 0].set(True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window": (2, 3)},
        {"mask": masked((1, 1, 1, 13)), "bias": normal(5, 2, 1, 13, 13)},
        {"mask": masked((2, 13, 13)), "is_causal": True},
    ],
    ids=["plain", "causal", "window", "key mask and bias", "mask and causal"],
)
@pytest.mark.parametrize("max_logits", [400, 100, 1])
def test_blocks_of_queries_give_what_all_at_once_give(options, max_logits):
    query, key, value = (normal(i, 3, 2, 13, 2, 8) for i in range(3))  # 2028 logits; 13 splits into no equal blocks

    def run(limit):
        def total(*tensors):
            y = attend(*tensors, **options, max_logits=limit)
            return (y * jnp.cos(y)).sum(), y

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)

    ((_, whole), gradients), ((_, blocks), block_gradients) = run(2**28), run(max_logits)
    np.testing.assert_allclose(blocks, whole, **CLOSE)
    chex.assert_trees_all_close(block_gradients, gradients, **CLOSE)


def test_a_frame_of_two_thousand_lines_needs_no_square_of_its_tokens():
    frame = jax.ShapeDtypeStruct((1, 270 * 480, 1, 64), jnp.float32)
    step = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v).sum(), argnums=(0, 1, 2)))
    memory = step.lower(frame, frame, frame).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5 * 2**30  # all logits at once: 63 GiB, and again for their gradient


def test_compute_dtype_is_an_attribute():
    x = normal(0, 1, 4, 4, 8)
    y, variables = SpatialAttention(num_heads=2, qk_norm="rms", dtype=jnp.bfloat16).init_with_output(
        jax.random.key(0), x
    )
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_dtypes(variables, jax.tree.map(lambda a: a.astype(jnp.float32), variables))


def test_temporal_window_bounds_what_a_frame_sees():
    x = normal(0, 2, 7, 2, 3, 8)
    module = TemporalAttention(num_heads=2, window=3)
    variables = init(module, x)
    whole = apply(module, variables, x)
    np.testing.assert_allclose(whole[:, :3], apply(module.clone(window=None), variables, x[:, :3]), **CLOSE)
    np.testing.assert_allclose(whole[:, 6], apply(module, variables, x[:, 4:])[:, 2], **CLOSE)
    assert np.abs(whole[:, 6] - apply(module, variables, x[:, 5:])[:, 1]).max() > 1e-3
    long, all_of_it = module.clone(window=7), module.clone(window=None)
    np.testing.assert_allclose(apply(long, variables, x), apply(all_of_it, variables, x), **CLOSE)
    for wrong in (module.clone(window=0), module.clone(causal=False)):
        with pytest.raises(ValueError, match="must be at least 1, and needs causal=True"):
            apply(wrong, variables, x)


@pytest.mark.parametrize("lengths", [(1, 1, 5), (2, 2, 3), (4, 3)])
@pytest.mark.parametrize("window", [1, 3, 10])
def test_temporal_window_streams_with_constant_state(lengths, window):
    x = normal(0, 2, 7, 2, 3, 8)
    module = TemporalAttention(num_heads=2, window=window)
    variables, state, parts, start = init(module, x), {}, [], 0
    for length in lengths:
        y, state = module.apply(variables | state, x[:, start : start + length], mutable=["stream"])
        parts, start = [*parts, y], start + length
        assert state["stream"]["key"].shape[-3] == window - 1
    np.testing.assert_allclose(jnp.concatenate(parts, 1), apply(module, variables, x), **CLOSE)


@pytest.mark.parametrize("module", [SpatialAttention(num_heads=2), TemporalAttention(num_heads=2)])
def test_height_sharding_changes_nothing(module):
    x = normal(0, 4, 3, 4, 2, 8)
    variables = init(module, x)
    expected = apply(module, variables, x)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, "context"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(module.apply).lower(variables, jax.device_put(x, sharding)).compile()
        y = compiled(variables, jax.device_put(x, sharding))
    assert y.sharding.spec[2] == "context"
    if isinstance(module, TemporalAttention):
        assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(y, expected, **CLOSE)


def test_grouped_queries_share_keys_and_values():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    grouped = Attention(4, kv_heads=2)
    params = grouped.init(jax.random.key(1), x)["params"]
    assert params["key"]["kernel"].shape == (8, 4)

    def repeated(name):  # every head of two channels twice
        return {
            key: a.reshape(*a.shape[:-1], 2, 2).repeat(2, -2).reshape(*a.shape[:-1], 8)
            for key, a in params[name].items()
        }

    full = {**params, "key": repeated("key"), "value": repeated("value")}
    np.testing.assert_allclose(grouped.apply({"params": params}, x), Attention(4).apply({"params": full}, x), atol=1e-6)
    with pytest.raises(ValueError, match="kv_heads=3 must divide num_heads=4"):
        Attention(4, kv_heads=3).init(jax.random.key(1), x)
    with pytest.raises(ValueError, match="need fused_qkv=False"):
        Attention(4, kv_heads=2, fused_qkv=True).init(jax.random.key(1), x)


def test_a_window_is_a_band_of_the_mask():
    x = jax.random.normal(jax.random.key(0), (2, 9, 8))
    module = Attention(2)
    variables = module.init(jax.random.key(1), x)
    distance = jnp.arange(9)[None] - jnp.arange(9)[:, None]  # of the key, after the query
    expected = module.apply(variables, x, mask=(distance >= -3) & (distance <= 1))
    np.testing.assert_allclose(module.apply(variables, x, window=(3, 1)), expected, atol=1e-6)


@pytest.mark.parametrize("split", ["height", "width"])
@pytest.mark.parametrize(
    "module", [SpatialAttention(2, name="a"), TemporalAttention(2, name="a")], ids=["space", "time"]
)
def test_positions_that_are_split_over_devices_stay_split(module, split):
    """Every device attends for its own part: nothing but keys and values is gathered."""
    x = jax.ShapeDtypeStruct((1, 4, 16, 16, 8), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)

    def bytes_of(mesh):
        with jax.set_mesh(mesh):
            names = tuple(f"context_{split}" if name == split else None for name in ("b", "t", "height", "width", "c"))
            place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
            compiled = (
                jax.jit(module.apply, in_shardings=(None, place), out_shardings=place).lower(variables, x).compile()
            )
        return compiled.memory_analysis().temp_size_in_bytes

    axes = ("data", "fsdp", f"context_{split}")
    one, eight = (
        bytes_of(
            jax.make_mesh((1, 1, n), axes, devices=jax.devices()[:n], axis_types=(jax.sharding.AxisType.Auto,) * 3)
        )
        for n in (1, 8)
    )
    assert eight < one / 4, (one, eight)
