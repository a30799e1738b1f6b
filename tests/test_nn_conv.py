"""Convolutions: every lowering equals XLA's own, causal ones are causal, stream, and stay shardable."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers.nn import lowering
from tokenizers.nn.conv import CausalConv3d, Conv2d, Conv3d, FactorizedConv3d, convolve

# float32 sums of up to 3 * 3 * 3 * 40 products in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

# One per lowering: kernel size in time and space, channels in and out.
LOWERED = {
    "_fold_time": (1, 3, 3, 4),
    "_flatten_space": (3, 1, 4, 4),
    "_concat_taps": (3, 3, 3, 8),
    "_shift_add": (3, 3, 16, 3),
    "_sum_taps": (3, 3, 33, 9),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def init(module, x):
    return jax.jit(module.init)(jax.random.key(0), x)


def kernel_for(name):
    kt, k, inputs, outputs = LOWERED[name]
    return normal(1, kt, k, k, inputs, outputs) / np.sqrt(kt * k * k * inputs)


def assert_same_as_native(x, kernel, **geometry):
    """Values and both gradients of the picked lowering against XLA's own convolution."""

    @functools.partial(jax.jit, static_argnames="lowering")
    def run(x, kernel, lowering):
        y, pull = jax.vjp(lambda x, k: convolve(x, k, lowering=lowering, **geometry), x, kernel)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    chex.assert_trees_all_close(run(x, kernel, "auto"), run(x, kernel, "native"), **CLOSE)


@pytest.mark.parametrize("name", LOWERED)
def test_every_lowering_is_picked_and_equals_the_native_convolution(name):
    kernel = kernel_for(name)
    assert lowering.for_cpu(kernel.shape, (1, 1, 1), groups=1).__name__ == name
    assert_same_as_native(normal(0, 2, 5, 6, 5, kernel.shape[-2]), kernel, padding=((2, 0), (1, 1), (0, 1)))


def test_the_matrix_product_of_wide_temporal_kernels_equals_the_native_convolution():
    kernel = normal(1, 3, 1, 1, 512, 2) / 40
    assert lowering.for_cpu(kernel.shape, (1, 2, 1), groups=1) is lowering._matmul_taps
    geometry = {"padding": ((2, 0), (1, 0), (0, 0)), "strides": (1, 2, 1)}
    assert_same_as_native(normal(0, 1, 4, 2, 2, 512), kernel, **geometry)


@st.composite
def geometries(draw):
    def per_axis(strategy):
        return tuple(draw(strategy) for _ in range(3))

    channels = draw(st.sampled_from([(3, 5), (8, 2), (33, 9)]))
    size = per_axis(st.integers(1, 3))
    pads = per_axis(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    return {
        "kernel": (*size, *channels),
        "frames": draw(st.integers(5, 6)),
        "strides": per_axis(st.integers(1, 3)),
        "dilation": per_axis(st.integers(1, 2)),
        "padding": draw(st.sampled_from(["SAME", "VALID", pads])),
    }


@settings(max_examples=8, deadline=None, derandomize=True)
@given(geometries())
def test_lowerings_agree_for_any_geometry(geometry):
    kernel = normal(1, *geometry["kernel"]) / 10
    x = normal(0, 1, geometry["frames"], 6, 5, kernel.shape[-2])
    assert_same_as_native(
        x, kernel, strides=geometry["strides"], dilation=geometry["dilation"], padding=geometry["padding"]
    )


@pytest.mark.parametrize(
    ("shape", "size", "geometry"),
    [
        ((1, 11, 6), (3, 3), {}),
        ((3, 9, 7), (4, 4), {"strides": 2, "padding": ((1, 2), (0, 1))}),
        ((1, 2, 40), (3, 1), {"padding": ((2, 0), (0, 0))}),  # bands of the width
        ((2, 12, 5), (3, 3), {"dilation": 2}),
    ],
)
def test_derivatives_of_small_batches_are_those_of_the_native_convolution(shape, size, geometry):
    """The gradient of a kernel is computed in another way; forward mode and second derivatives go through it too."""
    x, kernel = normal(0, *shape, 4), normal(1, *size, 4, 3) / 6

    @functools.partial(jax.jit, static_argnames="lowering")
    def run(x, kernel, lowering):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel, lowering=lowering, **geometry)))

        slopes = jax.grad(loss, argnums=(0, 1))
        return slopes(x, kernel), jax.jvp(slopes, (x, kernel), (jnp.cos(x), jnp.cos(kernel)))[1]

    chex.assert_trees_all_close(run(x, kernel, "auto"), run(x, kernel, "native"), **CLOSE)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_gradients_of_kernels_see_eight_pictures_or_more(batch, monkeypatch):
    """XLA's are slow with fewer. Nothing else is cut into bands."""
    seen, native = [], lowering.native
    monkeypatch.setattr(lowering, "native", lambda x, *args, **kw: seen.append(len(x)) or native(x, *args, **kw))
    x, kernel = jnp.ones((batch, 17, 7, 5)), jnp.ones((3, 3, 5, 7))
    jax.eval_shape(lambda x, kernel: jax.grad(lambda x: convolve(x, kernel).sum())(x), x, kernel)
    assert set(seen) == {batch}
    jax.eval_shape(lambda x, kernel: jax.grad(lambda kernel: convolve(x, kernel).sum())(kernel), x, kernel)
    assert max(seen) in (8, 9)


