"""The notebooks run from top to bottom, at the size that SMOKE=1 asks for, and are committed without outputs."""

import json
import os
import pathlib
import sys

import jax
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# The kernel of this interpreter, whatever kernels the user has installed.
KERNEL = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that looks like a checkout, so that runs and pictures do not end up in the real one."""
    for name in ("configs", "tokenizers", "vistok", "train.py"):
        (tmp_path / "checkout" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "checkout" / name).symlink_to(ROOT / name)
    kernels = tmp_path / "jupyter/kernels/tokenizers-test"
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(json.dumps(KERNEL | {"display_name": "tests"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0")
    monkeypatch.setenv("SMOKE", "1")
    return tmp_path / "checkout"


# The Colab notebook trains, evaluates and converts: one to two minutes.
SLOW = {"colab_quickstart": pytest.mark.slow}


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=SLOW.get(path.stem, ()), id=path.stem) for path in NOTEBOOKS]
)
def test_notebooks_run(path, checkout):
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="tokenizers-test", resources={"metadata": {"path": str(checkout)}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "Warning" not in printed, printed
    assert "error:" not in printed, printed


@each_notebook
def test_notebooks_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            assert len(cell.source.splitlines()) <= 20, "notebooks show how things are used; the rest is the library's"
