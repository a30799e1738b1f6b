"""Conversion tables: strict in both directions, and the two directions undo each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers.convert import engine
from tokenizers.convert.engine import Rule, to_official, to_tree

TABLE = (
    Rule(r"params/embed/embedding", "tokens.{leaf}"),
    Rule(r"(?:params|batch_stats)/(.+)/\w+", r"\1.{leaf}"),
)


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


TARGET = {
    "params": {
        "encoder": {
            "conv_in": {"kernel": leaf(3, 3, 2, 4), "bias": leaf(4)},
            "norm": {"scale": leaf(4), "bias": leaf(4)},
        },
        "head": {"kernel": leaf(4, 5)},
        "embed": {"embedding": leaf(7, 4)},
    },
    "batch_stats": {"encoder": {"norm": {"mean": leaf(4), "var": leaf(4)}}},
}


def official():
    shapes = {
        "encoder.conv_in.weight": (4, 2, 3, 3),
        "encoder.conv_in.bias": (4,),
        "encoder.norm.weight": (4,),
        "encoder.norm.bias": (4,),
        "encoder.norm.running_mean": (4,),
        "encoder.norm.running_var": (4,),
        "head.weight": (5, 4),
        "tokens.weight": (7, 4),
    }
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_layouts_follow_the_leaf_names():
    state = official()
    tree = to_tree(TABLE, TARGET, state | {"encoder.norm.num_batches_tracked": np.int64(3)}, ignore=(r".*_tracked",))
    params = tree["params"]
    np.testing.assert_array_equal(
        params["encoder"]["conv_in"]["kernel"][1, 2, 0, 3], state["encoder.conv_in.weight"][3, 0, 1, 2]
    )
    np.testing.assert_array_equal(params["head"]["kernel"], state["head.weight"].T)
    np.testing.assert_array_equal(params["encoder"]["norm"]["scale"], state["encoder.norm.weight"])
    np.testing.assert_array_equal(params["embed"]["embedding"], state["tokens.weight"])
    np.testing.assert_array_equal(tree["batch_stats"]["encoder"]["norm"]["var"], state["encoder.norm.running_var"])


def test_there_and_back_is_the_identity():
    state = official()
    tree = to_tree(TABLE, TARGET, state)
    back = to_official(TABLE, tree)
    assert back.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(back[name], state[name])
        assert back[name].flags.c_contiguous


def test_convolutions_compute_what_the_official_layout_means():
    # Cross-correlation written out from the official (O, I, h, w) weight, against XLA on the converted kernel.
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(5, 6, 2)), rng.normal(size=(3, 2, 2, 3))
    expected = np.zeros((4, 4, 3))
    for o, i, j in np.ndindex(3, 4, 4):
        expected[i, j, o] = sum((x[i : i + 2, j : j + 3, c] * weight[o, c]).sum() for c in range(2))
    kernel = engine.kernel.to_ours(weight)
    actual = jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(actual[0], expected, rtol=1e-4, atol=1e-5)  # float32 sums of 12 products

    # PyTorch's transposed convolution adds every input pixel times the weight (I, O, h, w) at stride distance.
    weight, expected = rng.normal(size=(2, 3, 2, 3)), np.zeros((5 * 2, 6 * 2 + 1, 3))
    for c, o, i, j in np.ndindex(2, 3, 5, 6):
        expected[2 * i : 2 * i + 2, 2 * j : 2 * j + 3, o] += x[i, j, c] * weight[c, o]
    kernel = engine.transposed_conv.to_ours(weight)
    actual = jax.lax.conv_transpose(x[None], kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(actual[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("transform", "shape", "ours"),
    [
        (engine.identity, (2, 3), (2, 3)),
        (engine.kernel, (2, 3), (3, 2)),
        (engine.kernel, (2, 3, 4, 5, 6), (4, 5, 6, 3, 2)),
        (engine.kernel, (2,), (2,)),
        (engine.transposed_conv, (2, 3, 4, 5), (4, 5, 2, 3)),
        (engine.dense_from_conv(2), (2, 3, 1, 1), (3, 2)),
        (engine.conv_from_dense(3), (2, 3), (1, 1, 1, 3, 2)),
        (engine.squeeze(0, 2, 3), (1, 5, 1, 1), (5,)),
        (engine.expand(0), (5,), (1, 5)),
        (engine.reshape((6, -1), (2, 3, -1)), (6, 4), (2, 3, 4)),
        (engine.transpose(2, 0, 1), (2, 3, 4), (4, 2, 3)),
    ],
)
def test_every_layout_has_its_inverse(transform, shape, ours):
    value = np.arange(np.prod(shape)).reshape(shape)
    there = transform.to_ours(value)
    assert there.shape == ours
    np.testing.assert_array_equal(transform.to_official(there), value)


def test_parts_of_a_fused_tensor():
    table = tuple(
        Rule(rf"params/block_(\d+)/{part}/kernel", r"blocks.\1.qkv.weight", engine.part(i, 3, engine.kernel))
        for i, part in enumerate("qkv")
    )
    target = {"params": {"block_0": {part: {"kernel": leaf(4, 2)} for part in "qkv"}}}
    fused = np.arange(24, dtype=np.float32).reshape(6, 4)
    tree = to_tree(table, target, {"blocks.0.qkv.weight": fused})
    np.testing.assert_array_equal(tree["params"]["block_0"]["k"]["kernel"], fused[2:4].T)
    np.testing.assert_array_equal(to_official(table, tree)["blocks.0.qkv.weight"], fused)
    del target["params"]["block_0"]["k"]
    with pytest.raises(ValueError, match="blocks.0.qkv.weight is given to .*not all its parts"):
        to_tree(table, target, {"blocks.0.qkv.weight": fused})


def test_names_by_arithmetic():
    table = (Rule(r"params/up_(\d)/bias", lambda match: f"up.{3 - int(match[1])}.bias"),)
    names = engine.official_names(table, ["params/up_0/bias", "params/up_3/bias"])
    assert list(names.values()) == ["up.3.bias", "up.0.bias"]


def test_one_error_lists_everything_on_both_sides():
    state = official()
    state["encoder.conv_im.weight"] = state.pop("encoder.conv_in.weight")
    state["head.weight"] = state["head.weight"][:3]
    state["tokens.weight"] = state["tokens.weight"].astype(np.int32)
    state["loss.discriminator.weight"] = np.zeros(2)
    with pytest.raises(ValueError) as error:
        to_tree(TABLE, TARGET, state)
    text = str(error.value)
    assert "5 problems" in text
    assert (
        "missing 'encoder.conv_in.weight' (our params/encoder/conv_in/kernel); nearest on the other side: "
        "'encoder.conv_im.weight'" in text
    )
    assert (
        "unexpected 'encoder.conv_im.weight' (4, 2, 3, 3); nearest on the other side: 'encoder.conv_in.weight'" in text
    )
    assert "unexpected 'loss.discriminator.weight' (2,)" in text
    assert (
        "misshapen 'head.weight' (our params/head/kernel): its shape (3, 4) becomes (4, 3), the model has (4, 5)"
        in text
    )
    assert "misshapen 'tokens.weight' (our params/embed/embedding): it holds int32, the model float32" in text


def test_a_table_that_does_not_cover_the_model_or_names_twice_is_an_error():
    with pytest.raises(ValueError, match="no rule of the table matches our params/a/kernel"):
        to_tree((), {"params": {"a": {"kernel": leaf(1, 1)}}}, {})
    table = (Rule(r"params/\w/kernel", "same.weight"),)
    target = {"params": {"a": {"kernel": leaf(1, 1)}, "b": {"kernel": leaf(1, 1)}}}
    with pytest.raises(ValueError, match="same.weight is given to params/a/kernel, params/b/kernel"):
        to_tree(table, target, {"same.weight": np.zeros((1, 1))})


def test_a_variable_that_files_may_lack_is_made_from_the_rest():
    target = {"codes": leaf(2, 3), "averages": leaf(2, 3), "ready": leaf(dtype=jnp.bool_)}
    table = (
        Rule("codes", "embed", engine.transpose(1, 0)),
        Rule("averages", "sums", engine.transpose(1, 0), absent=lambda match, state, want: state["embed"].T),
        Rule("ready", None, absent=lambda match, state, want: np.ones(want.shape, bool)),
    )
    embed = np.arange(6, dtype=np.float32).reshape(3, 2)
    whole = to_tree(table, target, {"embed": embed, "sums": -embed})
    np.testing.assert_array_equal(whole["averages"], -embed.T)
    assert whole["ready"]
    np.testing.assert_array_equal(to_tree(table, target, {"embed": embed})["averages"], embed.T)
    assert set(to_official(table, whole)) == {"embed", "sums"}
    assert engine.official_names(table, target) == {"codes": "embed", "averages": "sums"}
    with pytest.raises(ValueError, match="missing 'embed'"):
        to_tree(table, target, {"sums": embed})
    with pytest.raises(ValueError, match="neither an official tensor nor a value"):
        Rule("ready", None)


def test_a_table_may_depend_on_the_depth_of_the_model_and_on_the_names_of_the_file():
    def table(ours, official):
        depth = sum(path.startswith("block") for path in ours)
        suffix = ":0" if any(name.endswith(":0") for name in official) else ""
        return (Rule(r"(block\d)", rf"\1{suffix}"), Rule("out", f"layers.{depth}{suffix}"))

    target = {"block0": leaf(2), "block1": leaf(2), "out": leaf(2)}
    state = {"block0": np.zeros(2), "block1": np.ones(2), "layers.2": np.full(2, 2.0)}
    tree = to_tree(table, target, state)
    assert tree["out"][0] == 2
    assert to_official(table, tree).keys() == state.keys()
    assert to_tree(table, target, {f"{name}:0": value for name, value in state.items()})["block1"][0] == 1


def test_values_take_the_dtype_of_the_model():
    target = {"params": {"a": {"kernel": leaf(2, 1, dtype=jnp.bfloat16)}, "steps": leaf(dtype=jnp.int32)}}
    table = (Rule(r"params/(a)/kernel", r"\1.weight"), Rule(r"params/(steps)", r"\1"))
    tree = to_tree(table, target, {"a.weight": np.ones((1, 2), np.float16), "steps": np.int64(5)})
    assert tree["params"]["a"]["kernel"].dtype == jnp.bfloat16
    assert tree["params"]["steps"].dtype == np.int32


names = st.lists(st.from_regex(r"[a-z]{1,3}", fullmatch=True), min_size=1, max_size=4, unique=True)


@settings(max_examples=40, deadline=None)
@given(names, st.integers(1, 5), st.integers(0, 3))
def test_any_model_round_trips(modules, features, spatial):
    target = {"params": {}}
    node = target["params"]
    for module in modules:
        node[module] = {"kernel": leaf(*range(1, spatial + 1), 2, features), "bias": leaf(features)}
        node = node[module]
    table = (Rule(r"params/(.+)/\w+", r"\1.{leaf}"),)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda want: rng.normal(size=want.shape).astype(np.float32), target)
    state = to_official(table, tree)
    back = to_tree(table, target, state)
    jax.tree.map(np.testing.assert_array_equal, tree, back)


def test_tables_see_scanned_layers_one_by_one():
    table = (
        Rule(r"params/net/layers/(\d+)/(\w+)/\w+", r"blocks.\1.\2.{leaf}"),
        Rule(r"params/net/norm/\w+", r"norm.{leaf}"),
    )
    target = {"params": {"net": {"layers": {"fc": {"kernel": leaf(2, 3, 4)}}, "norm": {"scale": leaf(3)}}}}
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=(4, 3)).astype(np.float32) for name in ("blocks.0.fc.weight", "blocks.1.fc.weight")}
    state["norm.weight"] = np.ones(3, np.float32)
    tree = to_tree(table, target, state)
    kernels = tree["params"]["net"]["layers"]["fc"]["kernel"]
    np.testing.assert_array_equal(kernels, [state["blocks.0.fc.weight"].T, state["blocks.1.fc.weight"].T])
    back = to_official(table, jax.tree.map(jnp.asarray, tree))
    assert back.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(back[name], state[name])
    short = {name: value for name, value in state.items() if "1" not in name}
    with pytest.raises(ValueError, match=r"missing 'blocks.1.fc.weight' \(our params/net/layers/1/fc/kernel\)"):
        to_tree(table, target, short)
    with pytest.raises(ValueError, match="unexpected 'blocks.2.fc.weight'"):
        to_tree(table, target, state | {"blocks.2.fc.weight": state["blocks.0.fc.weight"]})