@pytest.mark.parametrize(
    ("size", "repeats", "padding"),
    [
        ((3, 3, 8, 9), (2, 2), "SAME"),
        ((3, 3, 16, 3), (2, 2), "SAME"),  # few outputs
        ((5, 4, 8, 9), (3, 2), ((4, 0), (1, 2))),
        ((3, 3, 3, 33, 9), (2, 2, 2), "SAME"),
        ((1, 3, 3, 8, 9), (1, 2, 2), ((0, 0), (1, 1), (0, 2))),
        ((3, 3, 8, 9), (2, 2), "VALID"),  # not folded: another number of elements
    ],
)
def test_repeated_inputs_are_folded_into_the_kernel(size, repeats, padding):
    kernel = normal(1, *size) / np.sqrt(np.prod(size[:-1]))
    x = normal(0, 2, *(4, 5, 3)[: len(repeats)], size[-2])
    assert_same_as_native(x, kernel, repeats=repeats, padding=padding)
    repeated = functools.reduce(lambda y, axis: jnp.repeat(y, repeats[axis], axis + 1), range(len(repeats)), x)
    chex.assert_trees_all_close(
        convolve(x, kernel, repeats=repeats, padding=padding), convolve(repeated, kernel, padding=padding), **CLOSE
    )


def test_folded_inputs_cost_less():
    x, kernel = jnp.zeros((1, 8, 8, 32)), jnp.zeros((3, 3, 32, 32))

    def flops(**options):
        run = jax.jit(lambda x, kernel: convolve(x, kernel, **options))
        return run.lower(x, kernel).compile().cost_analysis()["flops"]

    assert flops(repeats=2) < 0.6 * flops(repeats=2, lowering="native")


def test_native_and_image_convolutions_agree_with_the_definition():
    x, kernel = np.asarray(normal(0, 1, 4, 5, 2)), np.asarray(normal(1, 3, 3, 2, 3))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    expected = np.einsum("bhwcij,ijcd->bhwd", windows, kernel)
    np.testing.assert_allclose(convolve(x, kernel), expected, **CLOSE)
    np.testing.assert_allclose(convolve(x[:, None], kernel[None], lowering="native")[:, 0], expected, **CLOSE)


def test_groups_and_pinned_lowering_keep_one_native_convolution():
    x, kernel = jnp.zeros((1, 4, 4, 4, 4)), jnp.zeros((3, 3, 3, 4, 8))
    pinned = jax.jit(functools.partial(convolve, lowering="native")).lower(x, kernel).as_text()
    assert pinned.count("stablehlo.convolution") == 1
    assert "case" not in pinned
    grouped = jax.jit(functools.partial(convolve, groups=2)).lower(x, kernel[:, :, :, :2]).as_text()
    assert grouped.count("stablehlo.convolution") == 1


