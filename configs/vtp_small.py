"""VTP-S (https://arxiv.org/abs/2512.13687), the recipe of configs/vtp_large.py with a smaller ViT.

    python train.py --config=configs/vtp_small.py --config.data.path=data/pairs

Expected of the authors' weights: rFID 0.98 and 66.7% zero-shot accuracy on ImageNet.
The same batches and steps, on 16 devices (v5p, H100).

    --config=configs/vtp_small.py:smoke     seconds on a CPU, on drawn shapes with captions, without LPIPS
"""

from configs import vtp_large


def get_config(arg=None):
    if arg not in (None, "smoke"):
        raise ValueError(f"unknown argument {arg!r} of configs/vtp_small.py. Accepted: smoke.")
    config = vtp_large.get_config(arg)
    config.model.name = "vtp-small-f16d64"
    if arg is None:
        config.mesh.update({"data": 16, "fsdp": 1})
    return config
