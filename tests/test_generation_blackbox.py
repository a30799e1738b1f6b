"""The chain from a tokenizer to a verdict: samples that depend on their number alone, distances, files, refusals."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from configs import generation_blackbox
from tokenizers.data.latents import Statistics
from tokenizers.evaluate.distances import GaussianStatistics, frechet_distance
from tokenizers.generation import blackbox, judge, report, sampling, scores
from tokenizers.generation.latents import Coder
from tokenizers.generators import generator
from tokenizers.networks import foundation, inception
from tokenizers.parallel import mesh as meshes
from tokenizers.parallel import platform
from tokenizers.train import config as configs

SIZE = (16, 16)


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_WEIGHTS", raising=False)


def test_patches_leave_as_many_tokens_as_the_budget_says():
    found = {shape: blackbox.patch_of((*shape, 4), 256) for shape in ((16, 16), (32, 32), (64, 64), (16, 32), (8, 8))}
    assert found == {(16, 16): 1, (32, 32): 2, (64, 64): 4, (16, 32): 2, (8, 8): 1}
    assert blackbox.patch_of((1, 512, 8), 256) == 1  # a row has no patches of equal sides
    assert blackbox.patch_of((24, 20, 8), 256) == 2  # 4 would leave 30 of them
    assert blackbox.patch_of((24, 40, 8), 256) == 2


@functools.cache
def made(classes=3):
    """A generator whose predictions are not zero."""
    fields = {"channels": 2, "grid": (4, 4), "size": (1, 16, 2), "classes": classes}
    start = generator.create("lightningdit", **fields)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, np.float32), start.variables
    )
    return generator.Generator(start.module, variables, start.name)


STATISTICS = Statistics(*(np.asarray(value, np.float32) for value in ([1.0, 0.0], [2.0, 1.0], [-4, -4], [4, 4])))


def sampled(count, batch_size, mesh=None, **options):
    tokenizer = toys.image("continuous")
    network = made()
    if mesh is not None:
        tokenizer = tokenizer.shard(mesh)
        network = generator.Generator(
            network.module, jax.device_put(network.variables, meshes.replicated(mesh)), network.name
        )
    sets = sampling.samples(
        network,
        Coder(tokenizer, SIZE),
        STATISTICS,
        count=count,
        classes=3,
        batch_size=batch_size,
        mesh=mesh,
        points=4,
        **options,
    )
    pictures, numbers, labels = (
        np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*sets, strict=True)
    )
    np.testing.assert_array_equal(labels, numbers % 3)
    return pictures[:count], numbers


def test_a_sample_depends_on_its_number_alone():
    pictures, numbers = sampled(10, 8)
    assert (pictures.shape, pictures.dtype, len(numbers)) == ((10, *SIZE, 3), np.uint8, 16)
    # Half a level of float32 rounding may fall to either side.
    assert np.abs(pictures.astype(int) - sampled(10, 5)[0]).max() <= 1
    assert len({picture.tobytes() for picture in pictures}) == 10
    assert np.abs(pictures.astype(int) - sampled(10, 8, seed=1)[0]).max() > 10


@pytest.mark.slow
def test_a_sample_is_the_same_over_a_mesh():
    over_mesh = sampled(10, 8, meshes.make_mesh(devices=jax.devices()[:4]))[0]
    assert np.abs(sampled(10, 8)[0].astype(int) - over_mesh).max() <= 1


def test_noise_is_the_same_whatever_the_batch():
    whole = sampling.noise_of((4, 4, 2), jax.random.key(0), jnp.arange(64, dtype=jnp.uint32))
    np.testing.assert_array_equal(whole[40:42], sampling.noise_of((4, 4, 2), jax.random.key(0), jnp.uint32([40, 41])))
    np.testing.assert_allclose([whole.mean(), whole.std()], [0, 1], atol=0.07)
    np.testing.assert_array_equal(sampling.labels_of(np.arange(7), 3), [0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(sampling.labels_of(np.arange(7), 0), np.zeros(7))


def test_pixel_statistics_are_means_and_spreads_of_cells():
    picture = np.zeros((1, 16, 16, 3), np.uint8)
    picture[0, :4, 4:8] = (255, 0, 51)  # the second cell of the first row
    picture[0, -4:, -2:] = 255  # half of the last one
    means, spreads = np.split(np.asarray(scores.pixel_statistics(jnp.asarray(picture)))[0], [48])
    expected = np.zeros((16, 3))
    expected[1], expected[15] = (1, 0, 0.2), 0.5
    np.testing.assert_allclose(means.reshape(16, 3), expected, atol=1e-6)
    np.testing.assert_allclose(spreads, [0] * 15 + [0.5], atol=1e-6)


def test_sets_are_compared_where_there_are_weights():
    spaces = scores.Spaces({"inception": "", "foundation": ""}, "dinov2_small", None, None)
    rng = np.random.default_rng(0)
    sets = []
    for shift in (0, 60):
        collected = scores.Collected()
        pictures = np.clip(rng.normal(100 + shift, 40, (40, *SIZE, 3)), 0, 255).astype(np.uint8)
        for part in np.split(pictures, 5):
            collected.add(spaces(jnp.asarray(part)), np.arange(8) < 7, np.zeros(8, int))
        sets.append((collected, pictures.reshape(5, 8, *pictures.shape[1:])[:, :7].reshape(-1, *pictures.shape[1:])))
    found = sets[1][0].compared(sets[0][0], spaces.missing)
    assert found["pictures"] == 35
    features = [np.asarray(scores.pixel_statistics(jnp.asarray(shown))) for _, shown in sets]
    wanted = frechet_distance(*(GaussianStatistics.of(rows) for rows in features))
    assert found["fd_pixels"] == pytest.approx(wanted)
    # 48 means have moved by almost 60 levels; what is white at the top is lost.
    assert 0.7 < found["fd_pixels"] / (48 * (60 / 255) ** 2) < 1.1
    assert sets[0][0].compared(sets[0][0], spaces.missing)["fd_pixels"] == pytest.approx(0, abs=1e-6)
    for name, needs in (("gfid", "Inception"), ("inception_score", "Inception"), ("fd_foundation", "DINOv2 ViT-S/14")):
        assert found[name].startswith("not computed: needs ")
        assert needs in found[name]
    assert found["fd_judge"] == found["class_consistency"]
    assert "shapes" in found["fd_judge"]


def smoke(**changes):
    config = generation_blackbox.get_config("smoke")
    config.data.drawings, config.compilation_cache = 64, ""
    config.data.streams.pictures.update({"resolutions": (SIZE,), "batch_size": 16})
    config.budget.update({"size": (1, 16, 2), "steps": 3, "batch_size": 16, "samples": 20, "points": 4})
    config.reference_items, config.sample_batch_size = 32, 16
    config.judge.update({"channels": (8, 8), "steps": 3, "batch_size": 16, "held_out": 16})
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.slow
def test_distances_of_published_networks_are_those_of_their_features(monkeypatch, tmp_path):
    """With random weights in place of the files: the sums, and what the networks are shown."""
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    network = inception.InceptionV3()
    example = jnp.zeros((1, inception.SIZE, inception.SIZE, 3))
    variables = jax.jit(network.init, compiler_options=platform.run_once_options())(jax.random.key(0), example)
    small = foundation.VisionTransformer(width=16, depth=1, heads=2, patch=14, table=16)
    seen = jax.jit(small.init)(jax.random.key(0), jnp.zeros((1, 256, 256, 3)))
    monkeypatch.setattr(inception, "load", lambda path: (network, variables))
    monkeypatch.setattr(foundation, "load", lambda name, path: (small, seen))
    spaces = scores.Spaces({"inception": str(file), "foundation": str(file)}, "dinov2_small", None, None)
    assert set(spaces.missing) == {"judge"}
    rng = np.random.default_rng(0)
    sets, features = [], []
    for low in (0, 60):
        pictures = jnp.asarray(rng.integers(low, 200, (6, 32, 32, 3), np.uint8))
        collected = scores.Collected()
        collected.add(spaces(pictures), np.ones(6, bool), np.zeros(6, int))
        sets.append(collected)
        levels = inception.preprocess_tensorflow(pictures.astype(jnp.float32))
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        normal = (jax.image.resize(pictures / 255, (6, 256, 256, 3), "bicubic") - mean) / std
        tokens = small.apply(seen, normal.astype(jnp.float32), method="tokens")[0][:, 0]
        features.append((network.apply(variables, levels)["2048"], tokens))
    found = sets[1].compared(sets[0], spaces.missing)
    for name, (one, other) in zip(("gfid", "fd_foundation"), zip(*features, strict=True), strict=True):
        wanted = frechet_distance(*(GaussianStatistics.of(np.asarray(rows)) for rows in (other, one)))
        # Differences of nearly equal numbers, in float32.
        assert found[name] == pytest.approx(wanted, rel=1e-3)
    assert found["inception_score"] >= 1


@pytest.mark.slow
def test_the_judge_learns_what_it_is_asked_and_is_kept(tmp_path):
    config = configs.to_dict(generation_blackbox.get_config("smoke"))
    settings = config["judge"] | {"steps": 400}
    data = config["data"] | {"drawings": 10_000}
    trained = judge.train(data, settings, tmp_path)
    assert trained.accuracy > 0.3  # of 64 classes; observed 0.5
    again = judge.train(data, settings, tmp_path)
    assert again.accuracy == trained.accuracy
    jax.tree.map(np.testing.assert_array_equal, dict(again.variables), dict(trained.variables))
    assert judge.train(data, settings | {"steps": 2}, tmp_path).accuracy < trained.accuracy / 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_the_whole_chain_goes_on_where_it_stopped(kind, tmp_path, capsys):
    toys.causal(kind).save(tmp_path / "toy")
    results = blackbox.evaluate_checkpoint(tmp_path / "toy", smoke())
    folder = tmp_path / "generation_toy"
    assert {"report.html", "metrics.json", "samples.png", "latents", "generator"} <= {p.name for p in folder.iterdir()}
    written = json.loads((folder / "metrics.json").read_text())
    assert written["budget"] == configs.to_dict(smoke())["budget"]
    assert set(written["scores"]) == {"generated", "reconstructed", "held out"}
    assert written["scores"]["generated"]["pictures"] == 20
    assert written["generator"]["training_flops"] > 0
    assert written["scores"]["reconstructed"]["pictures"] == 32
    for found in written["scores"].values():
        assert found["gfid"].startswith("not computed: needs ")
        assert found["fd_pixels"] > 0
        assert 0 <= found["class_consistency"] <= 1
    assert ("nearest codes" in str(results["notes"])) == (kind == "discrete")
    assert "gFID (Inception)" in capsys.readouterr().out
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.array_record")}
    again = blackbox.evaluate_checkpoint(tmp_path / "toy", smoke())  # nothing but samples and scores is made again
    assert "compiled the step" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.array_record")} == stamps
    assert again["scores"] == results["scores"]
    toys.causal("continuous" if kind == "discrete" else "discrete").save(tmp_path / "other")
    with pytest.raises(ValueError, match="holds latents made in another way"):
        blackbox.evaluate_checkpoint(tmp_path / "other", smoke(), folder)
    with pytest.raises(ValueError, match=r"(?s)another config.*model.size: \[1, 16, 2\] -> \[1, 32, 2\]"):
        blackbox.evaluate_checkpoint(tmp_path / "toy", smoke(**{"budget.size": (1, 32, 2)}))
    with pytest.raises(ValueError, match="unknown step of .* 2. .*Accepted: 3"):  # it has learned for longer
        blackbox.evaluate_checkpoint(tmp_path / "toy", smoke(**{"budget.steps": 2}))


def test_guidance_needs_classes(tmp_path):
    config = configs.to_dict(smoke(**{"data.source": "embedded", "budget.guidance": 2.0}))
    with pytest.raises(ValueError, match="guidance=2.0 needs classes"):
        blackbox.judged(toys.image("continuous"), config, tmp_path)


def evaluate(*arguments):
    command = [sys.executable, "eval.py", "--config=configs/generation_blackbox.py:smoke", *map(str, arguments)]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = os.environ | {"XLA_FLAGS": flags}
    return subprocess.Popen(command, cwd=toys.ROOT, env=environment, text=True, **streams)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    toys.causal("continuous").save(tmp_path / "toy")
    small = {
        "data.drawings": 64,
        "data.streams.pictures.resolutions": "((16,16),)",
        "data.streams.pictures.batch_size": 8,
        "latents.shard_items": 8,
        "budget.size": "(1,16,2)",
        "budget.steps": 2,
        "budget.batch_size": 16,
        "budget.samples": 20,
        "budget.points": 4,
        "reference_items": 32,
        "sample_batch_size": 8,
        "judge.channels": "(8,8,8,8)",
        "judge.steps": 2,
        "judge.batch_size": 8,
        "judge.held_out": 6,
        "compilation_cache": "",
    }
    options = [f"--config.{name}={value}" for name, value in small.items()]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = [
        "--config.distributed.mode=manual",
        f"--config.distributed.coordinator={address}",
        "--config.distributed.processes=2",
    ]
    place = f"--checkpoint={tmp_path / 'toy'}"
    runs = [evaluate(place, f"--out={tmp_path / 'alone'}", *options)]
    runs += [
        evaluate(place, f"--out={tmp_path / 'two'}", *options, *together, f"--config.distributed.process={number}")
        for number in range(2)
    ]
    said = [process.communicate(timeout=400)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0, 0], "\n".join(said)
    assert "report: " in said[1]
    assert "report: " not in said[2]
    alone, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("alone", "two"))
    assert two["tokenizer"] == alone["tokenizer"]
    for row, scores_alone in alone["scores"].items():
        for name, value in scores_alone.items():
            # Sums in another order, and levels that rounding moves.
            wanted = value if isinstance(value, (str, int)) else pytest.approx(value, rel=1e-2)
            assert two["scores"][row][name] == wanted, (row, name)
    shards = [[path.name for path in sorted((tmp_path / name / "latents").iterdir())] for name in ("alone", "two")]
    assert shards[0] == shards[1]
    assert len([name for name in shards[0] if name.endswith(".array_record")]) == 8


def test_the_report_says_what_is_missing(tmp_path):
    sample = {"gfid": "not computed: needs weights", "fd_pixels": 1.5, "pictures": 4}
    results = {
        "tokenizer": {"name": "toy <1>", "decoded": "as they are"},
        "data": {"items": 10, "classes": 0, "reference": 10},
        "budget": {"steps": 3},
        "generator": {"latents": [4, 4, 2], "tokens": 16, "parameters": 1000, "training_flops": 1e9},
        "scores": {"generated": sample, "held out": {"pictures": 0}},
        "judge_accuracy": None,
        "seconds": {"sampling": 1.0},
        "devices": "1 x cpu",
        "notes": ["compare with care"],
    }
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss/generator": 2.0}\n{"step": 2, "loss/generator": 1.0}\n')
    pictures = np.zeros((5, 16, 24, 3), np.uint8)
    report.write(tmp_path / "out", results, report.grid(pictures, 3), tmp_path / "log.jsonl")
    page = pathlib.Path(tmp_path / "out/report.html").read_text()
    for text in ("toy &lt;1&gt;", "not computed: needs weights", "compare with care", "Budget"):
        assert text in page
    table = report.format_table(results)
    assert "gFID (Inception)                      not computed: needs weights" in table
    assert table.splitlines()[0].split() == ["generated", "held", "out"]
