"""VQGAN (https://arxiv.org/abs/2012.09841) on ImageNet at 256x256: 16x16 tokens out of 16,384.

    python train.py --config=configs/vqgan_imagenet_f16_16384.py --config.data.path=data/imagenet/train

As configs/vqgan_imagenet_f16_1024.py with more codes. One GPU with 40 GB; the released weights have an rFID of 4.98 on
the validation set. LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import vqgan_imagenet_f16_1024


def get_config(arg=None):
    config = vqgan_imagenet_f16_1024.get_config(arg)
    config.model.name = "vqgan-imagenet-f16-16384"
    return config
