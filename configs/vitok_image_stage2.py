"""ViTok of images, second stage: the decoder alone learns on, against a discriminator; the codes stay what they are.

    python train.py --config=configs/vitok_image_stage2.py --config.init_from=runs/vitok_image \
        --config.data.path=<folder of images>

Batch 256, 100,000 steps: 3 to 6 hours on 8 H100 after `configs/vitok_image.py`. rFID falls to 0.50 while PSNR and SSIM
drop a little. The weight of the adversarial loss is the one that the paper's appendix found best, with the
discriminator's learning rate; the main text has 1.0. The discriminator is StyleGAN's with pixels in [0, 1].
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 100_000
    config.ema_decay = 0.9999
    config.model.name = "vitok-s-b-16"
    config.model.latent_channels = 16
    config.model.remat = "dots"

    config.optimizer = base.optimizer(
        name="adamw", lr=1e-4, schedule="cosine", warmup=2500, b1=0.9, b2=0.95, weight_decay=1e-4, clip=1.0
    )
    config.optimizer.frozen = ("model/encode_patches/",)
    config.loss.reconstruction = "l2"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.bottleneck.kl = 0.0  # of codes that no longer change

    base.undamped(config.discriminator)
    config.discriminator.name = "stylegan_2d"
    config.discriminator.layers = 0
    config.discriminator.norm = "none"
    config.discriminator.adaptive = False
    config.discriminator.weight = 0.05
    config.discriminator.start = 5000
    config.discriminator.generator_start = 5000
    config.discriminator.ramp = 50_000
    config.discriminator.optimizer = base.optimizer(
        name="adamw", lr=2e-5, schedule="cosine", b1=0.9, b2=0.95, weight_decay=1e-4, clip=1.0
    )

    config.data = base.data(source="images", path="data/images", held_out="0.001", resample="bicubic")
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 5000
    if arg == "smoke":  # seconds, on the embedded photographs, after an encoder that nobody trained
        config.steps = 60
        config.ema_decay = 0.9
        config.model.update({"encoder": (48, 1, 2), "decoder": (48, 2, 2), "patch": (1, 8, 8), "latent_channels": 16})
        config.optimizer.update({"lr": 2e-3, "warmup": 5})
        config.loss.perceptual = None
        config.discriminator.update({"channels": 2, "start": 20, "generator_start": 30, "ramp": 60})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 16, "resolutions": ((32, 32),)})
        config.log.every = 10
        config.evaluation.update({"every": 20, "max_items": 8})
        config.checkpoint.every = 60
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/vitok_image_stage2.py. Accepted: smoke.")
    return config
