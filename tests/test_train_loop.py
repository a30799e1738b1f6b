"""The loop around the step: what stops a run, what is cleaned up after it, what is kept, what may be absent."""

import logging
import pathlib

import jax
import numpy as np
import pytest
import tiny_run
from PIL import Image

import tokenizers
from tokenizers.data.pipeline import Batches
from tokenizers.train import checkpoint, log, loop


def config(**changes):
    """Images only, no discriminator, one device of the eight: what these tests look at is around the step."""
    made = tiny_run.get_config("plain")
    del made.data.streams["video"]
    made.mesh.update({"data": 1, "fsdp": 1})
    made.update_from_flattened_dict({"log.tensorboard": False} | changes)
    return made


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def closed(monkeypatch):
    """Starts of data iterators that were closed."""
    starts = []
    close = Batches.close

    def remember(self):
        starts.append(self._pipeline.split)
        close(self)

    monkeypatch.setattr(Batches, "close", remember)
    return starts


def steps(folder):
    return sorted(int(entry.name) for entry in (pathlib.Path(folder) / "checkpoints").iterdir() if entry.name.isdigit())


def test_a_run_reaches_its_end_and_cleans_up(tmp_path, closed, capsys):
    assert loop.run(config(), tmp_path) is True
    assert closed.count("train") == 1
    assert closed.count("held_out") == 1
    curve = tiny_run.curve(tmp_path)
    assert [line["step"] for line in curve] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [line["frames"] for line in curve if "frames" in line] == [8, 16, 24, 32, 40, 48]
    assert {entry.name for entry in (tmp_path / "pictures").iterdir()} == {"image_00000003.png", "image_00000006.png"}
    out = capsys.readouterr().out
    assert out.count("compiled the step") == 1
    assert "tokenizer tiny: 0.01" in out
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.reconstruct(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 16, 16, 3)


def test_a_run_that_only_produces_nan_stops_with_advice(tmp_path, closed):
    """A learning rate beyond all measure: after its first update every loss is infinite."""
    wild = config(
        **{"optimizer.lr": 1e30, "optimizer.warmup": 0, "steps": 50, "stop_after_skipped": 4, "log.every": 50}
    )
    with pytest.raises(
        FloatingPointError, match="4 steps in a row, up to step 5, .* --config.init_from=<this run>"
    ) as end:
        loop.run(wild, tmp_path)
    assert "loss/generator" in str(end.value)
    assert closed.count("train") == 1
    # The last checkpoint counts three skipped steps and holds the finite parameters of step 1.
    assert max(steps(tmp_path)) == 4
    ema = jax.tree.leaves(tokenizers.load(tmp_path).params)
    assert all(np.all(np.isfinite(leaf)) for leaf in ema)


def test_single_bad_batches_are_skipped_and_counted(tmp_path, monkeypatch):
    real = loop.make_step

    def poisoned(recipe):
        step = real(recipe)

        def with_bad_batches(state, frozen, inputs):
            pixels = inputs["pixels"].astype(np.float32) / 127.5 - 1
            bad = (state.step == 2) | (state.step == 4)
            return step(state, frozen, {"pixels": jax.numpy.where(bad, jax.numpy.nan, pixels)})

        return with_bad_batches

    monkeypatch.setattr(loop, "make_step", poisoned)
    assert loop.run(config(stop_after_skipped=2), tmp_path)
    curve = [line for line in tiny_run.curve(tmp_path) if "skipped" in line]
    assert [line["skipped"] for line in curve] == [0, 0, 1, 1, 2, 2]
    assert [line["skipped_in_a_row"] for line in curve] == [0, 0, 1, 0, 1, 0]
    assert [line["loss/generator"] is None for line in curve] == [False, False, True, False, True, False]
    # A skipped update does not advance the schedule.
    assert curve[3]["learning_rate"] == curve[2]["learning_rate"]


