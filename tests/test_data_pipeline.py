"""Batch k is a pure function of (config, seed, k); bad files cost nothing but a line in the log; shapes are fixed."""

import ast
import json
import logging
import pathlib
import subprocess
import sys

import grain
import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data_decode import image_bytes, numbers, photo_bytes, write_video

from tokenizers.data import benchmark
from tokenizers.data import pipeline as pipelines
from tokenizers.data.pipeline import Pipeline

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZE = (16, 24)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of images (7 red ones, 3 blue ones) and one of videos."""
    root = tmp_path_factory.mktemp("data")
    for name, count, colour in (("red", 7, 0), ("blue", 3, 2)):
        (root / name).mkdir()
        for number in range(count):
            pixels = np.zeros((32, 48, 3), np.uint8)
            pixels[..., colour] = 100 + 20 * number
            (root / name / f"{number}.png").write_bytes(image_bytes(Image.fromarray(pixels)))
    (root / "videos").mkdir()
    for number in range(4):
        write_video(str(root / "videos" / f"{number}.mp4"), 12, first=number)
    return root


def mixed_config(folders, **changes):
    """Images and clips, two sources in one of the streams: everything that a plan can hold."""
    sources = {
        "red": {"source": "images", "path": str(folders / "red"), "weight": 3.0},
        "blue": {"source": "images", "path": str(folders / "blue"), "weight": 1.0},
    }
    streams = {
        "image": {"resolutions": (SIZE,), "batch_size": 4, "weight": 2.0, "sources": sources},
        "video": {"frames": 3, "resolutions": (SIZE,), "batch_size": 2, "source": "videos"},
    }
    streams["video"]["path"] = str(folders / "videos")
    return {"streams": streams, "flip": True, "zoom": (1.0, 1.5), "resample": "bilinear", **changes}


def take(pipeline: Pipeline, start: int, count: int) -> list[dict]:
    with pipeline.batches(start) as batches:
        return [next(batches) for _ in range(count)]


def assert_same(got: list[dict], want: list[dict]) -> None:
    assert [batch["stream"] for batch in got] == [batch["stream"] for batch in want]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one["pixels"], other["pixels"])


def test_batches_depend_on_seed_and_number_only(folders):
    config = mixed_config(folders)
    reference = take(Pipeline(config, seed=5), 0, 9)
    assert_same(take(Pipeline(config, seed=5), 4, 5), reference[4:])
    assert_same(take(Pipeline({**config, "read_threads": 0, "prefetch": 0}, seed=5), 2, 7), reference[2:])
    other = take(Pipeline(config, seed=6), 0, 9)
    assert any((a["pixels"] != b["pixels"]).any() for a, b in zip(other, reference, strict=True))
    assert len({batch["pixels"].tobytes() for batch in reference}) == 9, "no batch repeats"
    with Pipeline(config, seed=5).batches() as ours:
        dataset = Pipeline(config, seed=5).dataset()
        assert isinstance(dataset, grain.MapDataset)
        for number in range(3):
            np.testing.assert_array_equal(next(ours)["pixels"], dataset[number]["pixels"])


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_batches(folders, workers):
    config = mixed_config(folders)
    reference = take(Pipeline(config, seed=5), 3, 4)
    assert_same(take(Pipeline({**config, "workers": workers}, seed=5), 3, 4), reference)


def test_two_processes_read_the_halves_of_the_same_global_batch(folders):
    config = mixed_config(folders)
    reference = take(Pipeline(config), 0, 6)
    halves = [take(Pipeline(config, process_index=index, process_count=2), 0, 6) for index in (0, 1)]
    for whole, first, second in zip(reference, *halves, strict=True):
        assert first["stream"] == second["stream"] == whole["stream"]
        np.testing.assert_array_equal(np.concatenate([first["pixels"], second["pixels"]]), whole["pixels"])
    with pytest.raises(ValueError, match="not a multiple of 3 processes"):
        Pipeline(config, process_index=0, process_count=3)


def test_a_saved_state_continues_the_same_sequence_and_refuses_other_data(folders, tmp_path):
    config = mixed_config(folders)
    reference = take(Pipeline(config), 0, 7)
    with Pipeline(config).batches() as batches:
        for _ in range(3):
            next(batches)
        state = json.loads(json.dumps(batches.get_state()))
    with Pipeline({**config, "read_threads": 1}).batches() as batches:
        next(batches)
        batches.set_state(state)
        assert_same([next(batches) for _ in range(4)], reference[3:])
    for changed in (Pipeline(config, seed=1), Pipeline({**config, "flip": False})):
        with changed.batches() as batches, pytest.raises(ValueError, match="changed"):
            batches.set_state(state)


def test_grains_own_iterator_resumes_to_the_same_batches(folders):
    # The second opinion: Grain's checkpoint of the same data set continues as our step number does.
    dataset = Pipeline(mixed_config(folders)).dataset()
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(1, 1)))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    again = iter(dataset.to_iter_dataset(grain.ReadOptions(1, 1)))
    again.set_state(state)
    assert_same([next(again) for _ in range(3)], take(Pipeline(mixed_config(folders)), 3, 3))


def test_the_fingerprint_follows_content_not_place_or_speed(folders, tmp_path):
    config = {"source": "images", "path": str(folders / "red"), "streams": {"s": stream(resolutions=(SIZE,))}}
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (folders / "red").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    first = Pipeline(config).fingerprint
    assert Pipeline({**config, "path": str(moved), "workers": 3, "prefetch": 9}).fingerprint == first
    (moved / "new.png").write_bytes(photo_bytes(1))
    assert Pipeline({**config, "path": str(moved)}).fingerprint != first


def test_weights_are_kept_exactly_by_streams_and_sources(folders):
    batches = take(Pipeline(mixed_config(folders)), 0, 24)
    images = [batch for batch in batches if batch["stream"] == "image"]
    assert len(images) == 16  # weights 2 : 1
    red = sum((batch["pixels"][..., 0].max((1, 2, 3)) > 0).sum() for batch in images)
    assert red == 48  # weights 3 : 1 of 64 images


def test_an_epoch_shows_every_item_once(folders):
    config = {"source": "images", "path": str(folders / "red"), "crop": "center"}
    pipeline = Pipeline({**config, "streams": {"image": stream(resolutions=(SIZE,), batch_size=7)}})
    orders = [tuple(batch["pixels"][:, 0, 0, 0, 0].tolist()) for batch in take(pipeline, 0, 3)]
    assert all(sorted(order) == [100 + 20 * n for n in range(7)] for order in orders)
    assert len(set(orders)) == 3, "reshuffled every epoch"


def stream(**changes) -> dict:
    return {"frames": 1, "resolutions": ((16, 16),), "batch_size": 4, **changes}


def test_bad_files_are_skipped_counted_and_logged_once(folders, tmp_path, caplog):
    for number in range(3):
        write_video(str(tmp_path / f"good{number}.mp4"), 8)
    write_video(str(tmp_path / "short.mp4"), 2)
    (tmp_path / "corrupt.mp4").write_bytes(b"nothing of a video")
    whole = (tmp_path / "good0.mp4").read_bytes()
    (tmp_path / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    config = {"source": "videos", "path": str(tmp_path), "streams": {"v": stream(frames=4)}}
    pipeline = Pipeline(config)
    with caplog.at_level(logging.WARNING):
        reference = take(pipeline, 0, 6)
    for batch in reference:
        assert batch["pixels"].shape == (4, 4, 16, 16, 3)
        for clip in batch["pixels"]:
            assert np.diff(numbers(clip)).tolist() == [1, 1, 1]
    assert pipeline.skipped.count == 3
    assert pipeline.skipped.times >= 3
    for name in ("short.mp4", "corrupt.mp4", "truncated.mp4"):
        lines = [record.getMessage() for record in caplog.records if name in record.getMessage()]
        assert len(lines) == 1, lines
        assert str(tmp_path / name) in lines[0]
    assert "too short" in caplog.text
    assert "skipped 3 files" in pipeline.summary()
    # What replaces a bad file does not depend on which process meets it.
    assert_same(take(Pipeline(config), 3, 3), reference[3:])


def test_skips_in_worker_processes_are_counted_too(tmp_path, caplog):
    (tmp_path / "good.png").write_bytes(photo_bytes(0))
    (tmp_path / "bad.png").write_bytes(photo_bytes(0)[:100])
    config = {"source": "images", "path": str(tmp_path), "workers": 1, "streams": {"s": stream()}}
    pipeline = Pipeline(config)
    take(pipeline, 0, 2)
    assert pipeline.skipped.count == 1
    assert "bad.png: not a readable image" in pipeline.skipped.last[0]
    assert str(tmp_path / "bad.png") in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_only_an_empty_data_set_is_an_error(tmp_path, workers):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"bad")
    config = {"source": "images", "path": str(tmp_path), "workers": workers, "streams": {"s": stream()}}
    with pytest.raises(ValueError, match="none of 3 items in a row is usable.*not a readable image"):
        take(Pipeline(config), 0, 1)
    if not workers:
        config["streams"]["s"]["resolutions"] = ((16, 16), (16, 32))
        with pytest.raises(ValueError, match="is empty: no usable item.*png"):
            Pipeline(config)


def test_aspect_ratio_buckets_have_fixed_shapes_and_the_share_of_their_items(tmp_path, caplog):
    for number in range(6):
        (tmp_path / f"wide{number}.png").write_bytes(photo_bytes(number, (30, 60)))
    for number in range(2):
        (tmp_path / f"square{number}.png").write_bytes(photo_bytes(number, (50, 48)))
    (tmp_path / "bad.png").write_bytes(b"bad")
    sizes = ((16, 16), (12, 24), (24, 12))
    config = {"source": "images", "path": str(tmp_path), "streams": {"s": stream(resolutions=sizes)}}
    pipeline = Pipeline(config)
    assert pipeline.shapes == [("s", (4, 1, 16, 16, 3)), ("s", (4, 1, 12, 24, 3))]
    assert "no item is nearest to (24, 12)" in caplog.text
    assert "bad.png" in pipeline.skipped.last[0]
    seen = [batch["pixels"].shape for batch in take(pipeline, 0, 16)]
    assert seen.count((4, 1, 12, 24, 3)) == 12
    assert seen.count((4, 1, 16, 16, 3)) == 4
    assert "6 items" in pipeline.summary()


def test_several_resolutions_of_one_aspect_ratio_share_all_items(folders):
    streams = {"s": stream(resolutions=((16, 16), (32, 32)))}
    pipeline = Pipeline({"source": "images", "path": str(folders / "red"), "streams": streams})
    shapes = [batch["pixels"].shape[2:4] for batch in take(pipeline, 0, 8)]
    assert shapes.count((16, 16)) == shapes.count((32, 32)) == 4


def test_clips_from_photographs_need_the_virtual_camera():
    config = {"streams": {"clips": stream(frames=3)}}
    with pytest.raises(ValueError, match="set virtual_camera=True"):
        Pipeline(config)
    batch = take(Pipeline({**config, "virtual_camera": True}), 0, 1)[0]
    assert batch["pixels"].shape == (4, 3, 16, 16, 3)
    assert all((clip[0] != clip[2]).any() for clip in batch["pixels"])


def test_single_frames_of_videos_are_random(folders):
    config = {"source": "videos", "path": str(folders / "videos"), "streams": {"s": stream()}}
    frames = {numbers(clip)[0] for batch in take(Pipeline(config), 0, 8) for clip in batch["pixels"]}
    assert len(frames) > 6


def test_captions_come_with_their_images(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(Image.new("RGB", (20, 20), (50 * number, 0, 0))))
        (tmp_path / f"{number}.txt").write_text(str(50 * number))
    for batch in take(Pipeline({"source": "auto", "path": str(tmp_path), "streams": {"s": stream()}}), 0, 3):
        assert batch["caption"] == [str(value) for value in batch["pixels"][:, 0, 0, 0, 0]]


def test_held_out_batches_are_finite_fixed_padded_and_disjoint_from_training(folders):
    config = {"source": "images", "path": str(folders / "red"), "held_out": 0.4, "flip": True}
    config["streams"] = {"s": stream(resolutions=(SIZE,), batch_size=2)}
    pipeline = Pipeline(config, split="held_out")
    batches = list(pipeline.batches())
    assert pipeline.num_batches == len(batches) == 2
    assert [batch["valid"].tolist() for batch in batches] == [[True, True], [True, False]]
    assert not batches[1]["pixels"][1].any()
    assert_same(list(Pipeline(config, split="held_out", seed=9).batches()), batches)
    items = list(pipeline.evaluation_items())
    assert [item["pixels"].shape for item in items] == [(1, *SIZE, 3)] * 3
    held_out = {int(item["pixels"][0, 0, 0, 0]) for item in items}
    train = {int(value) for batch in take(Pipeline(config), 0, 8) for value in batch["pixels"][:, 0, 0, 0, 0]}
    assert held_out | train == {100 + 20 * n for n in range(7)}
    assert not held_out & train
    assert not list(pipeline.batches(start=2))
    halves = [list(Pipeline(config, split="held_out", process_index=i, process_count=2).batches()) for i in (0, 1)]
    for whole, first, second in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([first["valid"], second["valid"]]), whole["valid"])
    elsewhere = Pipeline({**config, "held_out": str(folders / "blue")}, split="held_out")
    assert len(list(elsewhere.evaluation_items())) == 3
    with pytest.raises(ValueError, match="no held-out data"):
        Pipeline({**config, "held_out": ""}, split="held_out")
    with pytest.raises(ValueError, match="Did you mean 'held_out'"):
        Pipeline(config, split="heldout")


def test_embedded_held_out_views_are_different_and_unusable_items_are_masked(tmp_path):
    streams = {"image": stream(batch_size=8), "video": stream(frames=3)}
    pipeline = Pipeline({"virtual_camera": True, "streams": streams}, split="held_out")
    items = list(pipeline.evaluation_items())
    assert {item["name"].partition("#")[0] for item in items} == {"scikit-image/chelsea.png", "scikit-image/coffee.png"}
    fraction = Pipeline({"virtual_camera": True, "held_out": "0.1", "streams": streams}, split="held_out")
    assert [item["name"] for item in fraction.evaluation_items()] == [item["name"] for item in items]
    assert len(items) == 20  # two photographs, five views each, two streams
    assert len({item["pixels"].tobytes() for item in items}) == 20
    assert len({(item["stream"], item["name"]) for item in items}) == 20
    (tmp_path / "a.png").write_bytes(photo_bytes(0))
    (tmp_path / "b.png").write_bytes(b"bad")
    config = {"source": "images", "path": str(tmp_path), "held_out": str(tmp_path), "streams": {"s": stream()}}
    pipeline = Pipeline(config, split="held_out")
    assert [batch["valid"].tolist() for batch in pipeline.batches()] == [[True, False, False, False]]
    assert pipeline.skipped.count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"worker": 2}, "unknown data config key 'worker'. Did you mean 'workers'"),
        ({"crop": "centre"}, "unknown crop 'centre'. Did you mean 'center'"),
        ({"resample": "nearest"}, "unknown resample filter"),
        ({"zoom": (0.5, 1.0)}, "zoom must be"),
        ({"zoom": (1.0, 2.0), "crop": "center"}, "belongs to random crops"),
        ({"workers": -1}, "workers must be"),
        ({"streams": {}}, "no streams"),
        ({"streams": {"s": stream(frame=3)}}, "unknown key in stream 's' 'frame'. Did you mean 'frames'"),
        ({"streams": {"s": stream(resolutions=(16, 16))}}, "resolutions must be pairs"),
        ({"streams": {"s": stream(frames=0)}}, "frames must be an integer of at least 1"),
        ({"streams": {"s": {"frames": 1}}}, "lacks 'resolutions'"),
        ({"streams": {"s": stream(weight=0)}}, "weight must be positive"),
        ({"sources": {"a": {"paht": "x"}}}, "Did you mean 'path'"),
        ({"source": "embedded", "sources": {"a": {}}}, "exclude each other"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        Pipeline({"streams": {"s": stream()}, **change})


def test_config_dicts_work_as_mappings_do():
    config = {"streams": {"s": stream()}, "path": "", "source": "embedded", "sources": {}, "held_out": ""}
    want = take(Pipeline(config), 0, 2)
    assert_same(take(Pipeline(ml_collections.ConfigDict(config)), 0, 2), want)


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4),
    start=st.integers(0, 10**9),
    processes=st.sampled_from([1, 2, 4]),
)
def test_every_process_agrees_on_the_shape_of_any_batch(weights, start, processes):
    # A disagreement would hang a multi-host step.
    streams = {f"s{n}": stream(resolutions=((8, 8 + n),), weight=weight) for n, weight in enumerate(weights)}
    shapes = set()
    for index in range(processes):
        pipeline = Pipeline({"streams": streams, "prefetch": 0}, process_index=index, process_count=processes)
        batch = take(pipeline, start, 1)[0]
        shapes.add((batch["stream"], batch["pixels"].shape))
    assert len(shapes) == 1


def test_nothing_of_the_data_package_needs_jax():
    """Worker processes must not start a backend: no file imports jax, and batches come where jax cannot be imported."""
    for path in (ROOT / "tokenizers" / "data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("jax", "jaxlib", "flax") for name in names), path
    script = (
        "import sys, tokenizers.data.pipeline, tokenizers.data.benchmark\n"
        "assert 'jax' not in sys.modules\n"
        "sys.modules['jax'] = None\n"
        "config = {'streams': {'s': {'resolutions': ((8, 8),), 'batch_size': 2}}}\n"
        "print(next(tokenizers.data.pipeline.Pipeline(config).batches())['pixels'].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "(2, 1, 8, 8, 3)" in done.stdout, done.stderr


def test_benchmark_compares_with_what_the_model_consumes(tmp_path, capsys):
    metrics = [{"step": 1, "frames_per_second": 5.0}, {"step": 2, "frames_per_second": 40.0}, {"step": 3}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in metrics) + '\n{"cut')
    small = ["--frames=3", "--height=16", "--width=16", "--batch=2", "--workers", "0", "--batches=2"]
    benchmark.main([*small, f"--run={tmp_path}"])
    out = capsys.readouterr().out
    assert "uint8 (2, 3, 16, 16, 3)" in out
    assert "workers 0:" in out
    assert "the model consumes 40 frames/s" in out
    with pytest.raises(ValueError, match="give --model_frames_per_second"):
        benchmark.model_rate(str(tmp_path / "absent"))
    config = tmp_path / "config.py"
    config.write_text(
        "import ml_collections\n"
        "def get_config(size='8'):\n"
        "    stream = {'resolutions': ((int(size), int(size)),), 'batch_size': 2}\n"
        "    return ml_collections.ConfigDict({'data': {'streams': {'s': stream}}})\n"
    )
    benchmark.main([f"--config={config}:12", "--workers", "0", "--batches=1"])
    assert "uint8 (2, 1, 12, 12, 3)" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 5, pipelines._TABLE])  # a table of positions, and Grain's cipher for large ones
def test_every_epoch_is_a_permutation_of_its_own(size):
    positions = pipelines._epochs(size, seed=3)
    epochs = [[int(positions[epoch * size + i]) for i in range(size)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    assert size == 1 or epochs[0] != epochs[1]
