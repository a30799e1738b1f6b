"""OmniTokenizer (https://arxiv.org/abs/2406.09399), stage 1: images at 256x256 as 32x32 tokens out of 8,192.

    python train.py --config=configs/omnitokenizer_stage1.py --config.data.path=<ImageNet's train split>

The authors' scripts/recons/train.sh: 8 images on each of 32 GPUs, 500,000 steps; the paper says two weeks on 8 A100 for
each stage. Released weights of images alone have an rFID of 1.28 on ImageNet. Next: omnitokenizer_stage2.py.
Their pixels span half of ours: their weight 4 of L1 is 2 here, and their LPIPS sees half the contrast, here all of it.
LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 500_000
    config.ema_decay = 0.0  # the authors average no weights
    config.ema_warmup = False
    config.model.name = "omnitokenizer-celebahq"  # the network of all releases for images but the first
    config.model.layout = "grid"  # causal, as the paper says; released weights need "scrambled"
    config.model.remat = True

    config.optimizer = base.optimizer(lr=1e-3, schedule="cosine_all", warmup=50_000, end=0.05, b1=0.5, b2=0.9)
    config.loss.reconstruction = "l1"
    config.loss.reconstruction_weight = 2.0
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 4.0
    config.loss.bottleneck.commitment = 0.25

    base.undamped(config.discriminator)
    config.discriminator.name = "tats_2d"
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.factor = 0.01
    config.discriminator.weight = 1.0
    config.discriminator.adaptive = False
    config.discriminator.feature_matching_weight = 400.0  # 4, which the factor does not touch
    config.discriminator.fresh_forward = True
    config.discriminator.optimizer = base.optimizer(
        lr=1e-4, schedule="cosine_all", warmup=500_000, end=0.05, b1=0.5, b2=0.9
    )

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001", resample="bicubic")
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # two minutes, on the embedded photographs and without the weights of LPIPS
        config.steps = 300
        config.loss.perceptual = None
        config.model.bottleneck = {"name": "vq", "codebook_size": 64, "code_dim": 8}
        config.loss.bottleneck.codebook = 1.0
        config.model.update({"patch": (2, 4, 4), "width": 64, "encoder_blocks": "tw", "decoder_blocks": "t"})
        config.model.update({"temporal_depth": 1, "heads": 2, "head_dim": 32, "window": 4, "remat": False})
        config.optimizer.warmup = config.discriminator.optimizer.warmup = 4
        config.discriminator.update({"channels": 8, "layers": 2})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1", "zoom": (1.0, 4.0)})
        config.data.streams.image.update({"batch_size": 16, "resolutions": ((32, 32),)})
        config.log.every = 10
        config.evaluation.update({"every": 50, "max_items": 10})
        config.checkpoint.every = 100
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/omnitokenizer_stage1.py. Accepted: smoke.")
    return config
