"""Open-MAGVIT2 (https://arxiv.org/abs/2409.04410) on ImageNet at 128x128: 16x16 tokens of 18 bits, 8x8 pixels each.

    python train.py --config=configs/open_magvit2_imagenet_128.py --config.data.path=data/imagenet/train

The authors' imagenet_lfqgan_128_L.yaml: 350 epochs at batch 256 (32 accelerators with 8 images each), the rate falling
tenfold after epochs 250 and 300, the discriminator from the start. Released weights (averages) on ImageNet's validation
set: rFID 1.18, PSNR 25.08 at 128x128, and .34, 26.19 at 256x256. The video model starts from this one
(configs/open_magvit2_video_128.py). LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import base

_EPOCH = 1_281_167 // 256


def get_config(arg=None):
    config = base.get_base()
    config.steps = 350 * _EPOCH
    config.ema_decay = 0.999
    config.ema_warmup = False
    config.model.name = "open-magvit2-imagenet-128-262144"

    adam = {"lr": 1e-4, "b1": 0.5, "b2": 0.9, "clip": 0.0}
    drops = {"schedule": "steps", "drops": (250 * _EPOCH, 300 * _EPOCH)}
    config.optimizer = base.optimizer(**adam, **drops)
    config.loss.reconstruction = "l1"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.bottleneck.commitment = 0.25
    config.loss.bottleneck.entropy_sample = 0.1
    config.loss.bottleneck.entropy_codebook = -0.1

    base.undamped(config.discriminator)
    config.discriminator.name = "patchgan_2d"
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.norm = "batch"
    config.discriminator.generator_loss = "non_saturating_item"
    config.discriminator.discriminator_loss = "hinge"
    config.discriminator.adaptive = False
    config.discriminator.weight = 0.1
    config.discriminator.lecam_weight = 0.01
    config.discriminator.ema_decay = 0.999
    config.discriminator.optimizer = base.optimizer(**adam, **drops)

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001")
    config.data.update({"flip": False, "resample": "bilinear"})
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=((128, 128),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # a minute, on the embedded photographs and without the weights of LPIPS
        config.steps = 60
        config.ema_decay = 0.9
        config.model.bottleneck = {"name": "lfq", "bits": 8}
        config.model.update({"latent_channels": 8, "channels": 32, "multipliers": (1, 2), "blocks": 1})
        config.optimizer = base.optimizer(lr=1e-3)
        config.loss.perceptual = None
        config.discriminator.update({"channels": 8, "layers": 2})
        config.discriminator.optimizer = base.optimizer(lr=1e-4)
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((32, 32),)})
        config.log.every = 10
        config.evaluation.update({"every": 20, "max_items": 16})
        config.checkpoint.every = 60
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of this config. Accepted: smoke.")
    return config
