"""LightningDiT-XL (https://arxiv.org/abs/2501.01423) on latents: the published generator of VA-VAE and VTP.

    python train.py --config=configs/generation_lightningdit_xl.py --config.data.path=<folder of latents>
    python train.py --config=configs/generation_lightningdit_xl.py:vtp-l --config.data.path=<folder of latents>

675 M parameters, 80 epochs of ImageNet at batch 1024 (VA-VAE's run of 800 epochs: --config.steps=1000000
--config.flow.uniform_from=600000), 1e20 operations without those of remat: nine hours of eight H100s at 40 % of their
peak (reckoned, not measured). Published FIDs of 50,000 samples, Euler with 250 points: VA-VAE
f16d32 after 64 epochs 5.14, with guidance 2.11; after 800 epochs 2.17 and 1.35. VTP, without guidance, after 80: 5.46
(small), 3.88 (base), 2.81 (large). Should a long run end in NaN, its authors advise --config.model.qk_norm=True or
--config.optimizer.clip=1. Arguments: ``vtp-s``, ``vtp-b`` and ``vtp-l`` draw times as VTP does, nearer to the
noise.
"""

from configs import base

TIMES = {"vtp-s": (-0.5, 1.25), "vtp-b": (-0.5, 1.25), "vtp-l": (-0.75, 1.0)}


def get_config(arg=None):
    config = base.get_generator()
    config.model.update({"size": (28, 1152, 16), "patch": 1, "remat": "full"})  # depth, width, heads
    config.steps = 100_000
    config.log.every = 100
    config.checkpoint.update({"every": 5_000, "keep_best": 0})
    if arg in TIMES:
        config.flow.time_mean, config.flow.time_std = TIMES[arg]
    elif arg is not None:
        accepted = ", ".join(TIMES)
        raise ValueError(f"unknown argument {arg!r} of configs/generation_lightningdit_xl.py. Accepted: {accepted}.")
    return config