def test_half_precision_keeps_its_dtype_and_adds_up_in_float32():
    kernel = kernel_for("_sum_taps")
    x = normal(0, 1, 4, 4, 4, 33)
    y = convolve(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    exact = convolve(x.astype(jnp.bfloat16).astype(jnp.float32), kernel.astype(jnp.bfloat16).astype(jnp.float32))
    # One rounding of the result: half a unit in the last of 8 bits.
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_vmap_and_wrong_arguments():
    x, kernel = normal(0, 2, 1, 3, 4, 4, 3), kernel_for("_concat_taps")
    chex.assert_trees_all_close(jax.vmap(convolve, (0, None))(x, kernel), convolve(x[:, 0], kernel)[:, None], **CLOSE)
    with pytest.raises(ValueError, match="Did you mean 'native'"):
        convolve(x[0], kernel, lowering="nativ")
    with pytest.raises(ValueError, match="same rank"):
        convolve(x[0], kernel[0])
    with pytest.raises(ValueError, match="Accepted: SAME, VALID"):
        convolve(x[0], kernel, padding="full")
    with pytest.raises(ValueError, match="must not be negative"):
        convolve(x[0], kernel, padding=((0, -1), (0, 0), (0, 0)))
    with pytest.raises(ValueError, match="strides must be"):
        convolve(x[0], kernel, strides=(1, 2))


# ------------------------------------------------------------------------------------------------------------ modules


def test_parameters_are_float32_and_the_compute_dtype_is_an_attribute():
    module = Conv3d(6, (3, 1, 1), dtype=jnp.bfloat16)
    x = normal(0, 1, 3, 2, 2, 4)
    params = init(module, x)["params"]
    chex.assert_trees_all_equal_shapes(params, {"kernel": np.zeros((3, 1, 1, 4, 6)), "bias": np.zeros(6)})
    chex.assert_trees_all_equal_dtypes(params, {"kernel": np.zeros(1, np.float32), "bias": np.zeros(1, np.float32)})
    assert module.apply({"params": params}, x).dtype == jnp.bfloat16
    assert set(CausalConv3d(6).init(jax.random.key(0), x)) == {"params"}


def test_a_frame_wise_convolution_is_the_convolution_of_every_image():
    module = Conv2d(5, 3, strides=2, padding=((0, 1), (0, 1)))
    clip = normal(0, 2, 3, 6, 6, 4)
    variables = init(module, clip[:, 0])
    frames = jnp.stack([module.apply(variables, clip[:, t]) for t in range(3)], 1)
    chex.assert_shape(frames, (2, 3, 3, 3, 5))
    chex.assert_trees_all_close(module.apply(variables, clip), frames, **CLOSE)


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular"])
def test_padding_modes_pad_as_numpy_does(mode):
    x = np.asarray(normal(0, 1, 3, 4, 5, 2))
    module = Conv3d(3, padding_mode=mode)
    variables = init(module, x)
    name = {"replicate": "edge", "reflect": "reflect", "circular": "wrap"}[mode]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)), mode=name)
    expected = Conv3d(3, padding="VALID").apply(variables, padded)
    chex.assert_trees_all_close(module.apply(variables, x), expected, **CLOSE)
    with pytest.raises(ValueError, match="Did you mean 'reflect'"):
        Conv3d(3, padding_mode="refect").init(jax.random.key(0), x)


CAUSAL = {
    "zeros": CausalConv3d(3, time_mode="zeros"),
    "replicate": CausalConv3d(3),
    "dilated": CausalConv3d(3, (3, 1, 1), dilation=(2, 1, 1)),
    "replicated edges": CausalConv3d(3, time_mode="zeros", padding_mode="replicate"),
    "factorized": FactorizedConv3d(3),
    "strided": CausalConv3d(3, strides=(2, 2, 2), padding=((0, 1), (0, 1))),
    "strided, less padding": CausalConv3d(3, 3, strides=(2, 1, 1), time_padding=1),
}


def strided(module):
    return isinstance(module.strides, tuple) and module.strides[0] == 2


@pytest.mark.parametrize("module", CAUSAL.values(), ids=CAUSAL)
def test_a_later_frame_never_changes_an_earlier_output(module):
    x = normal(0, 1, 7, 4, 4, 2)
    variables = init(module, x)
    apply = jax.jit(module.apply)
    y = apply(variables, x)
    for t in (1, 4, 6):
        changed = apply(variables, x.at[:, t:].add(1.0))
        last = t if not strided(module) else (t - (2 - (module.time_padding or 2)) + 1) // 2
        np.testing.assert_array_equal(changed[:, :last], y[:, :last])
        assert np.all(np.abs(changed[:, last:] - y[:, last:]).max((0, 2, 3, 4)) > 0)


