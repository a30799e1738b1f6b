"""kl-f8 of latent diffusion (https://arxiv.org/abs/2112.10752) on OpenImages: 32x32 latents of 4 channels.

    python train.py --config=configs/kl_f8.py --config.data.path=data/openimages/train

The authors' steps: batch 12 in two halves per GPU and a learning rate of 4.5e-6 per picture, here for one GPU
with 40 GB. The discriminator starts at step 50,001. The released weights have an rFID of 0.90 and a PSNR of
24.19. LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 246_803
    config.ema_decay = 0.0  # the authors average no weights
    config.ema_warmup = False
    config.accumulate = 2
    config.model.name = "kl-f8"

    config.optimizer = base.optimizer(lr=24 * 4.5e-6, b1=0.5, b2=0.9, clip=0.0, frozen=("objective/logvar",))
    config.loss.reconstruction = "l1"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.reduction = "logvar"  # a sum over the values of a picture; the authors' log-variance is never trained
    config.loss.bottleneck.kl = 1e-6

    base.undamped(config.discriminator)
    config.discriminator.name = "patchgan_2d"
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.norm = "batch"
    config.discriminator.start = config.discriminator.generator_start = 50_001
    config.discriminator.weight = 0.5
    config.discriminator.adaptive = True
    config.discriminator.fresh_forward = True
    config.discriminator.optimizer = base.optimizer(lr=24 * 4.5e-6, b1=0.5, b2=0.9, clip=0.0)

    config.data = base.data(source="images", path="data/openimages/train", held_out="0.001", flip=False)
    config.data.streams["image"] = base.stream(batch_size=24, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # seconds, on the embedded photographs and without the weights of LPIPS
        config.steps = 4
        config.loss.perceptual = None
        config.model.update({"latent_channels": 4, "widths": (32, 32), "blocks": 1, "attention": ()})
        config.discriminator.update({"channels": 8, "layers": 2, "start": 1, "generator_start": 2})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((32, 32),)})
        config.log.every = 1
        config.evaluation.update({"every": 2, "max_items": 4})
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of this config. Accepted: smoke.")
    return config
