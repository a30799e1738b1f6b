"""VTP-B (https://arxiv.org/abs/2512.13687), the recipe of configs/vtp_large.py with a smaller ViT.

    python train.py --config=configs/vtp_base.py --config.data.path=data/pairs

Expected of the authors' weights: rFID 0.74 and 73.2% zero-shot accuracy on ImageNet.
The same batches and steps, on 32 devices (v5p, H100).

    --config=configs/vtp_base.py:smoke     seconds on a CPU, on drawn shapes with captions, without LPIPS
"""

from configs import vtp_large


def get_config(arg=None):
    if arg not in (None, "smoke"):
        raise ValueError(f"unknown argument {arg!r} of configs/vtp_base.py. Accepted: smoke.")
    config = vtp_large.get_config(arg)
    config.model.name = "vtp-base-f16d64"
    if arg is None:
        config.mesh.update({"data": 8, "fsdp": 4})
    return config
