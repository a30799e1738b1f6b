"""A step of training, set up without data and weight files: for families.py, scaling.py and torch_training.py.

Scripts whose process may hold Hugging Face's package `tokenizers` as well know this repository's as `vistok`.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from vistok.parallel import flops, platform
from vistok.parallel import mesh as meshes
from vistok.train import build, dryrun
from vistok.train.config import to_dict
from vistok.train.step import make_step


def compiled(function, *args, **options):
    """(program, seconds that it took, operations)."""
    start = time.perf_counter()
    traced = jax.jit(function, compiler_options=platform.compiler_options(), **options).trace(*args)
    program = traced.lower().compile()
    return program, time.perf_counter() - start, flops.count(traced.jaxpr)


class Step:
    """The compiled step of a recipe, every part of it switched on; each call takes one and goes on from its state.

    Attributes:
      shape: of the pixels of a global batch, ``(B, T, H, W, 3)``.
      program: what was compiled.
      compile_seconds: that it took.
      operations: of matrix products and convolutions, of all devices together.
    """

    def __init__(self, config, shape_of, pixels=None):
        """Of a config whose mesh has all devices. Frozen networks get random weights, inputs random values.

        Args:
          config: as a file of configs/ returns it.
          shape_of: the shape, from the model.
          pixels: in place of random ones.
        """
        config = dryrun.compilable(to_dict(config))
        mesh = meshes.from_config(config["mesh"])
        with jax.set_mesh(mesh):
            recipe = build.recipe(config)
            self.shape = shape_of(recipe.model)
            self._state = build.initial_state(config, recipe, mesh)
            self._networks = _networks(recipe, mesh)
            self._inputs = _inputs(recipe, self.shape, mesh)
            if pixels is not None:
                self._inputs["pixels"] = meshes.global_batch(mesh, pixels)
            self.program, self.compile_seconds, self.operations = compiled(
                make_step(recipe.at(config["steps"])),
                self._state,
                self._networks,
                self._inputs,
                donate_argnums=0,
                out_shardings=build.out_shardings(self._state, mesh),
            )

    def __call__(self):
        self._state, metrics = self.program(self._state, self._networks, self._inputs)
        return self._state, metrics


def _networks(recipe, mesh):
    key = jax.random.key(0)
    networks = jax.tree.map(
        lambda leaf: (
            0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else jnp.zeros(leaf.shape, leaf.dtype)
        ),
        dict(recipe.networks),
    )
    return jax.device_put(networks, meshes.replicated(mesh))


def _inputs(recipe, shape, mesh):
    """Every process makes the rows of its devices."""
    rng, parts = np.random.default_rng(0), meshes.batch_share(mesh)[1]

    def rows(array):
        size = (array.shape[0] // parts, *array.shape[1:])
        if np.issubdtype(array.dtype, np.integer):
            return rng.integers(0, 255, size, array.dtype)
        return rng.normal(size=size).astype(array.dtype)

    return {name: meshes.global_batch(mesh, rows(array)) for name, array in recipe.inputs_of(shape).items()}
