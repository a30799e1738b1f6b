"""Quickstart: a small causal 3D tokenizer with an FSQ bottleneck, on photographs and clips that come with the package.

    python train.py --config=configs/quickstart.py

Two CPU cores, at most five minutes. Your own photographs or clips: --config.data.path=<folder>
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 1500
    config.ema_decay = 0.995

    config.model.name = "causal3d"
    config.model.bottleneck = {"name": "fsq", "levels": (8, 8, 8, 8, 8, 8)}
    config.model.latent_channels = 6
    config.model.channels = (64, 128)
    config.model.blocks = 1
    config.model.patch = 4
    config.model.space_down = (True, False)
    config.model.time_down = (True, True)

    config.optimizer = base.optimizer(lr=2e-3, schedule="cosine", warmup=50, end=0.05, b2=0.95)
    config.loss.reconstruction = "l1"

    config.discriminator.name = "patchgan_2d"
    config.discriminator.channels = 16
    config.discriminator.layers = 2
    config.discriminator.norm = "group"
    config.discriminator.start = 1000
    config.discriminator.generator_start = 1200
    config.discriminator.weight = 0.05
    config.discriminator.optimizer = base.optimizer(lr=5e-4, b1=0.5, b2=0.9)

    config.data = base.data(source="", held_out="0.1", virtual_camera=True)
    config.data.streams["image"] = base.stream(frames=1, batch_size=16, weight=2.0)
    config.data.streams["video"] = base.stream(frames=9, batch_size=4, weight=1.0)

    config.log.every = 50
    config.evaluation.every = 500
    config.checkpoint.every = 500
    if arg == "smoke":  # seconds instead of minutes, for tests
        config.steps = 6
        config.model.channels = (16, 16)
        config.discriminator.start = 1
        config.discriminator.generator_start = 2
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((32, 32),)})
        config.data.streams.video.update({"batch_size": 8, "resolutions": ((32, 32),), "frames": 5})
        config.log.every = 1
        config.evaluation.every = 3
        config.evaluation.items = 8
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/quickstart.py. Accepted: smoke.")
    return config
