"""A run of seconds for the tests of training: a config file of train.py, and a way to start that in a process.

``--config=tests/tiny_run.py`` trains with a discriminator on the embedded photographs, images and clips in turn;
``:ema`` has a moving-average codebook too, ``:clips`` that and clips alone, ``:plain`` no discriminator.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import tiny_model  # noqa: E402

from configs import base  # noqa: E402

TIMING = ("seconds_per_step", "frames_per_second", "input_wait")


def get_config(arg=None):
    tiny_model.register()
    config = base.get_base()
    config.steps = 6
    config.ema_decay = 0.9
    config.precision = "float32"
    config.compilation_cache = ""
    config.model.name = "tiny"
    config.model.bottleneck = {"name": "fsq", "levels": (4, 4, 4)}
    config.model.latent_channels = 3
    if arg in ("ema", "clips"):
        config.model.bottleneck = {"name": "vq", "codebook_size": 16, "code_dim": 3, "learning": "ema"}
        config.loss.bottleneck.commitment = 0.25
    config.optimizer = base.optimizer(lr=1e-2, schedule="cosine", warmup=2)
    if arg != "plain":
        base.undamped(config.discriminator)
        config.discriminator.name = "patchgan_2d"
        config.discriminator.channels = 8
        config.discriminator.layers = 1
        config.discriminator.norm = "group"
        config.discriminator.generator_start = 2
        config.discriminator.optimizer = base.optimizer(lr=2e-3, b1=0.5)
    config.data = base.data(source="", virtual_camera=True)
    if arg != "clips":
        config.data.streams["image"] = base.stream(frames=1, batch_size=8, resolutions=((16, 16),), weight=2.0)
    config.data.streams["video"] = base.stream(frames=3, batch_size=8, resolutions=((16, 16),))
    config.log.every = 1
    config.evaluation.every = 3
    config.evaluation.max_items = 2
    config.evaluation.final_report = False
    config.checkpoint.every = 2
    return config


def curve(folder) -> list[dict]:
    """The lines of ``metrics.jsonl`` without what the clock decides."""
    lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def only_counters_differ(new, old) -> None:
    """Asserts that two states of training are equal, bit for bit, but for their counts of steps."""
    import chex

    counters = {name: getattr(old, name) for name in ("step", "skipped", "skipped_in_a_row")}
    chex.assert_trees_all_equal(new.replace(**counters), old)


def start(
    workdir,
    *options: str,
    config: str = "tests/tiny_run.py",
    argument: str = "",
    devices: int = 1,
    **environment: str | None,
) -> subprocess.Popen:
    """train.py in a process of its own, on CPU; ``environment`` changes variables, ``None`` removes one."""
    config += f":{argument}" if argument else ""
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *options]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Level 0 halves the time to compile; what it computes is as reproducible as at any other.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "tokenizers_test_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        **environment,
    }
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def parts(config, devices=None):
    """(mesh, recipe, first state, step) of a config; ``step(state, pixels)`` donates the state, pixels are numpy."""
    import jax

    from tokenizers.parallel import mesh as meshes
    from tokenizers.parallel import platform
    from tokenizers.train import build
    from tokenizers.train.config import to_dict
    from tokenizers.train.step import make_step

    config = to_dict(config)
    where = config["mesh"]
    mesh = meshes.make_mesh(where["data"], where["fsdp"], where["context"], where["split"], devices)
    with jax.set_mesh(mesh):
        recipe = build.recipe(config)
        state = build.initial_state(config, recipe, mesh)
        placed, programs = build.out_shardings(state, mesh), {}

    def step(state, pixels):
        now = recipe.at(int(state.step))
        key = now.adversary is not None and now.adversary.runs
        if key not in programs:
            options = platform.run_once_options()
            programs[key] = jax.jit(make_step(now), donate_argnums=0, out_shardings=placed, compiler_options=options)
        with jax.set_mesh(mesh):
            return programs[key](state, {}, {"pixels": meshes.global_batch(mesh, pixels)})

    step.programs = programs
    return mesh, recipe, state, step
