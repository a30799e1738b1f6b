"""Quickstart: a small causal 3D tokenizer with an FSQ bottleneck, on photographs and clips that come with the package.

    python train.py --config=configs/quickstart.py

Two CPU cores, at most five minutes. Your own photographs or clips: --config.data.path=<folder>
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 600
    config.ema_decay = 0.995

    # One token of 24 bits for 8x8 pixels of the first frame, then for 4 frames of 8x8 pixels.
    config.model.name = "causal3d"
    config.model.bottleneck = {"name": "fsq", "levels": (8,) * 8, "commitment": True}
    config.model.latent_channels = 8
    config.model.channels = (128, 128)
    config.model.blocks = 1
    config.model.patch = 8
    config.model.space_down = (False, False)
    config.model.time_down = (True, True)

    config.optimizer = base.optimizer(lr=1e-3, schedule="cosine", warmup=100, end=0.02, b2=0.95)
    config.loss.reconstruction = "l1"
    config.loss.bottleneck.commitment = 0.25  # keeps the encoder's output where the tanh of FSQ still has a slope

    base.undamped(config.discriminator)
    config.discriminator.name = "patchgan_2d"
    config.discriminator.channels = 32
    config.discriminator.layers = 2
    config.discriminator.norm = "group"
    config.discriminator.start = 400
    config.discriminator.generator_start = 440
    config.discriminator.weight = 0.05
    config.discriminator.optimizer = base.optimizer(lr=5e-4, b1=0.5, b2=0.9)

    config.data = base.data(source="", held_out="0.1", virtual_camera=True, zoom=(1.0, 4.0))
    config.data.streams["image"] = base.stream(frames=1, batch_size=16, weight=2.0)
    config.data.streams["video"] = base.stream(frames=5, batch_size=8, weight=1.0)

    config.log.every = 50
    config.evaluation.every = 200
    config.checkpoint.every = 200
    if arg == "smoke":  # seconds instead of minutes, for tests
        config.steps = 6
        config.model.channels = (16, 16)
        config.optimizer.warmup = 2
        config.discriminator.start = 1
        config.discriminator.generator_start = 2
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((32, 32),)})
        config.data.streams.video.update({"batch_size": 8, "resolutions": ((32, 32),), "frames": 5})
        config.log.every = 1
        config.evaluation.every = 3
        config.evaluation.max_items = 8
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/quickstart.py. Accepted: smoke.")
    return config
