"""kl-f32 of latent diffusion (https://arxiv.org/abs/2112.10752) on OpenImages: 8x8 latents of 64 channels.

    python train.py --config=configs/kl_f32.py --config.data.path=data/openimages/train

The authors' steps: batch 12 in two halves per GPU and a learning rate of 4.5e-6 per picture, here for one GPU
with 40 GB. The discriminator starts at step 50,001. The released weights have an rFID of 2.04 and a PSNR of
22.27. LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import kl_f8


def get_config(arg=None):
    config = kl_f8.get_config(arg)
    config.model.name = "kl-f32"
    if arg == "smoke":
        config.model.latent_channels = 8
    else:
        config.steps = 406_763
    return config
