"""A run that is killed, stopped or restarted ends where the uninterrupted one ends, bit for bit."""

import json
import pathlib
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_run

STEPS = 24
OPTIONS = (f"--config.steps={STEPS}", "--config.evaluation.every=6", "--config.checkpoint.every=2")


def finish(process, code=0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(folder, output) of the run that nothing happens to: moving-average codebook, discriminator, images and clips."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    return folder, finish(tiny_run.start(folder, *OPTIONS, argument="ema"))


def arrays(folder, step=STEPS):
    """Every array of a checkpoint by item and path."""
    found = {}
    for item in sorted((folder / "checkpoints" / str(step)).iterdir()):
        if (item / "_METADATA").exists():
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                restored = reader.restore(item)
            for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
                found[f"{item.name}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return found


def same_run(folder, reference):
    assert tiny_run.curve(folder) == tiny_run.curve(reference)
    ours, theirs = arrays(folder), arrays(reference)
    assert len({name.split("[")[0] for name in ours}) == 6  # params ema model_state optimizer adversary counters
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert not different, different
    for item in ("data", "meta"):
        texts = [(where / "checkpoints" / str(STEPS) / item / "metadata").read_text() for where in (folder, reference)]
        assert json.loads(texts[0]) == json.loads(texts[1])


def wait_for(process, happened):
    """Until something is true of the run, or it is over; whether it became true."""
    while process.poll() is None:
        if happened():
            return True
        time.sleep(0.002)
    return False


def lines(folder: pathlib.Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def saving(folder: pathlib.Path) -> bool:
    """Whether a checkpoint is being written right now."""
    return any(".orbax-checkpoint-tmp" in entry.name for entry in (folder / "checkpoints").glob("*"))


def test_kill_nine_at_any_moment(reference, tmp_path):
    """Killed before the first checkpoint, in the middle of saves, between steps; then the same command to the end."""
    folder = tmp_path / "run"
    rng = np.random.default_rng()
    moments = [
        lambda: (folder / "config.json").exists(),
        lambda: saving(folder),
        lambda: saving(folder) and rng.random() < 0.3,
        lambda: lines(folder) > 14 + rng.integers(8),
    ]
    killed = 0
    for happened in moments:
        process = tiny_run.start(folder, *OPTIONS, argument="ema")
        if wait_for(process, happened):
            time.sleep(float(rng.uniform(0, 0.05)))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        process.communicate()
    assert killed >= 3
    finish(tiny_run.start(folder, *OPTIONS, argument="ema"))
    same_run(folder, reference[0])
    left = [entry.name for entry in (folder / "checkpoints").iterdir() if not entry.name.isdigit()]
    assert not left, left  # what killed saves had left is gone


def test_sigterm_saves_and_exits_cleanly(reference, tmp_path):
    folder = tmp_path / "run"
    rare = [*OPTIONS[:2], "--config.checkpoint.every=0", "--stopped_status=75"]
    process = tiny_run.start(folder, *rare, argument="ema")
    assert wait_for(process, lambda: lines(folder) >= 5)
    process.send_signal(signal.SIGTERM)
    output = finish(process, code=75)
    assert "asked to stop: saved step" in output
    (saved,) = [int(entry.name) for entry in (folder / "checkpoints").iterdir()]
    assert 5 <= saved < STEPS
    assert lines(folder) >= saved
    finish(tiny_run.start(folder, *OPTIONS, argument="ema"))
    same_run(folder, reference[0])


def test_each_program_is_compiled_once_per_start(reference):
    compiled = [line.split(" in ")[0] for line in reference[1].splitlines() if line.startswith("compiled the step")]
    assert sorted(compiled) == [
        f"compiled the step for pixels (8, {frames}, 16, 16, 3), with the discriminator" for frames in (1, 3)
    ]


def test_the_run_explains_itself(reference):
    folder, output = reference
    assert {entry.name for entry in folder.iterdir()} >= {"config.json", "summary.txt", "README.txt", "metrics.jsonl"}
    assert f"step {STEPS}/{STEPS}  generator" in output
    for word in (
        "first step after",
        "seconds_per_step",
        "frames_per_second",
        "left 0:",
        "compiled the step",
        "GFLOP",
        "held_out psnr",
    ):
        assert word in output
    assert "Traceback" not in output
    assert json.loads((folder / "config.json").read_text())["steps"] == STEPS
    curve = tiny_run.curve(folder)
    assert [line["step"] for line in curve if "loss/generator" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in curve if "held_out/psnr" in line] == [6, 12, 18, 24]


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_do_and_can_be_prolonged(reference, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reference[0], folder)
    before = tiny_run.curve(folder)
    assert "compiled" not in finish(tiny_run.start(folder, *OPTIONS, argument="ema"))
    assert tiny_run.curve(folder) == before
    more = ["--config.steps=26", *OPTIONS[1:], "--config.mesh.fsdp=2", "--config.mesh.smallest=1"]
    finish(tiny_run.start(folder, *more, argument="ema", devices=2))  # another mesh than the one that saved
    after = tiny_run.curve(folder)
    assert after[: len(before)] == before
    assert [line["step"] for line in after[len(before) :]] == [25, 26, 26]
    changed = tiny_run.start(folder, *OPTIONS, "--config.optimizer.lr=0.5", "--config.seed=3", argument="ema")
    output = finish(changed, code=1)
    assert "holds a run with another config" in output
    assert "optimizer.lr: 0.01 -> 0.5" in output
    assert "seed: 0 -> 3" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_the_quickstart_killed_on_a_busy_machine_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    """At real size threads share the work of every kernel; two runs at once make them wait for each other."""
    options = (
        "--config.steps=36",
        "--config.log.every=1",
        "--config.discriminator.start=10",
        "--config.discriminator.generator_start=12",
        "--config.evaluation.every=18",
        "--config.evaluation.final_report=False",
        "--config.checkpoint.every=12",
    )
    names = ("whole", "killed")
    start = {
        name: lambda name=name: tiny_run.start(tmp_path / name, *options, config="configs/quickstart.py", XLA_FLAGS="")
        for name in names
    }
    whole, killed = (start[name]() for name in names)
    assert wait_for(killed, lambda: lines(tmp_path / "killed") > 27)
    killed.kill()
    killed.communicate()
    finish(start["killed"]())
    finish(whole)
    assert tiny_run.curve(tmp_path / "killed") == tiny_run.curve(tmp_path / "whole")
    ours, theirs = (arrays(tmp_path / name, 36) for name in names)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not np.array_equal(ours[name], theirs[name])]


@pytest.mark.slow
def test_programs_are_kept_on_disk(tmp_path):
    cache = tmp_path / "cache"
    own = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_FLAGS")
    env = dict.fromkeys(own)  # what the tests set for themselves
    option = [f"--config.compilation_cache={cache}", "--config.steps=1", "--config.checkpoint.every=0"]
    times = []
    for name in ("first", "second"):
        output = finish(tiny_run.start(tmp_path / name, *option, argument="plain", **env))
        (line,) = [line for line in output.splitlines() if line.startswith("compiled the step")]
        times.append(float(line.split(" in ")[1].split(" s:")[0]))
        assert [entry for entry in cache.iterdir() if entry.name.startswith("jit_step")]
    assert times[1] < times[0] / 2, times
