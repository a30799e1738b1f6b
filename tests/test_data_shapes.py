"""Drawn pictures are functions of their number, their captions and classes are true; any source can have labels."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from test_data_decode import photo_bytes
from test_data_sources import write_tar

from tokenizers.data import shapes, shards
from tokenizers.data.pipeline import Pipeline
from tokenizers.data.records import Record
from tokenizers.data.sources import open_source

STREAM = {"frames": 1, "resolutions": ((32, 32),), "batch_size": 8}


def config(**changes) -> dict:
    return {"source": "shapes", "drawings": 96, "streams": {"s": STREAM}, "flip": True, "zoom": (1.0, 2.0), **changes}


def take(pipeline, count, start=0):
    with pipeline.batches(start) as batches:
        return [next(batches) for _ in range(count)]


def test_a_picture_depends_on_seed_split_and_number_only():
    for number in range(40):
        scene = shapes.draw_scene(number)
        assert scene == shapes.draw_scene(number)
        np.testing.assert_array_equal(scene.render(32, 48), shapes.draw_scene(number).render(32, 48))
        assert scene.label == number % 64
    pictures = [
        shapes.draw_scene(number, **how).render(24, 24).tobytes()
        for number in range(30)
        for how in ({}, {"held_out": True}, {"seed": 1})
    ]
    assert len(set(pictures)) == 90


@pytest.mark.parametrize("number", range(24))
def test_a_caption_says_what_is_in_the_picture(number):
    scene = shapes.draw_scene(number)
    picture = scene.render(96, 96).astype(float)
    bare = shapes.Scene(scene.ground, (), "").render(96, 96).astype(float)
    words = scene.caption.replace(",", " ").replace(";", " ").split()
    assert scene.ground.colour in words
    assert shapes.ADJECTIVES[scene.ground.pattern] in words
    sizes = [thing.radius for thing in scene.things]
    assert sizes == sorted(sizes, reverse=True), "the class is that of the larger one"
    for thing in scene.things:
        assert thing.words() in scene.caption
        changed = np.abs(picture - bare).max(-1) > 2
        mine = changed & (np.abs(picture - np.array(thing.rgb)).max(-1) < 2)
        y, x = (np.argwhere(mine) + 0.5).T / 96
        low, high = shapes.SIZES[thing.size]
        span = max(np.ptp(x), np.ptp(y))
        assert 1.3 * low < span < 2.1 * high, "as large as it says"
        # Where it says: a crescent's mass is off its middle by at most half a radius.
        column, row = shapes.PLACES[thing.where]
        for cell, mean in ((column, x.mean()), (row, y.mean())):
            border = thing.radius + shapes._MARGIN
            middle = border + (0.05, 0.5, 0.95)[cell] * (1 - 2 * border)
            assert abs(mean - middle) < 0.05 + 0.5 * thing.radius


def test_the_outlines_have_the_areas_of_their_shapes():
    """Coverage is antialiased: areas are right to a percent, and about twice the pixels change nothing."""
    areas = {
        "circle": math.pi,
        "square": 2.0,
        "triangle": 0.75 * math.sqrt(3),
        "star": 10 * 0.5 * 0.42 * math.sin(math.pi / 5),
        "cross": 4 * 2 * 0.3 * (math.sqrt(1 - 0.09) - 0.3) + 4 * 0.09,
        "ring": math.pi * (1 - 0.52**2),
        "diamond": 2 * 0.55,
    }
    ground = shapes.Ground("plain", "black", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0, 0.2, 0)
    for shape in shapes.SHAPES:
        thing = shapes.Thing(shape, "red", (255.0, 0, 0), "large", 0.3, "in the middle", (0.5, 0.5), 0.3)
        covered = [shapes.Scene(ground, (thing,), "").render(n, n)[..., 0].mean() / 255 / 0.09 for n in (64, 128)]
        assert covered[0] == pytest.approx(covered[1], rel=0.01)
        if shape in areas:
            assert covered[1] == pytest.approx(areas[shape], rel=0.01)


def test_a_picture_is_the_same_at_every_size():
    for number in range(12):
        large = shapes.draw_scene(number).render(128, 128).astype(float)
        small = shapes.draw_scene(number).render(32, 32).astype(float)
        averaged = large.reshape(32, 4, 32, 4, 3).mean((1, 3))
        # Box filter against coverage from distances: they differ at corners and edges. Observed: at most 0.46 levels.
        assert np.abs(averaged - small).mean() < 1


def test_batches_have_captions_and_classes_and_splits_are_disjoint():
    train = Pipeline(config())
    assert train.classes == shapes.CLASSES
    assert len(set(train.classes)) == 64
    seen = take(train, 12)
    assert len({batch["pixels"][row].tobytes() for batch in seen for row in range(8)}) == 96, "an epoch is every item"
    for batch in seen:
        assert batch["label"].dtype == np.int32
        assert batch["pixels"].shape == (8, 1, 32, 32, 3)
        for caption, label in zip(batch["caption"], batch["label"], strict=True):
            assert shapes.CLASSES[label] in caption
    again = take(Pipeline(config(workers=1)), 2, start=3)
    np.testing.assert_array_equal(again[0]["pixels"], seen[3]["pixels"])
    np.testing.assert_array_equal(again[1]["label"], seen[4]["label"])
    held_out = Pipeline(config(held_out="0.25"), split="held_out")
    items = list(held_out.evaluation_items())
    assert len(items) == 24
    assert not {item["pixels"].tobytes() for item in items} & {p.tobytes() for b in seen for p in b["pixels"]}
    assert all(shapes.CLASSES[item["label"]] in item["caption"] for item in items)
    assert len(list(Pipeline(config(), split="held_out").batches())) == 2  # ten of them, a tenth
    assert Pipeline(config(drawings=97)).fingerprint != train.fingerprint


def test_drawings_fit_every_frame():
    buckets = {"s": {**STREAM, "resolutions": ((32, 32), (24, 48))}}
    pipeline = Pipeline(config(streams=buckets))
    assert {batch["pixels"].shape[2:4] for batch in take(pipeline, 6)} == {(32, 32), (24, 48)}
    clips = {"s": {**STREAM, "frames": 3}}
    assert take(Pipeline(config(streams=clips, virtual_camera=True)), 1)[0]["pixels"].shape == (8, 3, 32, 32, 3)
    with pytest.raises(ValueError, match="has no path"):
        open_source("shapes", "somewhere")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        open_source("shapes", drawings=0)


def test_folders_are_classes_when_asked(tmp_path):
    for number, name in enumerate(["b/1.png", "a/deep/2.png", "c/3.png", "b/4.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(photo_bytes(number))
    (tmp_path / "empty").mkdir()
    source = open_source("images", str(tmp_path), labels=True)
    assert source.classes == ("a", "b", "c", "empty")
    assert [source[i].label for i in range(4)] == [0, 1, 1, 2]
    folder = {"source": "images", "path": str(tmp_path), "streams": {"s": STREAM}}
    assert "label" not in take(Pipeline(folder), 1)[0]
    both = {"folder": folder | {"weight": 1.0}, "photographs": {"source": "embedded"}}
    both["folder"].pop("streams")
    batch = take(Pipeline({"streams": {"s": STREAM}, "sources": both, "labels": True}), 1)[0]
    assert set(batch["label"][batch["label"] >= 0]) <= {0, 1, 2}
    assert (batch["label"] == -1).sum() == 4, "the photographs have no classes"
    with pytest.raises(ValueError, match="one label would mean two things"):
        Pipeline({"streams": {"s": STREAM}, "sources": both | {"drawn": {"source": "shapes"}}, "labels": True})
    (tmp_path / "loose.png").write_bytes(photo_bytes(9))
    with pytest.raises(ValueError, match="1 files, .*loose.png"):
        open_source("images", str(tmp_path), labels=True)
    with pytest.raises(ValueError, match="labels need a folder"):
        open_source("images", str(tmp_path / "a" / "**" / "*.png"), labels=True)


def test_shards_have_labels_when_asked(tmp_path):
    photos = [photo_bytes(number) for number in range(3)]
    write_tar(
        tmp_path / "0.tar",
        [("0.png", photos[0]), ("0.cls", b"7\n"), ("1.png", photos[1]), ("1.json", b'{"label": 3, "text": "x"}')]
        + [("2.png", photos[2])],
    )
    source = open_source("tar", str(tmp_path), labels=True)
    assert [source[i].label for i in range(3)] == [7, 3, None]
    assert source[1].caption == "x"
    assert [record.label for record in (open_source("tar", str(tmp_path))[0],)] == [None]

    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": photos, "label": pa.array([1, 0, None], pa.int64())})
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "0.parquet", row_group_size=2
    )
    source = open_source("parquet", str(tmp_path), labels=True)
    assert [source[i].label for i in range(3)] == [1, 0, None]
    assert source.classes == ("cat", "dog")
    parquet.write_table(pa.table({"image": photos, "cls": ["a", "b", "c"]}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"cls \(string\); accepted: label, cls"):
        open_source("parquet", str(tmp_path), labels=True)

    path = str(tmp_path / "0.array_record")
    shards.write_array_record(path, [Record("image", photo, str(n), None, n + 4) for n, photo in enumerate(photos)])
    source = open_source("array_record", path, labels=True)
    assert [source[i].label for i in range(3)] == [4, 5, 6]
    shards.write_array_record(path, [Record("image", photos[0], "0")])
    with pytest.raises(ValueError, match="no labels in"):
        open_source("array_record", path, labels=True)
