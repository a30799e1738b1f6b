"""The same run on one device and on eight, however the mesh cuts it."""

import chex
import jax
import numpy as np
import pytest
import tiny_run
from jax.sharding import PartitionSpec

STRATEGIES = {
    "data 8": {"data": 8},
    "fsdp 8": {"data": 1, "fsdp": 8},
    "data 2, fsdp 4": {"data": 2, "fsdp": 4},
    "height 2, data 4": {"data": 4, "context": 2, "split": "height"},
    "time 2, data 4": {"data": 4, "context": 2, "split": "time"},
    "width 2, data 4": {"data": 4, "context": 2, "split": "width"},
    "2 x 2 x 2": {"data": 2, "fsdp": 2, "context": 2, "split": "height"},
}
STEPS = 4


def tiny(argument="ema"):
    """Discriminator from the first step, moving-average codebook, adaptive weight, LeCam."""
    config = tiny_run.get_config(argument)
    config.discriminator.update({"start": 0, "generator_start": 0, "lecam_weight": 0.1, "norm": "batch"})
    return config


def quickstart():
    """The quickstart's network and recipe, smaller."""
    from configs import quickstart

    config = quickstart.get_config("smoke")
    config.discriminator.start = config.discriminator.generator_start = 0
    return config


def trained(config, devices, sizes, frames, size, steps=STEPS):
    """(metrics of every step, last state) over a mesh; every array that can be is split, however small."""
    config.mesh.update({"smallest": 1, **sizes})
    mesh, _, state, step = tiny_run.parts(config, devices)
    curve = []
    for number in range(steps):
        coarse = np.random.default_rng(number).uniform(0, 255, (8, frames, 4, 4, 3))
        pixels = coarse.repeat(size // 4, axis=2).repeat(size // 4, axis=3).astype(np.uint8)
        state, metrics = step(state, pixels)
        curve.append(jax.device_get(metrics))
    return curve, state


def same(curve, expected):
    """Every metric of every step: losses, PSNR, gradient norms, adaptive weight. Sums run in another order."""
    for found, wanted in zip(curve, expected, strict=True):
        # Absolute: mean logits are near zero.
        chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert wanted["skipped"] == 0


@pytest.fixture(scope="module")
def alone():
    return trained(tiny(), jax.devices()[:1], {"data": 1}, 4, 16)


# The others cut along the same axes; together they take a minute.
QUICK = ("data 2, fsdp 4", "time 2, data 4", "2 x 2 x 2")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in STRATEGIES]


@pytest.mark.parametrize("name", ALL)
def test_eight_devices_give_the_losses_of_one(alone, name):
    curve, state = trained(tiny(), jax.devices(), STRATEGIES[name], 4, 16)
    same(curve, alone[0])
    assert alone[0][0]["loss/generator"] != alone[0][-1]["loss/generator"]
    chex.assert_trees_all_close(
        jax.device_get(state.model_state), jax.device_get(alone[1].model_state), rtol=1e-4, atol=1e-5
    )
    if STRATEGIES[name].get("fsdp", 1) > 1:
        for tree in (state.params, state.ema, state.optimizer, state.adversary.params, state.adversary.optimizer):
            assert any("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("frames", [1, 4])
def test_split_kernels_meet_split_images(frames):
    """Kernels split along their input channels, images along their height: XLA alone gets such convolutions wrong."""
    curves = []
    for devices, sizes in ((jax.devices()[:1], {"data": 1}), (jax.devices(), STRATEGIES["2 x 2 x 2"])):
        config = tiny()
        if len(devices) > 1:
            config.mesh.rules = (("(model|ema)/conv_(in|out)/kernel", (None, None, None, "fsdp", None)),)
        curves.append(trained(config, devices, sizes, frames, 16, steps=2)[0])
    same(curves[1], curves[0])


def test_placement_rules_of_the_config_are_followed():
    config = tiny()
    config.mesh.rules = (("conv_out/kernel", "replicate"), ("(model|ema)/conv_in/kernel", (None,) * 4 + ("data",)))
    _, _, state, _ = tiny_run.parts(_with(config, data=2, fsdp=4, smallest=1), jax.devices())
    for tree in (state.params["model"], state.ema, state.optimizer[1][0].mu["model"]):
        assert tree["conv_out"]["kernel"].sharding.spec == PartitionSpec()
        assert tree["conv_in"]["kernel"].sharding.spec == PartitionSpec(None, None, None, None, "data")
        assert "fsdp" in tree["conv_middle"]["kernel"].sharding.spec
    config.mesh.rules = (("conv_aut", "replicate"),)
    with pytest.raises(ValueError, match="sharding rule 'conv_aut' matches no parameter"):
        tiny_run.parts(config, jax.devices())
    config.mesh.rules = ("conv_out",)
    with pytest.raises(ValueError, match="each rule is a pair"):
        tiny_run.parts(config, jax.devices())


def _with(config, **sizes):
    config.mesh.update(sizes)
    return config


@pytest.mark.slow
def test_recomputation_changes_memory_and_nothing_else():
    curves = {}
    for remat in (False, True):
        config = quickstart()
        config.discriminator.name = ""
        config.model.remat = remat
        curves[remat], _ = trained(config, jax.devices()[:1], {"data": 1}, 1, 32, steps=2)
    same(curves[True], curves[False])


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_quickstart_network_gives_the_losses_of_one_device(name, frames):
    alone, _ = trained(quickstart(), jax.devices()[:1], {"data": 1}, frames, 32)
    curve, _ = trained(quickstart(), jax.devices(), STRATEGIES[name], frames, 32)
    for found, wanted in zip(curve, alone, strict=True):
        # The first reconstructions are nearly flat, and the discriminator's group norm divides by their spread: what
        # follows from its mean logit keeps fewer digits than the losses that are minimised.
        loose = {"logits/fake", "logits/real", "loss/fooling", "adaptive_weight", "grad_norm/discriminator"}
        for digits, names in ((1e-4, wanted.keys() - loose), (1e-2, loose)):
            pick = lambda metrics, names=names: {name: metrics[name] for name in names}  # noqa: E731
            chex.assert_trees_all_close(pick(found), pick(wanted), rtol=digits)
