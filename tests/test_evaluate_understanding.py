"""Understanding is measured as its papers do: against direct computations, on one device and on eight."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import toys

import tokenizers
from configs import eval_understanding
from tokenizers import media
from tokenizers.evaluate import reading, run, session, understanding
from tokenizers.evaluate.understanding import Setup
from tokenizers.parallel.mesh import make_mesh

RNG = np.random.default_rng(0)


@pytest.fixture
def small_chunks(monkeypatch):
    """Everything in several chunks, the last one filled up."""
    monkeypatch.setattr(understanding, "_ROWS", 16)
    monkeypatch.setattr(understanding, "_FLOATS", 2048)


@functools.cache
def eight():
    return make_mesh(data=4, fsdp=2)


def clusters(count, classes=5, width=12, seed=0, spread=0.6):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.integers(classes, size=count).astype(np.int32)
    return (centers[labels] + spread * rng.normal(size=(count, width))).astype(np.float32), labels


def test_accuracies_count_the_better_classes():
    scores = np.array([[3.0, 2, 1], [1, 3, 2], [2, 2, 2]])
    assert understanding.accuracies(scores, np.array([0, 2, 2]), (1, 2, 3)) == {1: 1 / 3, 2: 2 / 3, 3: 1.0}


def test_class_weights_are_means_of_directions():
    vectors = {"a cat": [3.0, 0], "the cat": [0, 5.0], "a dog": [0, -1.0], "the dog": [0, -7.0]}
    weights = understanding.class_weights(["cat", "dog"], ["a {}", "the {}"], lambda texts: [vectors[t] for t in texts])
    np.testing.assert_allclose(weights, [[0.5**0.5, 0.5**0.5], [0, -1]], atol=1e-7)
    with pytest.raises(ValueError, match="one {} for the name"):
        Setup(templates=("a photo",))


@pytest.mark.parametrize("devices", [1, 8])
def test_neighbours_vote_by_their_cosine(small_chunks, devices):
    bank, labels = clusters(150)
    queries, _ = clusters(37, seed=1)
    mesh = eight() if devices == 8 else None
    votes = understanding.nearest_neighbour_scores(bank, labels, queries, 6, 7, 0.1, mesh)
    cosines = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (bank / np.linalg.norm(bank, axis=1)[:, None]).T
    expected = np.zeros((37, 6))
    for row, found in enumerate(cosines):
        for near in np.argsort(-found, kind="stable")[:7]:
            expected[row, labels[near]] += np.exp(found[near] / 0.1)
    np.testing.assert_allclose(votes, expected, rtol=1e-4)  # float32 cosines over a temperature of 0.1
    few = understanding.nearest_neighbour_scores(bank[:3], labels[:3], queries[:2], 6, 7, 0.1, mesh)
    assert few.astype(bool).sum() <= 2 * 3, "a bank with fewer rows votes as a whole"


def plain_probe(features, labels, classes, setup, rate):
    """The loop of the papers, one step at a time, in float64."""
    rng = np.random.default_rng(setup.seed)
    weights, bias = rng.normal(0, 0.01, (features.shape[1], classes)), np.zeros(classes)
    speed = np.zeros_like(weights), np.zeros_like(bias)
    steps = round(setup.epochs * len(features) / setup.batch_size)
    epochs = -(-steps * setup.batch_size // len(features))
    order = np.concatenate([rng.permutation(len(features)) for _ in range(epochs)])
    for step in range(steps):
        chosen = order[step * setup.batch_size : (step + 1) * setup.batch_size]
        x, logits = features[chosen], features[chosen] @ weights + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p = p / p.sum(1, keepdims=True) - np.eye(classes)[labels[chosen]]
        gradients = x.T @ p / len(x), p.mean(0)
        speed = tuple(0.9 * s + g for s, g in zip(speed, gradients, strict=True))
        now = rate * setup.batch_size / 256 * 0.5 * (1 + np.cos(np.pi * step / steps))
        weights, bias = weights - now * speed[0], bias - now * speed[1]
    return weights, bias


@pytest.mark.parametrize("devices", [1, 8])
def test_the_linear_probe_is_the_papers_loop(small_chunks, devices, monkeypatch):
    features, labels = clusters(90)
    others, answers = clusters(61, seed=2)
    setup = Setup(epochs=3, batch_size=20, learning_rates=(1e-3, 0.1, 1.0), seed=4)
    states = []
    learn = understanding._learn
    monkeypatch.setattr(understanding, "_learn", lambda *given: states.append(learn(*given)) or states[-1])
    mesh = eight() if devices == 8 else None
    found = understanding.linear_probe(features, labels, others, answers, 5, setup, mesh)
    assert len(states) > 1, "several pieces"
    for number, rate in enumerate(setup.learning_rates):
        weights, bias = plain_probe(features, labels, 5, setup, rate)
        np.testing.assert_allclose(states[-1][0]["w"][number], weights, atol=1e-5)
        np.testing.assert_allclose(states[-1][0]["b"][number], bias, atol=1e-5)
        assert found[rate] == np.mean((others @ weights + bias).argmax(1) == answers)
    assert found[1.0] > 0.85


def test_a_probe_finds_nothing_where_there_is_nothing():
    features = RNG.normal(size=(400, 8)).astype(np.float32)
    labels = RNG.integers(4, size=400).astype(np.int32)
    others, answers = RNG.normal(size=(400, 8)).astype(np.float32), RNG.integers(4, size=400).astype(np.int32)
    found = understanding.linear_probe(features, labels, others, answers, 4, Setup(epochs=2, learning_rates=(0.1,)))
    assert 0.15 < found[0.1] < 0.35


@pytest.mark.parametrize("devices", [1, 8])
def test_recalls_are_ranks_of_right_answers(small_chunks, devices):
    mesh = eight() if devices == 8 else None
    texts = np.eye(20, 24, dtype=np.float32)
    pairs = np.array([*range(20), 3, 3, 7], np.int32)  # three pictures have the text of another one
    perfect = understanding.recalls(texts[pairs], texts, pairs, mesh, at=(1, 5))
    assert set(perfect.values()) == {1.0}
    noise = np.random.default_rng(7).normal(size=(23, 24))
    images = understanding._unit(texts[pairs] + 0.5 * noise).astype(np.float32)
    found = understanding.recalls(images, texts, pairs, mesh, at=(1, 2))
    similar = images @ texts.T
    ranks = [(np.delete(row, own) >= row[own]).sum() for row, own in zip(similar, pairs, strict=True)]
    back = [(column[pairs != t] >= column[pairs == t].max()).sum() for t, column in enumerate(similar.T)]
    for k in (1, 2):
        assert found[f"image_to_text_r{k}"] == np.mean(np.array(ranks) < k)
        assert found[f"text_to_image_r{k}"] == np.mean(np.array(back) < k)
    assert 0 < found["image_to_text_r1"] < 1
    same = understanding.recalls(np.ones((23, 24), np.float32), np.ones((20, 24), np.float32), pairs, mesh, at=(1, 5))
    assert set(same.values()) == {0.0}, "an encoder that says the same of everything finds nothing"


def test_standardized_features_have_no_scale():
    first = RNG.normal(3, 2, size=(50, 3)).astype(np.float32)
    first[:, 2] = 7
    scaled, other = understanding.standardized(first, first + 1)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(0), [1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(other[:, :2] - scaled[:, :2], 1 / first.std(0)[:2] * np.ones((50, 1)), rtol=1e-4)


def test_texts_survive_the_trip_between_processes():
    rows = reading.texts_as_bytes(["a caf\xe9", "", "a long text"], 8)
    assert [reading.bytes_as_text(row) for row in rows] == ["a caf\xe9", "", "a long t"]
    assert reading.bytes_as_text(reading.texts_as_bytes(["a long text"], 8, end=True)[0]) == "ong text"


@functools.cache
def small_vtp():
    small = {"encoder": (32, 2, 2), "decoder": (32, 1, 2), "latent_channels": 4}
    tower = (("width", 32), ("layers", 1), ("heads", 2), ("features", 32))
    return tokenizers.create("vtp", **small, text_tower=tower)


COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "grey": (128, 128, 128)}
CLASSES = (*COLOURS, "black", "white", "brown")


def batches(seed, count=30, size=12):
    """Pictures of one colour and noise; the last batch is filled up, and the first picture has no label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(COLOURS), size=count)
    pixels = np.array(list(COLOURS.values()))[labels][:, None, None] + rng.normal(0, 25, (count, 32, 32, 3))
    pixels, labels = np.clip(pixels, 0, 255).astype(np.uint8), labels.astype(np.int32)
    captions = [f"a {CLASSES[label]} picture, number {number % 20}" for number, label in enumerate(labels)]
    labels[0] = -1
    for start in range(0, count, size):
        rows = np.arange(start, start + size)
        valid, rows = rows < count, np.minimum(rows, count - 1)
        batch = {"pixels": pixels[rows], "valid": valid, "label": labels[rows], "stream": "colours"}
        yield batch | {"caption": [captions[row] for row in rows]}


