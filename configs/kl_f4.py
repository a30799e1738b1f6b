"""kl-f4 of latent diffusion (https://arxiv.org/abs/2112.10752) on OpenImages: 64x64 latents of 3 channels.

    python train.py --config=configs/kl_f4.py --config.data.path=data/openimages/train

The authors' steps: batch 12 in two halves per GPU and a learning rate of 4.5e-6 per picture, here for one GPU
with 40 GB. The discriminator starts at step 50,001. The released weights have an rFID of 0.27 and a PSNR of
27.53. LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import kl_f8


def get_config(arg=None):
    config = kl_f8.get_config(arg)
    config.model.name = "kl-f4"
    if arg == "smoke":
        config.model.latent_channels = 3
    else:
        config.steps = 176_991
    return config
