"""Meshes, partition rules and what processes agree on."""

import functools
import signal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tokenizers.parallel import flops, multihost, platform, rules
from tokenizers.parallel import mesh as meshes
from tokenizers.parallel.constrain import constrain, whole

# --- mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 8, "data": 1}, (1, 8, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": 2, "fsdp": 2, "context": 2, "split": "time"}, (2, 2, 2)),
    ],
)
def test_mesh_has_named_axes_of_the_asked_sizes(sizes, shape):
    mesh = meshes.make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", f"context_{sizes.get('split', 'height')}")
    assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "do not use the 8 devices exactly"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 0}, "each must be positive"),
        ({"split": "heigth"}, "Did you mean 'height'"),
    ],
)
def test_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        meshes.make_mesh(**sizes)


def test_one_process_loads_whole_batches_and_every_device_gets_its_rows():
    mesh = meshes.make_mesh(data=2, fsdp=2, context=2)
    assert meshes.batch_share(mesh) == (0, 1)
    batch = np.arange(8 * 3, dtype=np.uint8).reshape(8, 3)
    whole = meshes.global_batch(mesh, batch)
    np.testing.assert_array_equal(whole, batch)
    assert {shard.data.shape for shard in whole.addressable_shards} == {(2, 3)}  # 4 parts, twice each
    with pytest.raises(ValueError, match="a batch of 6 items cannot be split over 4 devices.*multiple of 4"):
        meshes.global_batch(mesh, batch[:6])


@pytest.mark.parametrize(("shape", "shares"), [((4, 1, 2), [(0, 2), (1, 2)]), ((1, 2, 4), [(0, 2), (1, 2)])])
def test_processes_load_different_rows(shape, shares, monkeypatch):
    for process, share in enumerate(shares):
        assert _share_of(shape, process, monkeypatch) == share


def test_processes_within_one_context_load_the_same_rows(monkeypatch):
    assert {_share_of((1, 1, 8), process, monkeypatch) for process in (0, 1)} == {(0, 1)}


def _share_of(shape, process, monkeypatch):
    """`batch_share` for 8 devices, the first 4 of which belong to process 0."""
    mesh = meshes.make_mesh(*shape)
    mine = [device for device in mesh.devices.flat if (device.id >= 4) == bool(process)]

    def addressable(self, parts):
        everywhere = self.devices_indices_map(parts)
        return {device: everywhere[device] for device in mine}

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", addressable)
    return meshes.batch_share(mesh)


# --- rules


def test_default_splits_large_arrays_along_their_largest_divisible_axis():
    mesh = meshes.make_mesh(data=2, fsdp=4)
    spec = lambda shape, smallest=1: rules.spec_for("a/kernel", shape, mesh, (), smallest)  # noqa: E731
    assert spec((3, 3, 64, 128)) == PartitionSpec(None, None, None, "fsdp")
    assert spec((3, 3, 256, 128)) == PartitionSpec(None, None, "fsdp", None)
    assert spec((64, 64)) == PartitionSpec(None, "fsdp")  # the last of equals: output channels
    assert spec((5, 1001, 8)) == PartitionSpec(None, None, "fsdp")  # 1001 is larger, but 4 does not divide it
    assert spec((3, 5)) == PartitionSpec()
    assert spec((64, 64), smallest=64 * 64 + 1) == PartitionSpec()
    assert rules.spec_for("a", (64, 64), meshes.make_mesh(), (), 1) == PartitionSpec()  # no fsdp


