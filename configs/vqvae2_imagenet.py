"""VQ-VAE-2 (https://arxiv.org/abs/1906.00446) at 256x256: 32x32 coarse and 64x64 fine tokens, 512 codes each.

    python train.py --config=configs/vqvae2_imagenet.py --config.data.path=<folder of ImageNet's train split>

The recipe of the widely used port (rosinality/vq-vae-2-pytorch): squared error and 0.25 times the commitment of both
levels, Adam 3e-4, batch 128, 560 epochs of FFHQ's 70,000 pictures; 300,000 steps take about two days on 8 GPUs. It
publishes no score. Codes of its averages grow large in the first steps of small batches; the paper's batches are not.
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 300_000
    config.precision = "float32"
    config.model.name = "vqvae2-f4-f8-512"

    config.optimizer = base.optimizer(lr=3e-4, clip=0.0)
    config.loss.reconstruction = "l2"
    config.loss.bottleneck.commitment = 0.25

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001")
    config.data.streams["image"] = base.stream(batch_size=128, resolutions=((256, 256),))
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
        raise ValueError(f"unknown argument {arg!r} of configs/vqvae2_imagenet.py. Accepted: smoke.")
    return config
