"""Two processes over loopback train as one, stop together, and leave a run that one process can go on with."""

import signal
import socket
import time

import numpy as np
import pytest
import tiny_run

OPTIONS = ("--config.evaluation.every=3", "--config.checkpoint.every=3", "--config.mesh.smallest=1")


def finish(process) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def pair(folder, *options):
    """Two processes with two devices each, as they would be started on two machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = ["--config.distributed.mode=manual", "--config.distributed.processes=2"]
    together += [f"--config.distributed.coordinator=127.0.0.1:{port}", *OPTIONS, *options]
    return [
        tiny_run.start(folder, *together, f"--config.distributed.process={i}", argument="clips", devices=2)
        for i in range(2)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The curve of six steps of one process with one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(tiny_run.start(folder, *OPTIONS, argument="clips"))
    return tiny_run.curve(folder)


def same(curve, expected):
    assert [line.keys() for line in curve] == [line.keys() for line in expected]
    for line, wanted in zip(curve, expected, strict=True):
        for name in line:
            # Sums run in another order; mean logits are near zero, PSNR comes from 8-bit pictures.
            np.testing.assert_allclose(line[name], wanted[name], rtol=1e-4, atol=1e-4, err_msg=f"{line['step']} {name}")


def test_two_processes_train_as_one(alone, tmp_path):
    folder = tmp_path / "run"
    first, second = pair(folder, "--config.mesh.data=2", "--config.mesh.fsdp=2")
    output, quiet = finish(first), finish(second)
    same(tiny_run.curve(folder), alone)
    assert "mesh {'data': 2, 'fsdp': 2, 'context_height': 1}" in output
    assert "step " not in quiet  # one of them speaks


@pytest.mark.slow
def test_sigterm_to_one_stops_both_and_one_process_goes_on(tmp_path):
    """The context axis spans the processes here, so both load all rows of a batch."""
    folder = tmp_path / "run"
    long = [
        "--config.mesh.data=1",
        "--config.mesh.context=4",
        "--config.checkpoint.every=0",
        "--config.evaluation.every=3",
    ]
    processes = pair(folder, *long, "--config.steps=2000", "--config.optimizer.schedule=constant")
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 4:
        assert [process.poll() for process in processes] == [None, None], processes[0].communicate()[0]
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [finish(process) for process in processes]
    assert "asked to stop: saved step" in outputs[0]
    saved = max(int(entry.name) for entry in (folder / "checkpoints").iterdir())
    assert 3 <= saved < 2000
    curve = tiny_run.curve(folder)
    assert max(line["step"] for line in curve) == saved
    last = f"--config.steps={saved + 1}"
    finish(tiny_run.start(folder, last, *OPTIONS, "--config.optimizer.schedule=constant", argument="clips"))
    after = tiny_run.curve(folder)
    assert after[: len(curve)] == curve
    assert [line["step"] for line in after[len(curve) :]] == [saved + 1] * 2


def test_a_refused_folder_ends_both(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    processes = pair(tmp_path)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    assert "is not empty and not a run of train.py" in outputs[0]
    assert "the first process of this run stopped; its message says why" in outputs[1]
