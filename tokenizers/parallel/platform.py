"""What depends on the platform: compute precision and the compilation cache."""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp

from .. import errors

_PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compute_dtype(precision: str = "auto"):
    """The dtype of activations: ``float32``, ``bfloat16``, or ``auto`` = bfloat16 on TPU and GPU, float32 on CPU.

    Parameters, optimizer state, statistics and losses are float32 whatever this says.
    """
    if precision == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return errors.pick("precision", precision, {"auto": None} | _PRECISIONS)


def run_once_options() -> dict[str, object]:
    """``compiler_options`` of `jax.jit` for a program that runs once: on CPU it is compiled longer than it runs."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def enable_compilation_cache(folder: str | None) -> pathlib.Path | None:
    """Keeps compiled programs on disk, so that the second start of a run takes seconds. Call before the first jit.

    Args:
      folder: where; ``None`` or empty leaves JAX's own setting (``JAX_COMPILATION_CACHE_DIR``) alone.
    """
    if not folder or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    path = pathlib.Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return path


def initialization_options() -> dict[str, int] | None:
    """``compiler_options`` of `jax.jit` for programs that run once and draw many arrays of random numbers.

    On the CPU, LLVM's optimizer takes several times longer over them (10 s for 30 small arrays) than all else; without
    it the numbers are the same. ``None``, the defaults, elsewhere.
    """
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
