"""What depends on the platform: compute precision, compiler options and the compilation cache."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

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


def compiler_options() -> dict[str, bool | int | str]:
    """``compiler_options`` of `jax.jit` for every program of this package.

    On the CPU, XLA hands convolutions and sums to the YNNPACK library, whose sum over a broadcast array sometimes
    counts a part twice when threads compete for the cores (jaxlib 0.10 to 0.12: one call in ten of
    ``jnp.sum(jnp.broadcast_to(x, (3, *x.shape)))`` with half a million elements, on two busy cores). XLA's own code is
    as fast here (`benchmarks/cpu_library.py`).
    """
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" else {}


def run_once_options() -> dict[str, bool | int | str]:
    """`compiler_options` for a program that runs once, such as an initializer: the numbers are the same.

    On the CPU, LLVM's optimizer takes several times longer over many small random arrays than all else.
    """
    return compiler_options() | ({"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {})


def scan(body: Callable, carry: Any, inputs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` of few steps with convolutions in them: on the CPU one after the other, without a loop.

    There XLA gives convolutions the form that its fast code takes, but not those inside loops and branches, whose
    gradients so are 20 to 200 times slower (two micro-batches of KL-VAE: 70 s instead of 4). Compile time grows with
    the number of steps.
    """
    return jax.lax.scan(body, carry, inputs, unroll=jax.default_backend() == "cpu")


def lean_options() -> dict[str, bool | int | str]:
    """`compiler_options` for a program whose memory counts: the same operations in another order.

    On the CPU, XLA orders operations so that many of them could run at a time, and keeps what they read.
    """
    lean = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return compiler_options() | (lean if jax.default_backend() == "cpu" else {})


def jit(function: Callable, *, lean: bool = False, **options: Any) -> Callable:
    """`jax.jit` with `compiler_options` or `lean_options`; in another transformation, where JAX takes none, without.

    The platform is looked up at the first call, so modules may wrap functions while they are imported.
    """
    nested = jax.jit(function, **options)

    @functools.cache
    def outermost() -> Callable:
        return jax.jit(function, compiler_options=lean_options() if lean else compiler_options(), **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Inside a trace even a constant is traced; under grad or vmap alone, the arguments are.
        leaves = [jnp.zeros(()), *jax.tree.leaves((args, kwargs))]
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        return (nested if traced else outermost())(*args, **kwargs)

    call.lower = lambda *args, **kwargs: outermost().lower(*args, **kwargs)
    call.trace = lambda *args, **kwargs: outermost().trace(*args, **kwargs)
    call.cache_size = lambda: outermost()._cache_size()
    return call


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


def pretend(devices: int) -> None:
    """Makes so many virtual devices of the CPU; only before the first use of jax, and only to compile for them."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
