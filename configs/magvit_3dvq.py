"""MAGVIT's 3D VQ (https://arxiv.org/abs/2212.05199) on UCF-101: 16 frames of 128x128 as 4x16x16 tokens out of 1,024.

    python train.py --config=configs/magvit_3dvq.py --config.data.path=data/ucf101/train

The authors' vqgan3d_ucf101_config.py, size B: 500 epochs of 9,537 clips at batch 128, one epoch of warm-up and a
cosine; squared error, a perceptual loss, a StyleGAN discriminator of clips with a non-saturating loss and R1. Their
perceptual loss compares the logits of a ResNet, LPIPS stands for it here (its weight files: docs/convert_weights.md);
and they start from an image model that is inflated, this run from scratch. L: --config.model.name=magvit-3dvq-l-1024,
batch 256 and 2,000 epochs. With MAGVIT's transformer the authors report an FVD of 159 (B) and 76 (L), and later
an rFVD of 25; they released no weights.
"""

from configs import base

_EPOCH = 9_537 // 128


def get_config(arg=None):
    config = base.get_base()
    config.steps = 500 * _EPOCH
    config.ema_decay = 0.999
    config.ema_warmup = False
    config.model.name = "magvit-3dvq-b-1024"

    adam = {"lr": 1e-4, "b1": 0.0, "b2": 0.99, "clip": 0.0, "schedule": "cosine", "warmup": _EPOCH}
    config.optimizer = base.optimizer(**adam)
    config.loss.reconstruction = "l2"
    config.loss.reconstruction_weight = 0.25  # theirs is of pixels in [0, 1]
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 0.1
    config.loss.bottleneck.commitment = 0.25
    config.loss.bottleneck.codebook = 1.0
    config.loss.bottleneck.entropy_sample = 0.1
    config.loss.bottleneck.entropy_codebook = -0.1

    base.undamped(config.discriminator)
    config.discriminator.name = "stylegan_3d"
    config.discriminator.channels = 64
    config.discriminator.layers = 5
    config.discriminator.norm = "none"
    config.discriminator.generator_loss = config.discriminator.discriminator_loss = "non_saturating"
    config.discriminator.weight = 0.1
    config.discriminator.adaptive = False
    config.discriminator.r1_weight = 40.0  # 10 for pixels in [0, 1], whose gradients are twice as large
    config.discriminator.r1_every = 1
    config.discriminator.optimizer = base.optimizer(**adam)

    config.data = base.data(source="videos", path="data/ucf101/train", held_out="0.01")
    config.data.streams["video"] = base.stream(frames=16, batch_size=128, resolutions=((128, 128),))
    config.evaluation.every = config.checkpoint.every = 2_000
    if arg == "smoke":  # two minutes, on embedded photographs that a virtual camera moves, without the weights of LPIPS
        config.steps = 204
        config.ema_decay = 0.97
        config.model.bottleneck = {"name": "vq", "codebook_size": 64, "code_dim": 8, "entropy": "smoothed"}
        config.model.update({"latent_channels": 8, "widths": (32, 32), "time_levels": (0,)})
        config.model.update({"encoder_blocks": 1, "decoder_blocks": 1})
        config.optimizer = base.optimizer(lr=2e-3, schedule="cosine", end=0.1, warmup=10)
        config.loss.perceptual = None
        config.loss.reconstruction_weight = 4.0  # at the recipe's weight the codebook's losses outweigh pixels
        config.discriminator.update({"channels": 4, "layers": 2, "start": 200, "generator_start": 202, "weight": 0.02})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1", "virtual_camera": True})
        # With one channel per group norms hide the mean, but for borders, of which small pictures have more.
        config.data.streams.video.update({"frames": 4, "batch_size": 8, "resolutions": ((16, 16),)})
        config.log.every = 10
        config.evaluation.update({"every": 40, "max_items": 10})
        config.checkpoint.every = 100
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of this config. Accepted: smoke.")
    return config
