"""VQGAN (https://arxiv.org/abs/2012.09841) on scenes at 256x256: 16x16 tokens out of 1,024.

    python train.py --config=configs/vqgan_scenes_f16_1024.py --config.data.path=data/coco/train2017
    python train.py --config=configs/vqgan_scenes_f16_1024.py:ade20k --config.data.path=data/ade20k/training
    python train.py --config=configs/vqgan_scenes_f16_1024.py:landscapes --config.data.path=data/sflckr

Photographs of COCO-Stuff (no argument), of ADE20K, or of landscapes (the authors' S-FLCKR), with the architecture and
the losses of VQGAN on ImageNet. The authors have not published the training configs of these first stages: batch and
learning rate are those of ImageNet, steps follow the number of pictures (118,000, 20,000 and 100,000), and the
discriminator starts after half of them. One GPU with 40 GB. LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import vqgan_imagenet_f16_1024

# folder, steps
SCENES = {
    None: ("data/coco/train2017", 250_000),
    "ade20k": ("data/ade20k/training", 50_000),
    "landscapes": ("data/sflckr", 250_000),
}


def get_config(arg=None):
    if arg == "smoke":
        return vqgan_imagenet_f16_1024.get_config("smoke")
    if arg not in SCENES:
        raise ValueError(f"unknown argument {arg!r} of this config. Accepted: ade20k, landscapes, smoke.")
    config = vqgan_imagenet_f16_1024.get_config()
    config.data.path, config.steps = SCENES[arg]
    config.data.held_out = "0.01"
    config.discriminator.start = config.discriminator.generator_start = config.steps // 2
    return config
