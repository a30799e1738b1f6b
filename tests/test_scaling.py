"""Scaling studies: points, runs that fail, and the curves through those that do not."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from configs import scaling_shapes
from tokenizers.scaling import curves, points, study

TRAIN = """
import json, pathlib, sys
flags = dict(part.split("=", 1) for part in sys.argv[1:])
folder = pathlib.Path(flags["--workdir"])
folder.mkdir(parents=True, exist_ok=True)
steps = int(flags["--config.steps"])
if flags["--config.width"] == "8" and flags["--config.seed"] == "1" and not pathlib.Path("mended").exists():
    sys.exit("error: out of memory")
with (folder / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": steps, "flops": 1e9 * steps}) + "\\n")
"""
EVAL = """
import json, pathlib, sys
flags = dict(part.split("=", 1) for part in sys.argv[1:])
run = pathlib.Path(flags["--checkpoint"])
flops = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["flops"]
out = pathlib.Path(flags["--out"])
out.mkdir(parents=True)
(out / "metrics.json").write_text(json.dumps({"fid": 5e4 * flops ** -0.3, "probe": "not computed: needs labels"}))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with programs that take no time in place of train.py and eval.py."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "eval.py").write_text(EVAL)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    return tmp_path


def config(**changes):
    judge = {"config": "j", "result": "metrics.json", "overrides": {}, "scores": {"FID": ("fid",), "probe": ("probe",)}}
    widths = {"8": {"width": 8}, "16": {"width": 16}}
    found = {
        "training": "t",
        "overrides": {},
        "seeds": 2,
        "axes": {
            "width": widths,
            "steps": {"10": {"steps": 10}, "100": {"steps": 100}},
        },
        "curves": "width",
        "judges": {"quality": judge},
        "scores": {
            "FID": {"law": "power", "less_is_better": True},
            "probe": {"law": "line", "less_is_better": False},
        },
    }
    return found | changes


def test_a_study_goes_on_without_the_points_that_fail(place):
    said = []
    records = study.run(config(), place / "study", said.append)
    assert len(records) == 8
    failed = {record["name"] for record in records if record["failed"]}
    assert failed == {"width-8_steps-10_seed-1", "width-8_steps-100_seed-1"}
    assert sum("failed: error: out of memory" in line for line in said) == 2
    found = curves.write(records, config(), place / "study")
    law = found["FID"]["16"]["law"]
    np.testing.assert_allclose([law["a"], law["b"]], [5e4, -0.3], rtol=1e-6)
    assert len(found["FID"]["8"]["points"]) == 2
    assert found["probe"] == {}
    text = (place / "study" / "scaling.md").read_text()
    assert "1 (1 failed)" in text
    assert "width-8_steps-10_seed-1: error: out of memory" in text
    assert "not computed" in text
    assert (place / "study" / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    # The same command tries again what failed, and nothing else.
    (place / "mended").write_text("")
    again = []
    records = study.run(config(), place / "study", again.append)
    assert sum(line.endswith("s") and ": done" in line for line in again) == 2
    assert not any(record["failed"] for record in records)
    assert json.loads((place / "study" / "study.json").read_text())["seeds"] == 2


def test_a_study_may_grow_but_not_become_another(place):
    study.run(config(seeds=1), place / "study", lambda line: None)
    larger = study.run(config(seeds=2), place / "study", lambda line: None)
    assert len(larger) == 8
    with pytest.raises(ValueError, match="holds another study: overrides changed"):
        study.run(config(overrides={"width": 3}), place / "study", lambda line: None)
    (place / "other").mkdir()
    (place / "other" / "file").write_text("")
    with pytest.raises(ValueError, match="neither empty nor a study"):
        study.run(config(), place / "other", lambda line: None)


def test_a_score_that_is_not_where_it_should_be_is_an_error(place):
    wrong = config(seeds=1)
    wrong["judges"]["quality"]["scores"] = {"FID": ("fud",)}
    with pytest.raises(ValueError, match="Did you mean 'fid'"):
        study.run(wrong, place / "study", lambda line: None)


def test_points_are_all_combinations():
    found = points.points({"a": {"x": {"p": 1}, "y": {"p": 2}}, "b": {"z": {"q": (1, (2, 3))}}}, seeds=2)
    assert [point.name for point in found] == ["a-x_b-z_seed-0", "a-x_b-z_seed-1", "a-y_b-z_seed-0", "a-y_b-z_seed-1"]
    assert points.flags(found[3].overrides) == ["--config.p=2", "--config.q=(1, (2, 3))", "--config.seed=1"]
    with pytest.raises(ValueError, match="another axis changes p as well"):
        points.points({"a": {"x": {"p": 1}}, "b": {"z": {"p": 2}}}, seeds=1)
    with pytest.raises(ValueError, match="axis 'b' of the study has no values"):
        points.points({"a": {"x": {}}, "b": {}}, seeds=1)
    with pytest.raises(ValueError, match="at least one seed"):
        points.points({"a": {"x": {}}}, seeds=0)


EXPONENTS = strategies.lists(strategies.integers(90, 210), min_size=2, max_size=6, unique=True)  # tenths


@hypothesis.given(
    start=strategies.floats(0.1, 100),
    slope=strategies.floats(-1, 1),
    exponents=EXPONENTS,
    kind=strategies.sampled_from([curves.POWER, curves.LINE]),
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_laws_are_found_again(start, slope, exponents, kind):
    flops = 10.0 ** (np.asarray(exponents) / 10)
    values = start * flops**slope if kind == curves.POWER else start + slope * np.log10(flops)
    law = curves.fit(flops, values, kind)
    np.testing.assert_allclose(curves.at(law, flops, kind), values, rtol=1e-6, atol=1e-6 * np.abs(values).max())
    np.testing.assert_allclose(law["b"], slope, atol=1e-6)


def test_there_is_no_law_of_one_point_or_of_what_no_power_has():
    assert curves.fit([1e9, 1e9], [1.0, 2.0], curves.LINE) is None
    assert curves.fit([1e9, 1e10], [0.0, 2.0], curves.POWER) is None
    noisy = curves.fit([1e9, 1e10, 1e11], [1.0, 2.5, 3.0], curves.LINE)
    assert 0 < noisy["b_error"] < 1
    assert 0.9 < noisy["r2"] < 1


@pytest.mark.parametrize("argument", [None, "gpu", "smoke"])
def test_the_study_of_shapes_is_one(argument):
    found = scaling_shapes.get_config(argument).to_dict()
    for point in points.points(found["axes"], found["seeds"]):
        assert point.overrides["steps"] == int(point.values["steps"])
    named = {score for judge in found["judges"].values() for score in judge["scores"]}
    assert named == set(found["scores"])
    assert found["curves"] in found["axes"]
