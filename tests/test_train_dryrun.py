"""Runs without their devices: memory and traffic read from compiled programs."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import vtp_large
from tokenizers.parallel import mesh as meshes
from tokenizers.parallel import traffic
from tokenizers.train import dryrun, loop


def sums_in_a_loop(mesh, width=64):
    """Eight steps, each of which sums a matrix product over the devices."""
    rows = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def run(x, w):
        def step(x, w):
            y = x @ w
            return jax.lax.with_sharding_constraint(y, rows), None

        return jax.lax.scan(step, x, w)[0]

    x = jax.ShapeDtypeStruct((16, width), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((8, width, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    return jax.jit(run).lower(x, w).compile()


def test_what_a_loop_sends_counts_as_often_as_it_runs():
    mesh = meshes.make_mesh(data=1, fsdp=8)
    with jax.set_mesh(mesh):
        found = traffic.transfers(sums_in_a_loop(mesh))
    looped = [transfer for transfer in found if transfer.times == 8]
    assert looped, found
    # Whoever sums up, a device gets the product (16, 64) whole, or its eighth of it, in every step.
    assert all(transfer.size in (16 * 64 * 4, 16 * 8 * 4) for transfer in looped), looped
    total = traffic.bytes_by_kind(found)
    assert sum(total.values()) >= 8 * 16 * 8 * 4


def test_a_program_of_one_device_sends_nothing():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile()
    assert traffic.transfers(compiled) == []
    assert traffic.peak_bytes(compiled) >= 2 * 64


def test_meshes_in_words():
    assert dryrun.mesh_fields("data:8,fsdp:4,split:width") == {"data": 8, "fsdp": 4, "split": "width"}
    with pytest.raises(ValueError, match=r"unknown axis of --mesh 'fdsp'. Did you mean 'fsdp'\?"):
        dryrun.mesh_fields("fdsp:4")
    with pytest.raises(ValueError, match="data takes a number of devices"):
        dryrun.mesh_fields("data:eight")


def test_shapes_stand_for_data_and_weights():
    """LPIPS without its file, and pictures from a folder that does not exist."""
    config = vtp_large.get_config("smoke")
    config.loss.perceptual = "lpips_vgg"
    config.data.update({"source": "captions", "path": "nowhere"})
    config.pretraining.distillation.weight = 0.0
    config.mesh.update({"data": 4, "fsdp": 2, "smallest": 1024})
    (program,) = dryrun.compile_steps(config)
    assert program.inputs == "stream 'pairs': pixels (16, 1, 64, 64, 3), texts (16, 24)"
    assert program.state < program.peak < 2**30
    assert program.traffic["all-gather"] > 0  # parameters
    assert program.traffic["all-reduce"] > 0  # gradients


@pytest.mark.slow
def test_vtp_large_fits_64_devices():
    """Per device, with the batch that the config states: an H100-like 80 GB and a v5p-like 95 GB."""
    command = [sys.executable, "train.py", "--config=configs/vtp_large.py", "--dry_run", "--mesh=data:8,fsdp:8"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, state = map(float, re.search(r"memory per device: ([\d.]+) GiB, of these the state ([\d.]+)", said).groups())
    sent = {kind: float(size) for kind, size in re.findall(r"([a-z-]+) (\d+\.\d+)(?:,|$)", said, re.MULTILINE)}
    assert peak * 2**30 < 45e9, said  # half of the smaller one; observed 36.6 GiB
    assert state < 2, said
    # Parameters come whole to where they are used, once, and gradients are summed: neither depends on the batch.
    assert sent["all-gather"] < 6, said
    assert sent["all-reduce"] < 9, said


def test_large_configs_say_what_data_they_need(tmp_path):
    """At once, before devices, folders or compilation: which field, which formats, and what runs without."""
    with pytest.raises(ValueError, match="config.data.path is empty, and source 'captions'") as error:
        loop.run(vtp_large.get_config(), tmp_path / "run")
    for word in ("captions", "array_record", "parquet", "tar", ":smoke"):
        assert word in str(error.value)
    assert not (tmp_path / "run").exists()
