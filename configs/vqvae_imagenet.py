"""VQ-VAE (https://arxiv.org/abs/1711.00937) on ImageNet at 128x128: 32x32 tokens out of 512, Sonnet's network.

    python train.py --config=configs/vqvae_imagenet.py --config.data.path=<folder of ImageNet's train split>

Batch 128, 250,000 steps as in the paper: about half a day on one GPU. No score is published in PSNR or FID.
The loss is Sonnet's: squared error over the variance of the data (about 1/16 for photographs in [0, 1], which is 1/4
in [-1, 1]) and 0.25 times the commitment; the codebook follows debiased moving averages.
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 250_000
    config.precision = "float32"
    config.model.name = "vqvae-f4-512"

    config.optimizer = base.optimizer(lr=2e-4, clip=0.0)
    config.loss.reconstruction = "l2"
    config.loss.reconstruction_weight = 4.0
    config.loss.bottleneck.commitment = 0.25

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001")
    config.data.streams["image"] = base.stream(batch_size=128, resolutions=((128, 128),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # seconds, on the embedded photographs
        config.steps = 4
        config.model.update({"channels": 16, "block_channels": 8})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((32, 32),)})
        config.log.every = 1
        config.evaluation.update({"every": 2, "max_items": 4})
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/vqvae_imagenet.py. Accepted: smoke.")
    return config
