"""ViTok (https://arxiv.org/abs/2501.09755) of clips, first stage: 16 frames of 128x128 pixels as 4x16x16 codes.

    python train.py --config=configs/vitok_video.py --config.data.path=<folder of videos>

S-B/4x8, batch 256, 100,000 steps: 24 hours on 16 H100; after a second stage like that of images (12 hours more) rFVD
8.04 and PSNR 30.11 on UCF-101. E, the number of floats of a clip's code, is 4 x 16 x 16 x 16 = 16384: videos need 4 to
8 times the E of one frame. ``--config.model.name=vitok-s-b-8x8`` and ``vitok-s-b-4x16`` have a half and a quarter of
it, ``vitok-b-l-4x8`` a larger decoder. LPIPS needs a weight file.
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 100_000
    config.ema_decay = 0.9999
    config.model.name = "vitok-s-b-4x8"
    config.model.latent_channels = 16
    config.model.remat = "dots"

    config.optimizer = base.optimizer(
        name="adamw", lr=3e-4, schedule="cosine", warmup=2500, b1=0.9, b2=0.95, weight_decay=1e-4, clip=1.0
    )
    config.loss.reconstruction = "l2"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 0.1
    config.loss.bottleneck.kl = 3e-4 * 4096 / 16384**2  # theirs is a mean over the E values of a code, ours their sum

    config.data = base.data(source="videos", path="data/videos", held_out="0.001")
    config.data.streams["video"] = base.stream(frames=16, batch_size=256, resolutions=((128, 128),), fps=12.0)
    config.evaluation.every = config.checkpoint.every = 5000
    if arg == "smoke":  # seconds, on camera motion over the embedded photographs
        config.steps = 60
        config.ema_decay = 0.9
        config.model.update({"encoder": (48, 1, 2), "decoder": (48, 2, 2), "patch": (2, 8, 8), "latent_channels": 16})
        config.optimizer.update({"lr": 2e-3, "warmup": 5})
        config.loss.perceptual = None
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1", "virtual_camera": True})
        config.data.streams.video.update({"frames": 4, "batch_size": 16, "resolutions": ((32, 32),)})
        config.log.every = 10
        config.evaluation.update({"every": 20, "max_items": 8})
        config.checkpoint.every = 60
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/vitok_video.py. Accepted: smoke.")
    return config
