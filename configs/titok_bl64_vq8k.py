"""TiTok (https://arxiv.org/abs/2406.07550) in a single stage: 256x256 pixels as 64 tokens out of 8192.

    python train.py --config=configs/titok_bl64_vq8k.py --config.data.path=<folder of ImageNet's train split>

Batch 256, 1,000,000 steps (200 epochs): about three weeks on 8 A100. The released weights have an rFID of 2.06.
Their recipe is L2, a perceptual loss, and a discriminator from step 200,000. Its perceptual loss is LPIPS plus a tenth
of a distance of ConvNeXt-S logits, its discriminator MaskBit's; here they are LPIPS alone and PatchGAN: expect another
score. ``b``, ``l`` in the name: a base encoder and a large decoder. LPIPS needs a weight file.
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 1_000_000
    config.ema_decay = 0.999
    config.model.name = "titok-bl64-vq8k"
    config.model.remat = True

    config.optimizer = base.optimizer(
        name="adamw", lr=1e-4, schedule="cosine", warmup=10_000, end=0.1, b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0
    )
    config.loss.reconstruction = "l2"
    config.loss.reconstruction_weight = 0.25  # theirs is for pixels in [0, 1]
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.bottleneck.commitment = 0.25
    config.loss.bottleneck.codebook = 1.0

    base.undamped(config.discriminator)
    config.discriminator.name = "patchgan_2d"
    config.discriminator.adaptive = False
    config.discriminator.weight = 0.1
    config.discriminator.lecam_weight = 0.001
    config.discriminator.start = 200_000
    config.discriminator.generator_start = 200_000
    config.discriminator.norm = "group"
    config.discriminator.optimizer = base.optimizer(
        name="adamw", lr=1e-4, schedule="cosine", end=0.1, b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0
    )

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001", resample="bicubic")
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # seconds, on the embedded photographs
        config.steps = 4
        config.model.bottleneck = {"name": "vq", "codebook_size": 64, "code_dim": 8}
        config.model.update({"latent_channels": 8, "tokens": 16, "input_size": (32, 32), "patch": 8})
        config.model.update({"encoder": (32, 1, 2), "decoder": (32, 2, 2), "remat": False})
        config.optimizer.warmup = 2
        config.loss.perceptual = None
        config.discriminator.update({"channels": 8, "layers": 1, "start": 1, "generator_start": 2})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((32, 32),)})
        config.log.every = 1
        config.evaluation.update({"every": 2, "max_items": 4})
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/titok_bl64_vq8k.py. Accepted: smoke.")
    return config