HOW = {"classes": CLASSES, "templates": ("a {}",), "neighbours": 3, "epochs": 20, "batch_size": 16}
HOW["learning_rates"] = (0.1, 1.0)
METRICS = ("zero_shot", "retrieval", "linear_probe", "knn")


def evaluate(tokenizer, data=None, metrics=METRICS, mesh=None, setup=None):
    setup = setup or Setup(training=lambda stream: batches(1, 50), **HOW)
    options = {"baseline_items": 0, "preview_items": 0, "understanding": setup, "mesh": mesh}
    return run.evaluate(tokenizer, batches(0) if data is None else data, metrics=metrics, **options)["overall"]


@functools.cache
def alone():
    return evaluate(small_vtp())


def test_a_direct_computation_finds_the_same():
    found, tok = alone(), small_vtp()
    images, labels, captions = [], [], []
    for batch in batches(0):
        rows = np.flatnonzero(batch["valid"])
        images.append(np.asarray(tok.image_embedding(batch["pixels"]))[rows])
        labels += batch["label"][rows].tolist()
        captions += [batch["caption"][row] for row in rows]
    images, labels, names = np.concatenate(images), np.array(labels), [f"a {name}" for name in (*CLASSES, "of none")]
    scores = (images @ np.asarray(tok.text_embedding(names))[:-1].T)[1:]
    assert found["zero_shot_top1"] == pytest.approx(np.mean(scores.argmax(1) == labels[1:]))
    top5 = np.argsort(-scores, axis=1)[:, :5]
    assert found["zero_shot_top5"] == pytest.approx(np.mean((top5 == labels[1:, None]).any(1)))
    texts = sorted(set(captions))
    assert 16 < len(texts) < 30, "some pictures share their text"
    embedded = np.asarray(tok.text_embedding(texts + [""] * (32 - len(texts))))[: len(texts)]
    similar = images @ embedded.T
    own = similar[np.arange(30), [texts.index(caption) for caption in captions]]
    assert found["image_to_text_r5"] == pytest.approx(np.mean((similar >= own[:, None]).sum(1) <= 5))
    assert found["items"] == 30


