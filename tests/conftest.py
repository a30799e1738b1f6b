"""Eight virtual devices and one compile cache for the whole suite. Must run before jax is imported."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "tokenizers_test_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
