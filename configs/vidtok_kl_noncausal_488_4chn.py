"""VidTok (https://arxiv.org/abs/2412.13061), not causal, KL: 4 channels for 4x8x8 pixels.

    python train.py --config=configs/vidtok_kl_noncausal_488_4chn.py --workdir=runs/1
    python train.py --config=configs/vidtok_kl_noncausal_488_4chn.py:stage2 --workdir=runs/2 --config.init_from=runs/1

The published recipe: the whole model at 128x128 for 50,000 steps of 16 clips, then, with the encoder frozen, the
decoder at 256x256 for 30,000 steps of 8. Clips have three frames a second, which the authors found to help with motion.
They trained on A100 and MI300X GPUs, two clips each, and give 1,536 GPU hours for both stages where 256x256 throughout
takes 3,072; their videos are not published.
Released weights on MCL-JCV at 256x256 and 30 frames a second: PSNR 30.60, SSIM .876,
LPIPS .098, FVD 157.9. Other sizes of the family: --config.model.name=vidtok-kl-noncausal-41616-4chn, and so on.
LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import vidtok_kl_causal_488_4chn


def get_config(arg=None):
    config = vidtok_kl_causal_488_4chn.get_config(arg)
    config.model.name = "vidtok-kl-noncausal-488-4chn"
    config.data.streams.video.frames = 4 if arg == "smoke" else 16
    return config