def test_what_pictures_show_is_found():
    # Colours: even random features tell them apart.
    for key in ("linear_probe", "linear_probe_latents", "knn", "knn_latents"):
        assert alone()[key] > 0.8, key
    assert alone()["linear_probe_choice"]["blocks"] in (1, 2)  # the encoder has two; four are asked for


@pytest.mark.slow  # on eight devices the functions above run in the quick tests, too
@pytest.mark.parametrize("model", ["latents", "vtp"])
def test_eight_devices_find_the_same(model):
    tokenizer = small_vtp() if model == "vtp" else toys.image("continuous")
    found = evaluate(tokenizer, mesh=eight())
    for key, value in (alone() if model == "vtp" else evaluate(tokenizer)).items():
        if isinstance(value, float) and key != "psnr":
            # A picture that is nearly as like another one may change places: 1 of 29.
            assert found[key] == pytest.approx(value, abs=1.01 / 29), key


def test_what_a_tokenizer_or_its_data_cannot_give_is_said():
    plain = evaluate(toys.image("continuous"))
    assert plain["zero_shot_top1"] == "not computed: needs images, and a model with a text tower (VTP)"
    assert plain["text_to_image_r1"] == plain["zero_shot_top1"]
    assert plain["linear_probe"] == plain["knn"]
    assert plain["knn"] == "not computed: needs images, and an encoder with features of its own (VTP)"
    assert plain["linear_probe_latents"] > 0.8
    pictures = {"pixels": np.zeros((12, 32, 32, 3), np.uint8)}
    found = evaluate(small_vtp(), [pictures], setup=Setup())
    assert found["image_to_text_r1"] == "not computed: needs captions"
    for key in ("zero_shot_top1", "linear_probe", "linear_probe_latents", "knn"):
        assert found[key].startswith("not computed: needs labels: config.data.labels=True")
    found = evaluate(small_vtp(), [pictures | {"label": np.arange(12)}], ("zero_shot", "knn"), setup=Setup())
    assert found["zero_shot_top1"].startswith("not computed: needs the names of all classes")
    assert found["knn_latents"].startswith("not computed: needs labelled data to learn from")


