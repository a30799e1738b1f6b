"""Open-MAGVIT2 (https://arxiv.org/abs/2409.04410) on UCF-101: 17 frames of 128x128 as 5x16x16 tokens of 18 bits.

    python train.py --config=configs/open_magvit2_video_128.py --config.init_from=runs/inflated
    python train.py --config=configs/open_magvit2_video_128.py:causal

The authors' ucf101_lfqgan_128_L.yaml: 2,000 epochs of 9,537 clips at batch 128 (64 accelerators with two clips each),
two epochs of warm-up and a cosine to a hundredth, from the image model of configs/open_magvit2_imagenet_128.py, which
`tokenizers.models.magvit2.inflate` makes a video model of (docs/convert_weights.md shows how). Released weights: rFVD
16 on UCF-101. LPIPS needs its weight files (docs/convert_weights.md).

That network normalizes over the whole clip, so it is not causal, although MAGVIT-v2
(https://arxiv.org/abs/2310.05737) is. ``causal`` trains the network of the paper, which sees frame by frame, streams,
and encodes an image like the first frame of a clip.
"""

from configs import base

_EPOCH = 9_537 // 128


def get_config(arg=None):
    config = base.get_base()
    config.steps = 2_000 * _EPOCH
    config.ema_decay = 0.999
    config.ema_warmup = False
    config.model.name = "open-magvit2-video-128-262144"
    config.model.remat = True

    adam = {"lr": 1e-4, "b1": 0.5, "b2": 0.9, "clip": 0.0}
    falls = {"schedule": "cosine", "end": 0.01, "warmup": 2 * _EPOCH, "warmup_from": 0.0}
    config.optimizer = base.optimizer(**adam, **falls)
    config.loss.reconstruction = "l1"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.bottleneck.commitment = 0.25
    config.loss.bottleneck.entropy_sample = 0.1
    config.loss.bottleneck.entropy_codebook = -0.1

    base.undamped(config.discriminator)
    config.discriminator.name = "patchgan_3d"
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.norm = "batch"
    config.discriminator.generator_loss = "non_saturating_item"
    config.discriminator.discriminator_loss = "hinge"
    config.discriminator.adaptive = False
    config.discriminator.weight = 0.3
    config.discriminator.lecam_weight = 0.05
    config.discriminator.ema_decay = 0.999
    config.discriminator.optimizer = base.optimizer(**adam, **falls)

    config.data = base.data(source="videos", path="data/ucf101/train", held_out="0.01")
    config.data.update({"flip": False, "resample": "bilinear"})
    config.data.streams["video"] = base.stream(frames=17, batch_size=128, resolutions=((128, 128),))
    config.evaluation.every = config.checkpoint.every = 2_000
    if arg in ("causal", "smoke"):
        config.model.name = "magvit2-video-causal-128-262144"
    if arg == "smoke":  # two minutes, on embedded photographs that a virtual camera moves, without the weights of LPIPS
        config.steps = 60
        config.ema_decay = 0.9
        config.model.bottleneck = {"name": "lfq", "bits": 10}
        config.model.update({"latent_channels": 10, "channels": 32, "multipliers": (1, 1), "blocks": 1})
        config.model.update({"time_levels": (0,), "remat": False})
        config.optimizer = base.optimizer(lr=1e-3)
        config.loss.perceptual = None
        config.discriminator.update({"channels": 8, "layers": 2})
        config.discriminator.optimizer = base.optimizer(lr=1e-4)
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1", "virtual_camera": True})
        config.data.streams.video.update({"frames": 5, "batch_size": 4, "resolutions": ((32, 32),)})
        config.log.every = 10
        config.evaluation.update({"every": 20, "max_items": 8})
        config.checkpoint.every = 60
    elif arg not in (None, "causal"):
        raise ValueError(f"unknown argument {arg!r} of this config. Accepted: causal, smoke.")
    return config
