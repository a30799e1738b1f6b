"""Open-MAGVIT2 (https://arxiv.org/abs/2409.04410) on ImageNet at 256x256: 16x16 tokens of 18 bits (262,144 codes).

    python train.py --config=configs/open_magvit2_imagenet_256.py --config.data.path=data/imagenet/train

The authors' imagenet_lfqgan_256_L.yaml: 270 epochs at batch 256 (32 accelerators with 8 images each), the rate falling
tenfold after epochs 200 and 250, the discriminator from the start. Released weights (averages) on ImageNet's validation
set: rFID 1.17, PSNR 21.90, all codes in use. LPIPS needs its weight files (docs/convert_weights.md); in the authors'
code its dropout is active, here it is not.

``pretrain``: their 1,500,000 steps on 100 million web images, falling after 800,000 and 1,000,000 (rFID 1.67 on
ImageNet). ``pretrain_16384``: the same with 14 bits, a warm-up, a cosine, and MaskBit's discriminator (rFID 2.55).
"""

from configs import base

_EPOCH = 1_281_167 // 256


def get_config(arg=None):
    config = base.get_base()
    config.steps = 270 * _EPOCH
    config.ema_decay = 0.999
    config.ema_warmup = False
    config.model.name = "open-magvit2-imagenet-256-262144"

    adam = {"lr": 1e-4, "b1": 0.5, "b2": 0.9, "clip": 0.0}
    drops = {"schedule": "steps", "drops": (200 * _EPOCH, 250 * _EPOCH)}
    config.optimizer = base.optimizer(**adam, **drops)
    config.loss.reconstruction = "l1"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.bottleneck.commitment = 0.25
    config.loss.bottleneck.entropy_sample = 0.1  # one code for each position ...
    config.loss.bottleneck.entropy_codebook = -0.1  # ... and all codes in use

    base.undamped(config.discriminator)
    config.discriminator.name = "patchgan_2d"
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.norm = "batch"
    config.discriminator.generator_loss = "non_saturating_item"
    config.discriminator.discriminator_loss = "hinge"
    config.discriminator.adaptive = False
    config.discriminator.weight = 0.1
    config.discriminator.lecam_weight = 0.05
    config.discriminator.ema_decay = 0.999
    config.discriminator.optimizer = base.optimizer(**adam, **drops)

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001")
    config.data.update({"flip": False, "resample": "bilinear"})
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg in ("pretrain", "pretrain_16384"):
        config.steps = 1_500_000
        config.data.path = "data/web"
        drops = {"schedule": "steps", "drops": (800_000, 1_000_000)}
        config.model.name = "open-magvit2-pretrain-256-262144"
        if arg == "pretrain_16384":
            config.model.name = "open-magvit2-pretrain-256-16384"
            drops = {"schedule": "cosine", "end": 0.01, "warmup": 5_000, "warmup_from": 0.0}
            config.discriminator.update({"name": "blur_2d", "channels": 128, "norm": "group"})
        config.optimizer = base.optimizer(**adam, **drops)
        config.discriminator.optimizer = base.optimizer(**adam, **drops)
    elif arg == "smoke":  # a minute, on the embedded photographs and without the weights of LPIPS
        config.steps = 60
        config.ema_decay = 0.9
        config.model.bottleneck = {"name": "lfq", "bits": 10}
        config.model.update({"latent_channels": 10, "channels": 32, "multipliers": (1, 1), "blocks": 1})
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
        raise ValueError(f"unknown argument {arg!r} of this config. Accepted: pretrain, pretrain_16384, smoke.")
    return config
