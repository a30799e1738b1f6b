"""Open-MAGVIT2 (https://arxiv.org/abs/2409.04410) on ImageNet at 128x128: 16x16 tokens of 18 bits, 8x8 pixels each.

    python train.py --config=configs/open_magvit2_imagenet_128.py --config.data.path=data/imagenet/train

The authors' imagenet_lfqgan_128_L.yaml: 350 epochs at batch 256 (32 accelerators with 8 images each), the rate falling
tenfold after epochs 250 and 300, the discriminator from the start. Released weights (averages) on ImageNet's validation
set: rFID 1.18, PSNR 25.08 at 128x128, and .34, 26.19 at 256x256. The video model starts from this one
(configs/open_magvit2_video_128.py). LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import open_magvit2_imagenet_256

_EPOCH = 1_281_167 // 256


def get_config(arg=None):
    if arg not in (None, "smoke"):
        raise ValueError(f"unknown argument {arg!r} of this config. Accepted: smoke.")
    config = open_magvit2_imagenet_256.get_config(arg)
    config.model.name = "open-magvit2-imagenet-128-262144"
    config.discriminator.lecam_weight = 0.01
    if arg == "smoke":
        config.model.bottleneck.bits = config.model.latent_channels = 8
        config.model.multipliers = (1, 2)
        return config
    config.steps = 350 * _EPOCH
    for optimizer in (config.optimizer, config.discriminator.optimizer):
        optimizer.drops = (250 * _EPOCH, 300 * _EPOCH)
    config.data.streams.image.resolutions = ((128, 128),)
    return config
