"""The scripts of launch/: the shell and the cluster can read them, and train.py knows what they pass."""

import importlib
import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest
import tiny_run
import yaml
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHELL = ("launch/tpu_pod.sh", "launch/slurm.sbatch")
JOBSET = "launch/jobset.yaml"


def test_these_are_all():
    assert sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").iterdir()) == sorted((*SHELL, JOBSET))


@pytest.mark.parametrize("name", SHELL)
def test_the_shell_reads_them(name):
    subprocess.run(["bash", "-n", ROOT / name], check=True)


@pytest.mark.parametrize("name", SHELL)
def test_nothing_starts_without_arguments(name):
    """A run needs a config and a folder, so none of them guesses one."""
    known = dict.fromkeys(("TPU", "ZONE", "REPOSITORY", "SHARE"), "x")
    done = subprocess.run(["bash", ROOT / name], env=os.environ | known, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--config=" in done.stderr


def passed(name):
    """(flag, value) pairs that a file gives to train.py, the examples of its comments included."""
    text = (ROOT / name).read_text().replace("\\\n", " ").replace("#  ", "")
    text = re.sub(r"\n\s+- (?=--)", " ", text)  # words of a list in YAML
    for line in re.findall(r"(?:train\.py|sbatch launch/|tpu_pod\.sh) ?(.*)", text):
        yield from re.findall(r"(?<!\S)--([\w.]+)=(\S+)", line)


@pytest.mark.parametrize("name", [*SHELL, JOBSET])
def test_train_knows_every_flag(name):
    pairs = list(passed(name))
    assert {flag for flag, _ in pairs} >= {"config", "workdir", "config.distributed.mode", "stopped_status"}
    assert {value.strip('"') for flag, value in pairs if flag == "config.distributed.mode"} == {"auto"}
    defined = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "train.py").read_text())
    path = next(value for flag, value in pairs if flag == "config" and value.endswith(".py"))
    config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config()
    for flag, _ in pairs:
        first, *fields = flag.split(".")
        assert first in defined, flag
        place = config
        for field in fields:
            assert isinstance(place, ConfigDict), flag
            assert field in place, flag
            place = place[field]


def test_the_job_set_says_what_jax_looks_for():
    """jax/_src/clusters/k8s_cluster.py: an indexed job of a JobSet, and the right to read pods, jobs and services."""
    job_set, account, role, binding = yaml.safe_load_all((ROOT / JOBSET).read_text())
    assert (job_set["kind"], job_set["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 1
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    readable = {resource for rule in role["rules"] for resource in rule["resources"]}
    assert readable >= {"pods", "jobs", "services"}
    # A run that was stopped has the status for which the job fails, and a failure of that kind starts the set again.
    (container,) = pod["containers"]
    (status,) = [word.split("=")[1] for word in container["command"] if word.startswith("--stopped_status=")]
    stopped = job["podFailurePolicy"]["rules"][0]
    assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("FailJob", [int(status)])
    (rule,) = job_set["spec"]["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    (folder,) = [word.split("=")[1] for word in container["command"] if word.startswith("--workdir=")]
    assert any(folder.startswith(f"{path}/") for path in mounted)


@pytest.mark.slow
def test_a_job_of_slurm_is_one_run(tmp_path):
    """launch/slurm.sbatch with an `srun` that starts two processes here, as on two nodes; the job is requeued."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(
        "#!/bin/bash\nshift 2\npids=()\n"
        "for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=0 "
        f'{sys.executable} "$@" & pids+=($!); done\n'
        "status=0; for pid in ${pids[@]}; do wait $pid || status=$?; done\nexit $status\n"
    )
    (programs / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/requeued\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    folder, options = tmp_path / "run", ("--config.mesh.data=2", "--config.evaluation.every=0")
    env = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "localhost,other",
        "SLURM_NTASKS": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "JAX_COORDINATOR_PORT": str(port),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
    }
    command = ["bash", "launch/slurm.sbatch", "--config=tests/tiny_run.py:clips", f"--workdir={folder}", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mesh {'data': 2" in done.stdout
    assert tiny_run.curve(folder)[-1]["step"] == 6
    assert not (tmp_path / "requeued").exists()
