"""Checkpoints: whole, exact, on any mesh, the best and the last, and clear about what is wrong with a broken one."""

import json
import re
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import toys

import tokenizers
from tokenizers.train import build, checkpoint
from tokenizers.train.config import to_dict

META = ({"batches": 3, "frames": 7, "best": [], "fingerprint": "f"}, {"model": {"name": "tiny"}})


def sharded(argument="ema", **sizes):
    config = tiny_run.get_config(argument)
    config.mesh.update({"smallest": 1, **sizes})
    return to_dict(config)


def make_state(config):
    from tokenizers.parallel import mesh as meshes

    mesh = meshes.from_config(config["mesh"])
    with jax.set_mesh(mesh):
        recipe = build.recipe(config)
        state = build.initial_state(config, recipe, mesh)
        return state, build.abstract_state(config, recipe, mesh)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, state) of a run with one checkpoint, written by 8 devices under fsdp."""
    folder = tmp_path_factory.mktemp("run")
    config = sharded(data=1, fsdp=8)
    (folder / "config.json").write_text(json.dumps(config))
    state, _ = make_state(config)
    # Every leaf different from every other and from a fresh state.
    leaves, tree = jax.tree.flatten(state)
    leaves = [jax.device_put((leaf + i).astype(leaf.dtype), leaf.sharding) for i, leaf in enumerate(leaves)]
    state = jax.tree.unflatten(tree, leaves).replace(step=state.step + 3)
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(state, *META, score=20.0)
    return folder, state


@pytest.fixture
def broken(run, tmp_path):
    """A copy of the run that a test may damage."""
    return shutil.copytree(run[0], tmp_path / "run")


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "context": 2}, {"data": 8}, {"fsdp": 4, "data": 2, "split": "time"}],
)
def test_a_checkpoint_restores_onto_another_mesh(run, sizes):
    folder, saved = run
    _, target = make_state(sharded(**sizes))
    with checkpoint.Checkpoints(folder) as checkpoints:
        state, data, meta = checkpoints.restore(target)
    assert (data, meta) == META
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(saved))
    jax.tree.map(lambda leaf, wanted: chex.assert_equal(leaf.sharding, wanted.sharding), state, target)
    if sizes.get("fsdp", 1) > 1:
        assert any("fsdp" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.optimizer))


def test_inference_reads_the_average_alone(run):
    """On one device, without optimizer and discriminator: the other items may even be gone."""
    folder, saved = run
    tokenizer = tokenizers.load(folder)
    chex.assert_trees_all_equal(jax.device_get(tokenizer.params), jax.device_get(saved.ema))
    chex.assert_trees_all_equal(
        jax.device_get(tokenizer.variables["codebook"]), jax.device_get(saved.model_state["codebook"])
    )
    with pytest.raises(ValueError, match="unknown step of .* 4"):
        tokenizers.load(folder, step=4)


def test_weights_of_a_run_start_another(run):
    folder, saved = run
    config = sharded(data=2, fsdp=4) | {"init_from": str(folder)}
    state, _ = make_state(config)
    ema = jax.device_get(saved.ema)
    chex.assert_trees_all_equal(jax.device_get(state.params["model"]), ema)
    chex.assert_trees_all_equal(jax.device_get(state.ema), ema)
    assert int(state.step) == 0
    chex.assert_trees_all_equal(jax.device_get(state.model_state), jax.device_get(saved.model_state))
    for own, other in zip(jax.tree.leaves(state.params["model"]), jax.tree.leaves(state.ema), strict=True):
        assert own.unsafe_buffer_pointer is not other.unsafe_buffer_pointer  # both are donated
    config["model"] = config["model"] | {"channels": 16}
    with pytest.raises(
        ValueError, match=r"holds another model; .* arrays do not fit:\s+params/conv_in/bias: .*\(16,\)"
    ):
        make_state(config)


def test_the_last_and_the_best_are_kept(tmp_path):
    counters = {name: jnp.zeros((), jnp.int32) for name in ("skipped", "skipped_in_a_row")}
    state, _ = make_state(sharded("plain"))
    scores = {1: None, 2: 30.0, 3: 25.0, 4: None, 5: 28.0, 6: None, 7: None}
    with checkpoint.Checkpoints(tmp_path, keep_last=2, keep_best=2) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(state.replace(step=jnp.int32(step), **counters), *META, score=score)
    with checkpoint.Checkpoints(tmp_path, keep_last=2, keep_best=2) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6, 7]
        assert checkpoints.latest() == 7
        # A start later the best are still known.
        checkpoints.save(state.replace(step=jnp.int32(8), **counters), *META, score=10.0)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 7, 8]


def test_saved_values_are_those_of_the_moment(tmp_path):
    """The next step overwrites the donated buffers while the save is still being written."""
    config = to_dict(tiny_run.get_config("plain"))
    mesh, recipe, state, step = tiny_run.parts(config, jax.devices()[:1])
    pixels = np.random.default_rng(0).integers(0, 256, (8, 1, 16, 16, 3), np.uint8)
    expected = {}
    with checkpoint.Checkpoints(tmp_path, keep_last=4) as checkpoints:
        for number in range(1, 5):
            state, _ = step(state, pixels)
            expected[number] = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
            checkpoints.save(state, *META)
    with jax.set_mesh(mesh):
        config["mesh"]["data"] = 1
        target = build.abstract_state(config, recipe, mesh)
    with checkpoint.Checkpoints(tmp_path, keep_last=4) as checkpoints:
        for number in range(1, 5):
            found, *_ = checkpoints.restore(target, number)
            chex.assert_trees_all_equal(jax.device_get(found), expected[number])


# --- broken ones


def refused(folder, target, *parts):
    with checkpoint.Checkpoints(folder) as checkpoints, pytest.raises(ValueError) as caught:
        checkpoints.restore(target)
    for part in (str(folder / "checkpoints" / "3"), "cannot be read", *parts):
        assert part in str(caught.value), str(caught.value)


@pytest.fixture(scope="module")
def target():
    return make_state(sharded(data=1, fsdp=8))[1]


def test_a_truncated_array_is_refused_by_name(tmp_path):
    """In a process of its own: when one read fails orbax abandons the others, and Python reports them at any time."""
    folder = shutil.copytree(toys.run(), tmp_path / "run")
    step = folder / "checkpoints" / "2"
    largest = max((step / "ema" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:20])
    command = [sys.executable, "eval.py", f"--checkpoint={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=toys.ROOT)
    assert done.returncode == 1
    for part in (f"the checkpoint {step} cannot be read", "ema", "start anew with another --workdir"):
        assert part in done.stderr


@pytest.mark.parametrize("item", ["params", "optimizer", "adversary", "data", "counters"])
def test_a_missing_item_is_refused_by_name(broken, target, item):
    shutil.rmtree(broken / "checkpoints" / "3" / item)
    refused(broken, target, f"{broken / 'checkpoints' / '3' / item} is missing")


def test_unreadable_json_is_refused_by_name(broken, target):
    path = broken / "checkpoints" / "3" / "data"
    (path / "metadata").write_text('{"batches": ')
    refused(broken, target, str(path))


def test_another_models_checkpoint_is_refused(run, broken):
    config = sharded(data=1, fsdp=8)
    config["model"] = config["model"] | {"channels": 16}
    refused(broken, make_state(config)[1], "another model", "conv_in/bias: this config has (16,), the file (8,)")
    plain = make_state(sharded("plain", data=1, fsdp=8))[1]  # FSQ instead of a codebook: fewer items
    with checkpoint.Checkpoints(broken) as checkpoints, pytest.raises(ValueError) as caught:
        checkpoints.restore(plain)
    assert "this config has no model_state, adversary" in str(caught.value)


def test_an_older_step_is_offered(broken, target):
    shutil.copytree(broken / "checkpoints" / "3", broken / "checkpoints" / "2")
    shutil.rmtree(broken / "checkpoints" / "3" / "ema")
    refused(broken, target, "To go on from step 2, move that folder away and run the same command again")
    with pytest.raises(ValueError, match=re.escape(str(broken / "checkpoints" / "3" / "ema"))):
        tokenizers.load(broken)
    shutil.move(broken / "checkpoints" / "3", broken / "aside")
    with checkpoint.Checkpoints(broken) as checkpoints:
        checkpoints.restore(target)


def test_folders_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json: it is not a run of train.py"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(sharded()))
    with pytest.raises(ValueError, match="no checkpoints/ folder.*no step was saved yet"):
        tokenizers.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        tokenizers.load(tmp_path)
    (tmp_path / "config.json").write_text('{"a":')
    with pytest.raises(ValueError, match="config.json is not readable JSON"):
        tokenizers.load(tmp_path)


def test_a_failing_save_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path)

    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints._manager, "close", fail)
    with pytest.raises(FloatingPointError, match="NaN") as caught, checkpoints:
        raise FloatingPointError("NaN")
    assert "disk full" in caught.value.__notes__[0]
    with pytest.raises(OSError, match="disk full"), checkpoints:
        pass
