"""VidTok (https://arxiv.org/abs/2412.13061), causal, FSQ: 32,768 codes for 4x8x8 pixels.

    python train.py --config=configs/vidtok_fsq_causal_488_32768.py --workdir=runs/1
    python train.py --config=configs/vidtok_fsq_causal_488_32768.py:stage2 --workdir=runs/2 --config.init_from=runs/1

The published recipe: the whole model at 128x128 for 50,000 steps of 16 clips, then, with the encoder frozen, the
decoder at 256x256 for 30,000 steps of 8. Clips have three frames a second, which the authors found to help with motion.
They trained on A100 and MI300X GPUs, two clips each, and give 1,536 GPU hours for both stages where 256x256 throughout
takes 3,072; their videos are not published.
Released weights on MCL-JCV at 256x256 and 30 frames a second: PSNR 29.16, SSIM .854,
LPIPS .117, FVD 196.9. Other sizes of the family: --config.model.name=vidtok-fsq-causal-488-262144, and so on.
LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 50_000
    config.ema_decay = 0.0  # the authors average no weights
    config.ema_warmup = False
    config.model.name = "vidtok-fsq-causal-488-32768"

    config.optimizer = base.optimizer(lr=1e-5, clip=20.0)
    config.loss.reconstruction = "l1"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.reduction = "logvar"
    config.loss.bottleneck.commitment = 0.25
    config.loss.bottleneck.entropy_sample = 0.1  # one code for each position ...
    config.loss.bottleneck.entropy_codebook = -0.1  # ... and all codes in use: three times that at the start
    config.schedules.loss.entropy_sample = base.schedule(kind="linear", start=0.3, end=0.1, steps=2_000)
    config.schedules.loss.entropy_codebook = base.schedule(kind="linear", start=-0.3, end=-0.1, steps=2_000)

    base.undamped(config.discriminator)
    config.discriminator.name = "patchgan_2d"
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.norm = "batch"
    config.discriminator.generator_loss = "non_saturating_item"
    config.discriminator.discriminator_loss = "hinge"
    # The authors count each optimizer's steps: their 20,001 is the discriminator's turn of step 10,000.
    config.discriminator.start = 10_000
    config.discriminator.generator_start = 10_001
    config.discriminator.weight = 0.2
    config.discriminator.adaptive = True
    config.discriminator.lecam_weight = 0.005
    config.discriminator.optimizer = base.optimizer(lr=1e-5, clip=20.0)

    config.data = base.data(source="videos", path="data/videos/train", held_out="0.01")
    config.data.update({"crop": "center", "flip": False, "resample": "bilinear"})
    config.data.streams["video"] = base.stream(frames=17, batch_size=16, resolutions=((128, 128),), fps=3.0)
    config.data.streams.video.sampling = "spread"
    config.evaluation.every = 2_000
    config.checkpoint.every = 2_500
    if arg == "stage2":  # the decoder alone, on larger frames
        config.steps = 30_000
        config.optimizer.frozen = (r"^model/encoder/",)
        config.data.streams.video.update({"batch_size": 8, "resolutions": ((256, 256),)})
    elif arg == "smoke":  # seconds, on embedded photographs that a virtual camera moves, without the weights of LPIPS
        config.steps = 4
        config.loss.perceptual = None
        config.model.update({"channels": 8, "multipliers": (1, 1, 1), "blocks": 1, "space_down": (0, 1)})
        config.model.update({"space_up": (1, 2), "time_down": (0, 1), "time_up": (1, 2)})
        config.discriminator.update({"channels": 8, "layers": 2, "start": 1, "generator_start": 2})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1", "virtual_camera": True})
        config.data.streams.video.update({"frames": 5, "batch_size": 8, "resolutions": ((32, 32),), "fps": 0.0})
        config.log.every = 1
        config.evaluation.update({"every": 2, "max_items": 4})
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of this config. Accepted: smoke, stage2.")
    return config
