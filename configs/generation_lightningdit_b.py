"""LightningDiT-B (https://arxiv.org/abs/2501.01423) on latents: the probe of VTP's scaling study.

    python train.py --config=configs/generation_lightningdit_b.py --config.data.path=<folder of latents>

The folder comes from `configs/generation_blackbox.py`, which does everything: latents, this training, samples, FID. 80
epochs of ImageNet at batch 1024, 130 M parameters and 256 tokens are 2e19 operations: six hours of eight A100s at 40 %
of their peak (reckoned, not measured). VTP (https://arxiv.org/abs/2512.13687) reports an FID of 10,000 samples between
59 (a plain autoencoder) and 24 (VTP-L with a larger decoder), without guidance.
"""

from configs import base


def get_config(arg=None):
    if arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/generation_lightningdit_b.py; it takes none.")
    config = base.get_generator()
    config.model.update({"size": (12, 768, 12), "patch": 1})  # depth, width, heads
    config.steps = 100_000
    config.log.every = 100
    config.checkpoint.update({"every": 5_000, "keep_best": 0})
    return config
