"""VidTok v1.1 (https://arxiv.org/abs/2412.13061), for long videos, FSQ: 32,768 codes for 4x8x8 pixels.

    python train.py --config=configs/vidtok_fsq_causal_488_v1_1.py --workdir=runs/1
    python train.py --config=configs/vidtok_fsq_causal_488_v1_1.py:stage2 --workdir=runs/2 --config.init_from=runs/1

v1.1 goes on from the weights of v1.0 with longer clips: give them to the first command as well,
--config.init_from=vidtok_fsq_causal_488_32768.ckpt (the authors' file) or a run of
configs/vidtok_fsq_causal_488_32768.py. Their config has 33 frames, one clip for each GPU, and the losses of v1.0. How
long it ran and on what is not published; steps, batch and the second stage here are those of v1.0. Released weights on
MCL-JCV, whole videos at 256x256: PSNR 29.39, SSIM .856, LPIPS .114, FVD 168.5. Other sizes of the family:
--config.model.name=vidtok-fsq-causal-888-32768-v1.1, and so on. LPIPS needs its weight files
(docs/convert_weights.md).
"""

from configs import vidtok_fsq_causal_488_32768


def get_config(arg=None):
    config = vidtok_fsq_causal_488_32768.get_config(arg)
    config.model.name = "vidtok-fsq-causal-488-32768-v1.1"
    if arg != "smoke":
        config.data.streams.video.frames = 33
    return config
