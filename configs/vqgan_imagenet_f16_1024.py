"""VQGAN (https://arxiv.org/abs/2012.09841) on ImageNet at 256x256: 16x16 tokens out of 1,024.

    python train.py --config=configs/vqgan_imagenet_f16_1024.py --config.data.path=data/imagenet/train

The authors' imagenet_vqgan.yaml: batch 12 and a learning rate of 4.5e-6 per picture of the batch, the discriminator
from step 250,001 on. They do not say how long they trained; the 500,000 steps here are a guess. One GPU with 40 GB; the
released weights have an rFID of 7.94 on the validation set. LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 500_000
    config.ema_decay = 0.0  # the authors average no weights
    config.ema_warmup = False
    config.model.name = "vqgan-imagenet-f16-1024"

    config.optimizer = base.optimizer(lr=12 * 4.5e-6, b1=0.5, b2=0.9, clip=0.0)
    config.loss.reconstruction = "l1"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    # The released code has the paper's two weights swapped.
    config.loss.bottleneck.commitment = 1.0
    config.loss.bottleneck.codebook = 0.25

    base.undamped(config.discriminator)
    config.discriminator.name = "patchgan_2d"
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.norm = "batch"
    config.discriminator.start = config.discriminator.generator_start = 250_001
    config.discriminator.weight = 0.8
    config.discriminator.adaptive = True
    config.discriminator.fresh_forward = True
    config.discriminator.optimizer = base.optimizer(lr=12 * 4.5e-6, b1=0.5, b2=0.9, clip=0.0)

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001", flip=False)
    config.data.streams["image"] = base.stream(batch_size=12, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # seconds, on the embedded photographs and without the weights of LPIPS
        config.steps = 4
        config.loss.perceptual = None
        config.model.bottleneck = {"name": "vq", "codebook_size": 64, "code_dim": 8}
        config.model.update({"latent_channels": 8, "z_channels": 8, "widths": (32, 32), "stem": 32, "blocks": 1})
        config.model.attention = ()
        config.discriminator.update({"channels": 8, "layers": 2, "start": 1, "generator_start": 2})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((32, 32),)})
        config.log.every = 1
        config.evaluation.update({"every": 2, "max_items": 4})
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of this config. Accepted: smoke.")
    return config
