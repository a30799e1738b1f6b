"""VA-VAE (https://arxiv.org/abs/2501.01423) on ImageNet at 256x256: 16x16 latents of 32 channels, like DINOv2's.

    python train.py --config=configs/vavae_f16d32.py --config.data.path=data/imagenet/train

The recipe of the paper's table 2: 50 epochs, batch 256 (the authors: 32 GPUs), the discriminator from step 2,501 on
(they count 5,001 optimizer steps, two per batch). Expected: rFID 0.28, PSNR 27.96, LPIPS 0.096, and an FID of 8.22
with LightningDiT-XL after 80 epochs. DINOv2 ViT-L/14 and LPIPS need their weight files (docs/convert_weights.md).

    --config=configs/vavae_f16d32.py:mae     aligned with MAE ViT-L/16: rFID 0.28, PSNR 28.33
    --config=configs/vavae_f16d32.py:ldm     not aligned: rFID 0.26, PSNR 28.59, and an FID of 10.92

The released weights were trained longer: 100 epochs with alignment.weight=0.5 and margins of 0, then 15 epochs with
weight 0.1, then 15 more with the margins here; the discriminator from the start in the latter two.
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 250_000
    config.ema_decay = 0.0  # the authors average no weights
    config.ema_warmup = False
    config.precision = "float32"
    config.model.name = "vavae-f16d32-dinov2"

    config.optimizer = base.optimizer(lr=1e-4, b1=0.5, b2=0.9, clip=0.0, frozen=("objective/logvar",))
    config.loss.reconstruction = "l1"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.reduction = "logvar"  # a sum over the values of a picture; the authors' log-variance is never trained
    config.loss.bottleneck.kl = 1e-6
    config.loss.alignment.network = "dinov2_large"
    config.loss.alignment.weight = 0.1
    config.loss.alignment.cosine_margin = 0.5
    config.loss.alignment.distance_margin = 0.25

    base.undamped(config.discriminator)
    config.discriminator.name = "patchgan_2d"
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.norm = "batch"
    config.discriminator.start = config.discriminator.generator_start = 2_501
    config.discriminator.weight = 0.5
    config.discriminator.adaptive = True
    config.discriminator.optimizer = base.optimizer(lr=1e-4, b1=0.5, b2=0.9, clip=0.0)

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001", flip=False)
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 5_000
    if arg == "mae":
        config.model.name = "vavae-f16d32-mae"
        config.loss.alignment.network = "mae_large"
    elif arg == "ldm":
        config.model.name = "vavae-f16d32-ldm"
        config.loss.alignment.network = None
    elif arg == "smoke":  # seconds, on the embedded photographs and without the weights of LPIPS and DINOv2
        config.steps = 4
        config.loss.perceptual = None
        config.loss.alignment.network = None
        config.model.update({"latent_channels": 8, "widths": (32,) * 5, "blocks": 1})
        config.discriminator.update({"channels": 8, "layers": 2, "start": 1, "generator_start": 2})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((64, 64),)})
        config.log.every = 1
        config.evaluation.update({"every": 2, "max_items": 4})
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/vavae_f16d32.py. Accepted: mae, ldm, smoke.")
    return config
