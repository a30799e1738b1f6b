"""Eight virtual devices, one compile cache and quick compilation for the whole suite. Must run before jax is imported.

Most of the suite's time is LLVM's, for programs that run once on tiny inputs: without its optimizations the tests take
less than half the time. What XLA itself does to a program (fusion, layouts, library calls) stays the same.
``XLA_FLAGS=--xla_backend_optimization_level=3`` runs them as a user's program is compiled.
"""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    # Eight devices on two busy cores wait long for each other; XLA's 40 seconds would end the process.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ["XLA_FLAGS"] = " ".join((*_FLAGS, os.environ.get("XLA_FLAGS", "")))  # the last one of a flag counts

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "tokenizers_test_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def one_device(monkeypatch):
    """Meshes of configs have the first of the eight devices alone."""
    import toys

    toys.use_one_device(monkeypatch)