def test_first_matching_rule_decides():
    mesh = meshes.make_mesh(data=2, fsdp=2, context=2)
    chosen = (("decoder/.*kernel", (None, "data")), ("codebook", "replicate"), ("decoder", "fsdp"))
    spec = lambda path: rules.spec_for(path, (8, 8), mesh, chosen, 1)  # noqa: E731
    assert spec("params/decoder/conv/kernel") == PartitionSpec(None, "data")
    assert spec("optimizer/mu/decoder/conv/kernel") == PartitionSpec(None, "data")  # optimizer and EMA follow
    assert spec("codebook") == PartitionSpec()
    assert spec("encoder") == PartitionSpec(None, "fsdp")
    assert rules.spec_for("x", (8,), mesh, (("x", ("context",)),), 1) == PartitionSpec("context_height")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("a", "fsdpp"), "accepted: 'fsdp', 'replicate', or one mesh axis or None per axis"),
        (("a", ("fsdp",)), "accepted: 'fsdp', 'replicate'"),
        (("a", ("fdsp", None)), "Did you mean 'fsdp'"),
        (("a", (None, "fsdp")), "splits 6 of its shape .* over 4 devices"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        rules.spec_for("a", (8, 6), meshes.make_mesh(data=2, fsdp=4), (rule,), 1)


def test_unused_rule_is_refused_and_the_partition_is_printed():
    tree = {"decoder": {"kernel": jnp.zeros((8, 16))}, "bias": jnp.zeros(3)}
    with pytest.raises(ValueError, match="'decodr' matches no parameter; the nearest are decoder/kernel"):
        rules.check_used((("decodr", "fsdp"),), tree)
    rules.check_used((("decoder", "fsdp"),), tree)
    mesh = meshes.make_mesh(data=2, fsdp=4)
    assert rules.describe(tree, mesh, smallest=1) == f"decoder/kernel (8, 16) {PartitionSpec(None, 'fsdp')}"
    assert rules.describe(tree, mesh) == "every parameter is replicated"


# --- constrain


def test_constrain_follows_the_mesh_in_force():
    x = jnp.ones((8, 3, 4, 6, 2))
    names = ("batch", "time", "height", "width", "channel")
    chex.assert_trees_all_equal(constrain(x, *names), x)  # no mesh: nothing happens
    places = {}
    for split in ("height", "width", "time"):
        mesh = meshes.make_mesh(data=2, fsdp=2, context=2, split=split)
        with jax.set_mesh(mesh):
            places[split] = jax.jit(lambda x: constrain(x, *names))(x).sharding.spec
    batch = ("data", "fsdp")
    assert places["height"] == PartitionSpec(batch, None, ("context_height",))
    assert places["width"] == PartitionSpec(batch, None, None, ("context_width",))
    assert places["time"] == PartitionSpec(batch)  # 2 does not divide 3 frames
    with pytest.raises(ValueError, match="got 1 names"):
        constrain(x, "batch")


def test_gathered_kernels_make_right_convolutions():
    """Value and gradients of a convolution whose image is split along its height and whose kernel is stored split."""
    mesh = meshes.make_mesh(data=2, fsdp=2, context=2)
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 8))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 8, 8))

    def loss(x, kernel):
        axes = ("NHWC", "HWIO", "NHWC")
        return jnp.sin(jax.lax.conv_general_dilated(x, whole(kernel), (1, 1), "SAME", dimension_numbers=axes)).sum()

    compute = jax.value_and_grad(loss, (0, 1))
    expected = jax.jit(compute)(x, kernel)
    images = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context_height"))
    for spec in (PartitionSpec(None, None, "fsdp"), PartitionSpec(None, None, None, "fsdp")):
        kernels = NamedSharding(mesh, spec)
        with jax.set_mesh(mesh):
            step = jax.jit(compute, out_shardings=(None, (images, kernels)))
            found = step(jax.device_put(x, images), jax.device_put(kernel, kernels))
        assert found[1][1].sharding.spec == spec  # stored split again
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)  # sums of 1000 terms in another order


# --- processes


def test_what_the_first_process_refuses_is_raised():
    done = []
    multihost.on_main(lambda: done.append(1))
    assert done == [1]

    def refuse():
        raise ValueError("not this folder")

    with pytest.raises(ValueError, match="not this folder"):
        multihost.on_main(refuse)


