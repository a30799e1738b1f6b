"""EQ-VAE (https://arxiv.org/abs/2502.09509): Stable Diffusion's kl-f8, fine-tuned to equivariant latents on OpenImages.

    python train.py --config=configs/eqvae_f8.py --config.data.path=data/openimages/train --config.init_from=kl-f8.ckpt

The authors' steps: batch 10 on each of 8 GPUs, two of them accumulated, a learning rate of 4.5e-6 per picture, 5 epochs
(here of the 1.74 million pictures that have boxes; they do not say which part they took). Expected on ImageNet's
validation set: rFID 0.82, PSNR 25.95, LPIPS 0.141; DiT-B/2 after 400,000 steps: FID 34.1 in place of 43.5. LPIPS needs
its weight files (docs/convert_weights.md).

Here six scales in place of the authors' 24 (8/32 ... 31/32): each, with each turn, is a program of its own, compiled
when it is first drawn (25 in all); and one draw serves both turns of a step, where theirs draws for each.
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 54_470
    config.ema_decay = 0.0  # the authors average no weights
    config.ema_warmup = False
    config.accumulate = 2
    config.model.name = "eq-vae"

    config.optimizer = base.optimizer(lr=160 * 4.5e-6, b1=0.5, b2=0.9, clip=0.0, frozen=("objective/logvar",))
    config.loss.reconstruction = "l1"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.reduction = "logvar"  # a sum over the values of a picture; the authors' log-variance is never trained
    config.loss.bottleneck.kl = 1e-6
    config.loss.equivariance.probability = 0.5
    config.loss.equivariance.smaller = 0.25
    config.loss.equivariance.scales = (8 / 32, 13 / 32, 17 / 32, 22 / 32, 26 / 32, 31 / 32)

    base.undamped(config.discriminator)
    config.discriminator.name = "patchgan_2d"
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.norm = "batch"
    config.discriminator.start = config.discriminator.generator_start = 0
    config.discriminator.weight = 0.5
    config.discriminator.adaptive = True
    config.discriminator.fresh_forward = True
    config.discriminator.optimizer = base.optimizer(lr=160 * 4.5e-6, b1=0.5, b2=0.9, clip=0.0)

    config.data = base.data(source="images", path="data/openimages/train", held_out="0.001", flip=False)
    config.data.zoom = (1.0, 2.0)  # crops of a half to the whole of the shorter side
    config.data.streams["image"] = base.stream(batch_size=160, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 5_000
    if arg == "smoke":  # on the embedded photographs and without the weights of LPIPS
        config.steps = 4
        config.loss.perceptual = None
        config.loss.equivariance.scales = (0.5,)
        config.model.update({"latent_channels": 4, "widths": (32, 32), "blocks": 1})
        config.discriminator.update({"channels": 8, "layers": 2})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((32, 32),)})
        config.log.every = 1
        config.evaluation.update({"every": 2, "max_items": 4})
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/eqvae_f8.py. Accepted: smoke.")
    return config
