"""MaskGIT's VQGAN (https://arxiv.org/abs/2202.04200) on ImageNet at 256x256: 16x16 tokens out of 1,024.

    python train.py --config=configs/maskgit_vqgan.py --config.data.path=data/imagenet/train

The authors' vqgan_config.py: batch 256, 1,000,000 steps, Adam, a StyleGAN discriminator from the start with a
non-saturating loss and the R1 penalty. They published neither their training loop nor the network behind their
perceptual loss; LPIPS stands for it here (its weight files: docs/convert_weights.md), and the pixel loss is the squared
error. A batch of 256 takes several accelerators. The released weights have an rFID of 2.28 on the validation set.
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 1_000_000
    config.ema_decay = 0.999
    config.model.name = "maskgit-vqgan-imagenet256-f16-1024"
    config.model.bottleneck = {"name": "vq", "codebook_size": 1024, "code_dim": 256, "entropy": "smoothed"}

    config.optimizer = base.optimizer(lr=1e-4, b1=0.0, b2=0.99, clip=0.0)
    config.loss.reconstruction = "l2"
    config.loss.reconstruction_weight = 0.25  # theirs is of pixels in [0, 1]
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 0.1
    config.loss.bottleneck.commitment = 0.25
    config.loss.bottleneck.codebook = 1.0
    config.loss.bottleneck.entropy_sample = 0.1
    config.loss.bottleneck.entropy_codebook = -0.1

    base.undamped(config.discriminator)
    config.discriminator.name = "stylegan_2d"
    config.discriminator.channels = 64
    config.discriminator.layers = 0
    config.discriminator.norm = "none"
    config.discriminator.generator_loss = config.discriminator.discriminator_loss = "non_saturating"
    config.discriminator.weight = 0.1
    config.discriminator.adaptive = False
    config.discriminator.r1_weight = 40.0  # 10 for pixels in [0, 1], whose gradients are twice as large
    config.discriminator.r1_every = 1
    config.discriminator.optimizer = base.optimizer(lr=1e-4, b1=0.0, b2=0.99, clip=0.0)

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001")
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # two minutes, on the embedded photographs and without the weights of LPIPS
        config.steps = 300
        config.ema_decay = 0.9
        config.model.bottleneck.update({"codebook_size": 64, "code_dim": 8})
        config.model.update({"latent_channels": 8, "widths": (32, 32, 32), "blocks": 1})
        config.optimizer = base.optimizer(lr=2e-3, warmup=10, schedule="cosine", end=0.1)
        config.loss.perceptual = None
        config.loss.reconstruction_weight = 4.0
        config.loss.bottleneck.update({"entropy_sample": 0.02, "entropy_codebook": -0.02})
        config.discriminator.update({"channels": 4, "start": 290, "generator_start": 295, "weight": 0.02})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1", "zoom": (1.0, 4.0)})
        config.data.streams.image.update({"batch_size": 16, "resolutions": ((32, 32),)})
        config.log.every = 10
        config.evaluation.update({"every": 50, "max_items": 10})
        config.checkpoint.every = 300
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/maskgit_vqgan.py. Accepted: smoke.")
    return config
