"""Small tokenizers with random weights for tests of what is around a model, and one short training run."""

import atexit
import functools
import pathlib
import shutil
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp

import tokenizers
from tokenizers import registry
from tokenizers.nn.resample import depth_to_space, space_to_depth
from tokenizers.parallel import mesh as meshes
from tokenizers.quantize.fsq import FSQ
from tokenizers.quantize.gaussian import DiagonalGaussian
from tokenizers.types import Spec

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Compression (2, 4, 4), the first frame alone.
CAUSAL = {"channels": (8,), "patch": 2, "space_down": (True,), "time_down": (True,)}
DISCRETE = {"bottleneck": {"name": "fsq", "levels": (5, 5, 5)}, "latent_channels": 3}
CONTINUOUS = {"bottleneck": {"name": "gaussian"}, "latent_channels": 2}

# Cosmos with all its parts.
COSMOS = {
    "bottleneck": {"name": "fsq", "levels": (8, 5, 5)},
    "latent_channels": 3,
    "compression": (8, 8),
    "channels": 8,
    "encoder_multipliers": (1, 2, 2),
    "decoder_multipliers": (1, 2, 2),
    "blocks": 1,
    "z_channels": 8,
}


def use_one_device(patch):
    """Meshes of configs have the first device alone, while the `pytest.MonkeyPatch` lasts."""
    make = meshes.make_mesh
    patch.setattr(meshes, "make_mesh", lambda *sizes: make(*sizes, devices=jax.devices()[:1]))


class PatchImage(nn.Module):
    """Patches through two dense layers: a tokenizer of images. With ``input_size`` its tokens are a sequence."""

    bottleneck: nn.Module = FSQ((5, 5, 5))
    latent_channels: int = 3
    width: int = 16
    input_size: tuple[int, int] | None = None
    dtype: type = jnp.float32

    def setup(self):
        self.hidden = nn.Dense(self.width)
        self.inner = nn.Dense(self.width)
        self.outer = nn.Dense(self.bottleneck.input_channels(self.latent_channels))
        self.decoder = nn.Dense(4 * 4 * 3)

    @property
    def spec(self):
        tokens = None if self.input_size is None else self.input_size[0] * self.input_size[1] // 16
        size = self.bottleneck.codebook_size
        return Spec((1, 4, 4), self.latent_channels, size, True, False, "decoder/kernel", tokens_per_item=tokens)

    def encode(self, pixels, train=False):
        assert pixels.ndim == 4, pixels.shape
        z = self.outer(nn.tanh(self.inner(nn.tanh(self.hidden(space_to_depth(pixels, (4, 4)))))))
        z = z if self.input_size is None else z.reshape(z.shape[0], -1, z.shape[-1])
        return self.bottleneck(z, train)

    def decode(self, latents, train=False):
        grid = latents
        if self.input_size is not None:
            grid = latents.reshape(-1, self.input_size[0] // 4, self.input_size[1] // 4, latents.shape[-1])
        assert grid.ndim == 4, grid.shape
        return depth_to_space(self.decoder(grid), (4, 4))

    def indices_to_latents(self, indices):
        return self.bottleneck.indices_to_codes(indices)

    def __call__(self, pixels, train=False):
        encoding = self.encode(pixels, train)
        return self.decode(encoding.latents, train), encoding


@functools.cache
def causal(kind: str = "discrete") -> tokenizers.Tokenizer:
    """A causal video tokenizer, ``discrete`` or ``continuous``."""
    return tokenizers.create("causal3d", **CAUSAL, **{"discrete": DISCRETE, "continuous": CONTINUOUS}[kind])


@functools.cache
def image(kind: str = "grid") -> tokenizers.Tokenizer:
    """An image tokenizer: ``grid``, ``tokens`` (16 of them for 16 x 16 pixels), ``continuous`` or ``wide``."""
    module = {
        "grid": PatchImage(),
        "tokens": PatchImage(input_size=(16, 16)),
        "continuous": PatchImage(DiagonalGaussian(), 2),
        "wide": PatchImage(width=256),  # its kernel is large enough to be split over devices
    }[kind]
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros(registry.example_shape(module)))
    return tokenizers.Tokenizer(module, dict(variables), f"patches-{kind}", {})


@functools.cache
def run() -> pathlib.Path:
    """The folder of a run: the quickstart's smoke config with one level and no discriminator, two steps."""
    from configs import quickstart
    from tokenizers.train import loop

    folder = pathlib.Path(tempfile.mkdtemp(prefix="toy_run_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = quickstart.get_config("smoke")
    del config.data.streams["image"]
    config.model.update({"channels": (8,), "space_down": (False,), "time_down": (True,)})  # compression (2, 8, 8)
    config.steps, config.evaluation.max_items, config.compilation_cache = 2, 4, ""
    config.discriminator.name = None
    config.log.tensorboard = False
    assert loop.run(config, folder / "run")
    return folder / "run"