def test_first_signal_asks_and_the_second_interrupts(request):
    # Shells start background jobs with SIGINT ignored, which would be restored here.
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # To this thread: one that is sent to the process may arrive in another, and be noticed here some time later.
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with multihost.stop_on_signal() as stop:
        assert not stop(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop(2)
    with multihost.stop_on_signal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_unknown_modes_and_precisions_are_refused():
    off = {"mode": "off", "coordinator": "", "processes": 1, "process": 0}
    multihost.initialize(off)
    with pytest.raises(ValueError, match="Did you mean 'manual'"):
        multihost.initialize(off | {"mode": "manul"})
    with pytest.raises(ValueError, match="coordinator='host:port'"):
        multihost.initialize(off | {"mode": "manual"})
    with pytest.raises(ValueError, match="unknown precision 'float23'. Did you mean 'float32'"):
        platform.compute_dtype("float23")
    assert platform.compute_dtype() == jnp.float32
    assert platform.compute_dtype("bfloat16") == jnp.bfloat16


def test_programs_of_the_package_do_without_the_cpu_library_whose_sums_race():
    def total(x):
        return jnp.sum(jnp.square(jnp.broadcast_to(x, (3, *x.shape))))

    x = jnp.ones((64, 64, 64))
    assert "__ynn_fusion" in jax.jit(total).lower(x).compile().as_text(), "XLA's default has changed: look again"
    ours = platform.jit(total)
    assert "__ynn_fusion" not in ours.lower(x).compile().as_text()
    assert float(ours(x)) == 3 * x.size


def test_a_program_of_the_package_goes_into_a_users_own_transformations():
    square = platform.jit(lambda x: jnp.sum(x * x))
    x = jnp.arange(3.0)
    assert float(jax.jit(lambda x: square(x) + 1)(x)) == 6.0
    assert float(jax.jit(lambda: square(np.arange(3.0)))()) == 5.0  # nothing that is given to it is traced
    chex.assert_trees_all_close(jax.grad(square)(x), 2 * x)
    chex.assert_trees_all_close(jax.vmap(square)(x[:, None]), x**2)


def test_operations_are_those_that_are_written_down():
    """Products in loops count as often as they run; a gradient costs two products for each one of the value."""

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    x, w = jnp.ones((16, 32)), jnp.ones((5, 32, 32))
    forward = 5 * 2 * 16 * 32 * 32
    assert flops.count(jax.make_jaxpr(layers)(x, w)) == forward
    # The first layer's input needs no gradient, but the loop does not know its first layer.
    assert flops.count(jax.make_jaxpr(jax.grad(layers, argnums=1))(x, w)) == 3 * forward
    remat = jax.value_and_grad(jax.checkpoint(lambda x, w: jnp.tanh(x @ w).sum()))
    assert flops.count(jax.make_jaxpr(remat)(x, w[0])) == 3 * 2 * 16 * 32 * 32  # twice forward, once back


@pytest.mark.parametrize(("strides", "groups"), [((1, 1), 1), ((2, 2), 1), ((1, 1), 4)])
def test_gradients_of_convolutions_cost_what_they_cost(strides, groups):
    conv = nn.Conv(8, (3, 3), strides=strides, feature_group_count=groups)
    x = jnp.ones((2, 16, 16, 4))
    variables = jax.eval_shape(conv.init, jax.random.key(0), x)
    loss = lambda variables, x: (conv.apply(variables, x) ** 2).sum()  # noqa: E731
    once = 2 * (2 * 16 * 16 // strides[0] ** 2) * 8 * 9 * 4 // groups
    assert flops.count(jax.make_jaxpr(loss)(variables, x)) == once
    assert flops.count(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(variables, x)) == 3 * once


def test_what_no_result_needs_is_not_counted():
    x, layers = jnp.ones((16, 32)), [jnp.ones((32, 32))] * 3

    def of_the_last(layers):
        _, pull = jax.vjp(lambda layers: functools.reduce(lambda y, w: jnp.tanh(y @ w), layers, x), layers)
        return pull(jnp.ones((16, 32)))[0][-1]

    # Three products forward, one for the gradient of the last layer; the pull writes down four more.
    assert flops.count(jax.make_jaxpr(of_the_last)(layers)) == 4 * 2 * 16 * 32 * 32
    assert flops.count(jax.make_jaxpr(jax.jit(of_the_last))(layers)) == 4 * 2 * 16 * 32 * 32