def test_a_profile_whose_window_outlives_the_run_is_written(tmp_path):
    loop.run(config(**{"profile.start": 1, "profile.steps": 100, "steps": 2, "evaluation.every": 0}), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    jax.profiler.start_trace(str(tmp_path / "again"))  # the first one has ended
    jax.profiler.stop_trace()


def test_what_fails_in_the_middle_leaves_a_resumable_run(tmp_path, closed, monkeypatch):
    compute = loop._Programs.__call__

    def fail(self, step, *rest):
        if step == 5:
            raise RuntimeError("device lost")
        return compute(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Programs, "__call__", fail)
        with pytest.raises(RuntimeError, match="device lost"):
            loop.run(config(), tmp_path)
    assert closed.count("train") == 1
    assert max(steps(tmp_path)) == 4
    assert loop.run(config(), tmp_path)
    assert [line["step"] for line in tiny_run.curve(tmp_path)] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_the_best_is_kept_even_between_two_saves(tmp_path, monkeypatch):
    scores = {1: 10.0, 2: 30.0, 3: 20.0, 4: 29.0, 5: 5.0, 6: 6.0}

    class Scored:
        def __init__(self, *_):
            pass

        def __call__(self, state):
            score = scores[int(state.step)]
            return score, {"held_out/psnr": score}, {}, {}

    monkeypatch.setattr(loop.build, "held_out", Scored)
    often = {"evaluation.every": 1, "checkpoint.every": 0, "checkpoint.keep_best": 2, "checkpoint.keep_last": 1}
    loop.run(config(**often), tmp_path)
    assert steps(tmp_path) == [2, 4, 6]
    with checkpoint.Checkpoints(tmp_path, 1, 2) as checkpoints:
        assert checkpoints.latest() == 6


def test_pictures_of_ones_own_need_no_held_out_part(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    changes = {"data.path": str(tmp_path / "photos"), "data.source": "auto", "data.held_out": "", "steps": 2}
    loop.run(config(**changes), tmp_path / "run")
    assert "nothing is measured while training" in capsys.readouterr().out
    assert not any("held_out/psnr" in line for line in tiny_run.curve(tmp_path / "run"))
    with pytest.raises(ValueError, match="no held-out data for .*photos"):
        loop.run(config(**changes, **{"evaluation.final_report": True}), tmp_path / "other")


def test_changed_data_is_refused_on_resume(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(photos / f"{number}.png")
    changes = {"data.path": str(photos), "data.source": "auto", "data.held_out": "0.3"}
    loop.run(config(**changes, steps=2), tmp_path / "run")
    (photos / "0.png").unlink()
    with pytest.raises(ValueError, match="the data of this run has changed since its checkpoint at step 2"):
        loop.run(config(**changes, steps=4), tmp_path / "run")


def test_nothing_is_written_for_a_config_that_cannot_run(tmp_path):
    for changes, message in (
        ({"data.streams.image.batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"data.streams.image.resolutions": ((18, 18),)}, "heights must be multiples of 4"),
        ({"discriminator.name": "patchgan"}, "unknown discriminator"),
        ({"steps": 0}, "config.steps=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.run(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_compiled_in_steady_state(tmp_path, monkeypatch):
    """Whatever batches hold and whichever bucket they are of: all programs are there after a round of everything."""
    events = []

    class Compilations(logging.Handler):
        def emit(self, record):
            if "Compiling" in record.getMessage():
                events.append(record.getMessage().split(" with ")[0])

    monkeypatch.setattr(log.RunLog, "progress", lambda self, step: events.append(step))
    logger, handler = logging.getLogger("jax"), Compilations()
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            made = config(**{"steps": 12, "evaluation.every": 4, "checkpoint.every": 4})
            made.data.streams.image.resolutions = ((16, 16), (16, 24))
            loop.run(made, tmp_path)
    finally:
        logger.removeHandler(handler)
    half = events.index(9)
    assert any(isinstance(event, str) for event in events[:half])
    assert not [event for event in events[half:] if isinstance(event, str)]