@pytest.mark.parametrize("module", CAUSAL.values(), ids=CAUSAL)
def test_chunks_give_what_the_whole_clip_gives(module):
    frames = 10 if module.time_padding == 1 else 9
    x = normal(0, 1, frames, 4, 4, 2)
    variables = init(module, x)
    whole = module.apply(variables, x)
    cuts = {10: (0, 2, 6, 10), 9: (0, 1, 5, 9)}[frames]
    stream, outputs = {}, []
    for start, end in itertools.pairwise(cuts):
        y, stream = module.apply({**variables, **stream}, x[:, start:end], mutable="stream")
        outputs.append(y)
    chex.assert_trees_all_close(jnp.concatenate(outputs, 1), whole, **CLOSE)


def test_a_chunk_that_does_not_fit_is_refused():
    module = CausalConv3d(3, strides=(2, 1, 1), time_padding=0)
    x = normal(0, 1, 5, 4, 4, 2)
    variables = init(module, x)
    with pytest.raises(ValueError, match="at least 3 frames"):
        module.apply(variables, x[:, :1], mutable="stream")


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_an_image_is_the_first_frame_of_its_clip(mode):
    module = CausalConv3d(3, time_mode=mode)
    x = normal(0, 2, 4, 5, 5, 2)
    variables = init(module, x)
    chex.assert_trees_all_close(module.apply(variables, x[:, :1]), module.apply(variables, x)[:, :1], **CLOSE)


def test_causal_padding_is_zeros_or_the_first_frame():
    x = normal(0, 1, 4, 3, 3, 2)
    for mode in ("zeros", "replicate"):
        module = CausalConv3d(3, time_mode=mode)
        variables = init(module, x)
        front = jnp.repeat(x[:, :1], 2, 1) * (mode == "replicate")
        padded = Conv3d(3, padding=(0, 1, 1)).apply(variables, jnp.concatenate([front, x], 1))
        chex.assert_trees_all_close(module.apply(variables, x), padded, **CLOSE)


def test_a_factorized_convolution_is_space_then_time():
    x = normal(0, 1, 4, 6, 6, 2)
    module = FactorizedConv3d(5, 3, strides=(1, 2, 2), padding=((0, 1), (0, 1)), middle_features=4, causal=False)
    params = init(module, x)["params"]
    assert params["spatial"]["kernel"].shape == (1, 3, 3, 2, 4)
    assert params["temporal"]["kernel"].shape == (3, 1, 1, 4, 5)
    y = Conv2d(4, 3, 2, ((0, 1), (0, 1))).apply(
        {"params": {**params["spatial"], "kernel": params["spatial"]["kernel"][0]}}, x
    )
    y = Conv3d(5, (3, 1, 1), padding_mode="replicate").apply({"params": params["temporal"]}, y)
    chex.assert_trees_all_close(module.apply({"params": params}, x), y, **CLOSE)


# ----------------------------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("lowering", ["auto", "native"])
def test_height_sharding_changes_nothing(lowering):
    module = CausalConv3d(8, lowering=lowering)
    x = normal(0, 4, 3, 8, 6, 4)
    variables = init(module, x)

    def loss(variables, x):
        y = module.apply(variables, x)
        return jnp.square(y).mean(), y

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = run(variables, x)
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "context"), axis_types=axes)
    spec = jax.sharding.PartitionSpec(("data", "fsdp"), None, "context")
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        actual = run(variables, sharded)
        (_, y), _ = actual
        assert y.sharding.spec[2] == "context"
        if lowering == "native":
            # The halo is exchanged with the neighbours; nothing is gathered.
            text = jax.jit(module.apply).lower(variables, sharded).compile().as_text()
            assert "collective-permute" in text
            assert "all-gather" not in text
    chex.assert_trees_all_close(jax.device_get(actual), jax.device_get(expected), **CLOSE)


@pytest.mark.parametrize(("strides", "dilation"), [((1, 1, 1), (1, 1, 1)), ((1, 2, 2), (1, 1, 2)), ((2, 1), (1, 2))])
def test_depthwise_convolutions_are_lowered_right(strides, dilation):
    rng, rank = np.random.default_rng(0), len(strides)
    sizes = ((2, *(4, 5, 6)[-rank:], 6), (*(3,) * rank, 1, 6))
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in sizes)
    padding = ((2, 0), (1, 1), (0, 2))[-rank:]
    options = {"strides": strides, "padding": padding, "dilation": dilation, "groups": 6}
    found, expected = (convolve(x, kernel, **options, lowering=name) for name in ("auto", "native"))
    # Sums of 27 products in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
