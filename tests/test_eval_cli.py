"""From a checkpoint to a report: runs, saved folders, data of one's own, several processes."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import refweights
import toys

import tokenizers
from configs import eval_default
from tokenizers import media
from tokenizers.evaluate import session

FAST = ("psnr", "ssim", "lpips", "codebook", "bits")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_WEIGHTS", raising=False)


@pytest.fixture
def config():
    config = eval_default.get_config()
    config.metrics, config.compilation_cache = FAST, ""
    config.baseline_items = config.preview_items = 1
    return config


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    images = np.floor((refweights.image_like("evaluation", (11, 40, 48, 3)) + 1) * 127.5 + 0.5).astype(np.uint8)
    for number, image in enumerate(images):
        media.write(folder / f"{number}.png", image)
    return folder


(STREAM,) = eval_default.get_config().data.streams


def use(config, folder):
    config.data.path = str(folder)
    config.data.streams[STREAM].resolutions = ((32, 32),)


def test_a_run_is_evaluated_on_its_held_out_data(config, tmp_path, capsys):
    results = session.evaluate_checkpoint(toys.run(), config, tmp_path / "report")
    assert set(results["streams"]) == {"video"}
    assert np.isfinite(results["streams"]["video"]["psnr"])
    assert results["streams"]["video"]["lpips"].startswith("not computed: needs ")
    assert {"report.html", "metrics.json", "items.csv"} <= {path.name for path in (tmp_path / "report").iterdir()}
    assert str(tmp_path / "report/report.html") in capsys.readouterr().out


def test_a_saved_folder_is_evaluated_on_all_of_ones_own_data(config, photographs, tmp_path):
    toys.causal().save(tmp_path / "toy-1.5")
    use(config, photographs)
    results = session.evaluate_checkpoint(tmp_path / "toy-1.5", config)
    items = json.loads((tmp_path / "evaluation_toy-1.5/metrics.json").read_text())["streams"][STREAM]
    assert items["items"] == 11
    assert items["psnr"] == pytest.approx(results["streams"][STREAM]["psnr"])


def test_without_data_there_is_nothing_to_evaluate_on(config, tmp_path):
    toys.causal().save(tmp_path / "toy")
    with pytest.raises(ValueError, match="no held-out data of its own: set --config.data.path"):
        session.evaluate_checkpoint(tmp_path / "toy", config)


def test_the_model_of_a_folder_is_not_chosen_again(config, tmp_path):
    config.model.name = "causal3d"
    with pytest.raises(ValueError, match="knows its model"):
        session.evaluate_checkpoint(toys.run(), config, tmp_path)


def evaluate(*arguments):
    command = [sys.executable, "eval.py", *map(str, arguments)]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=toys.ROOT, env=environment, text=True, **streams)


def test_the_script_says_in_one_line_what_is_wrong(tmp_path):
    process = evaluate(f"--checkpoint={tmp_path / 'nothing'}", "--config.compilation_cache=")
    _, complaints = process.communicate(timeout=120)
    assert process.returncode == 1
    assert complaints.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'nothing'} does not exist; accepted: ")


@pytest.mark.slow
def test_two_processes_find_what_one_finds(config, photographs, tmp_path):
    use(config, photographs)
    alone = session.evaluate_checkpoint(toys.run(), config, tmp_path / "alone")["streams"][STREAM]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = [
        f"--checkpoint={toys.run()}",
        f"--out={tmp_path / 'together'}",
        f"--config.data.path={photographs}",
        f"--config.data.streams.{STREAM}.resolutions=((32,32),)",
        f"--config.metrics={FAST}",
        "--config.compilation_cache=",
        "--config.distributed.mode=manual",
        f"--config.distributed.coordinator={address}",
        "--config.distributed.processes=2",
    ]
    processes = [evaluate(*shared, f"--config.distributed.process={number}") for number in range(2)]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "report: " in said[0][0]
    assert "report: " not in said[1][0]
    together = json.loads((tmp_path / "together/metrics.json").read_text())["streams"][STREAM]
    assert together["items"] == alone["items"] == 11
    # Means in another order.
    assert together["psnr"] == pytest.approx(alone["psnr"], rel=1e-4)
    assert tokenizers.load(toys.run()).spec.causal