def settings(**changes):
    config = eval_understanding.get_config()
    config.compilation_cache, config.understanding.epochs, config.metrics = "", 2, ("linear_probe", "zero_shot")
    config.understanding.learning_rates, config.understanding.batch_size = (0.1,), 16
    (stream,) = config.data.streams.values()
    stream.update({"resolutions": ((16, 16),), "batch_size": 8})
    config.data.update(changes)
    return config


def test_what_is_learned_from_is_not_what_is_evaluated(tmp_path):
    """The rest of the data, another folder, a part of a large one, or nothing."""
    for number, (name, colour) in enumerate([*COLOURS.items()] * 3):
        path = tmp_path / "data" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        media.write(path, np.broadcast_to(np.array(colour, np.uint8), (16, 16, 3)).copy())
    folder = {"path": str(tmp_path / "data")}

    def names(batches):
        return [name for batch in batches for name, valid in zip(batch["name"], batch["valid"], strict=True) if valid]

    config = settings(**folder, held_out="0.4").to_dict()
    data = session._data(tmp_path, config)
    setup = session._understanding(tmp_path, config, data.classes)
    assert setup.classes == tuple(sorted(COLOURS))
    learned, tested = names(setup.training("input")), names(data.batches())
    assert not set(learned) & set(tested)
    assert len(learned) == 7
    assert len(tested) == 5

    config = settings(**folder).to_dict()
    assert session._understanding(tmp_path, config, ()).training is None, "all of the folder is evaluated"
    config["understanding"]["training"] = folder["path"]
    setup = session._understanding(tmp_path, config, ())
    assert len(names(setup.training("input"))) == 12
    config["understanding"]["training_items"] = 8
    (batch,) = session._understanding(tmp_path, config, ()).training("input")
    assert len(set(batch["label"])) > 2, "not the first folders alone"
    config["understanding"] |= {"views": 2, "training_items": 0}
    setup = session._understanding(tmp_path, config, ())
    assert setup.epochs == 1, "two epochs, of one view each"
    assert sum(len(batch["label"]) for batch in setup.augmented("input")) == 32  # twice twelve, in whole batches
    with pytest.raises(ValueError, match="labels mean other classes"):
        list(session._understanding(tmp_path, config, ("a", "b")).training("input"))
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    config["understanding"]["class_names"] = str(tmp_path / "names.txt")
    assert session._understanding(tmp_path, config, ()).classes == ("a", "b", "c", "d")


def test_the_config_measures_a_saved_folder_on_shapes(tmp_path, capsys):
    toys.causal("continuous").save(tmp_path / "saved")
    found = session.evaluate_checkpoint(tmp_path / "saved", settings(source="shapes", drawings=40), tmp_path / "report")
    found = found["streams"]["input"]
    assert found["items"] == 4
    assert found["zero_shot_top1"] == "not computed: needs images, and a model with a text tower (VTP)"
    assert 0 <= found["linear_probe_latents"] <= 1
    assert "linear probe of pooled latents: " in capsys.readouterr().out
    assert "linear probe of pooled latents" in (tmp_path / "report/report.html").read_text()


WORKER = """
import json, pathlib, sys
import jax
process, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, process)
import toys
import test_evaluate_understanding as test
from tokenizers.evaluate.understanding import Setup
from tokenizers.parallel.mesh import make_mesh

def half(seed, count):
    for batch in test.batches(seed, count):
        rows = slice(6 * process, 6 * process + 6)
        yield {key: value if key == "stream" else value[rows] for key, value in batch.items()}

setup = Setup(**test.HOW, training=lambda stream: half(1, 50))
found = test.evaluate(test.small_vtp(), half(0, 30), mesh=make_mesh(data=2, fsdp=2), setup=setup)
(folder / f"{process}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_find_the_same(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = pathlib.Path(__file__).resolve().parent
    environment = os.environ | {
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(i), str(port), str(tmp_path)], env=environment, stderr=subprocess.PIPE)
        for i in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors.decode()[-3000:]
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert first == second
    for key, value in alone().items():
        if isinstance(value, float):
            assert first[key] == pytest.approx(value, abs=1.01 / 29), key
