"""OmniTokenizer (https://arxiv.org/abs/2406.09399), stages 2 and 3: images and video in turn, at four sizes.

    python train.py --config=configs/omnitokenizer_stage2.py --workdir=runs/2 --config.init_from=runs/1_inflated
    python train.py --config=configs/omnitokenizer_stage2.py:vae --workdir=runs/3 --config.init_from=runs/2_vae

Images are frames of the videos unless --config.data.streams.image.source=images and ...image.path name others.
A stage starts from the one before through `next_stage` of tokenizers/models/omnitokenizer.py:

    import dataclasses, tokenizers
    from tokenizers.models import omnitokenizer
    before = tokenizers.load("runs/1")
    after = tokenizers.create("omnitokenizer-imagenet-k600", layout="grid")
    params = omnitokenizer.next_stage(before.params, after.params)
    dataclasses.replace(after, variables={**before.variables, "params": params}).save("runs/1_inflated")

The authors' scripts/recons/train.sh: 4 clips or 8 images on each of 32 GPUs in turn, 500,000 batches, 17 frames; the
paper says two weeks on 8 A100. Released weights: rFID 1.23, rFVD 25.97 (Kinetics-600); as a VAE 0.78 and 13.02.
Every batch is an update here; the authors add up the gradients of a clip and an image batch, and as they do it their
discriminator hardly trains. Generator and discriminator see a batch at one scale here, at two there.
Their pixels span half of ours: their weight 4 of L1 is 2 here, and their LPIPS sees half the contrast, here all of it.
LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import base

SIZES = ((256, 256),)


def get_config(arg=None):
    config = base.get_base()
    config.steps = 500_000
    config.ema_decay = 0.0  # the authors average no weights
    config.ema_warmup = False
    config.model.name = "omnitokenizer-imagenet-k600-vae" if arg == "vae" else "omnitokenizer-imagenet-k600"
    config.model.layout = "grid"  # causal, as the paper says; released weights need "scrambled"
    config.model.remat = True

    config.optimizer = base.optimizer(lr=5e-5, schedule="cosine_all", warmup=50_000, end=1.0, b1=0.5, b2=0.9)
    config.loss.reconstruction = "l1"
    config.loss.reconstruction_weight = 2.0
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 4.0
    config.loss.frames = "one"
    config.loss.resolutions = (0.5, 0.75, 1.0, 1.25)
    if arg == "vae":
        config.loss.bottleneck.kl = 1e-6
    else:
        config.loss.bottleneck.commitment = 0.25

    base.undamped(config.discriminator)
    config.discriminator.name = "tats_3d"
    config.discriminator.clips_only = True
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.factor = 0.01
    config.discriminator.weight = 1.0
    config.discriminator.adaptive = False
    config.discriminator.feature_matching_weight = 400.0  # 4, which the factor does not touch
    config.discriminator.fresh_forward = True
    config.discriminator.optimizer = base.optimizer(
        lr=5e-6, schedule="cosine_all", warmup=500_000, end=1.0, b1=0.5, b2=0.9
    )

    config.data = base.data(source="videos", path="data/videos/train", held_out="0.001", resample="bicubic")
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=SIZES)
    config.data.streams["video"] = base.stream(frames=17, batch_size=128, resolutions=SIZES)
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # two minutes, on embedded photographs that a virtual camera moves, without the weights of LPIPS
        config.steps = 160
        config.loss.perceptual = None
        config.loss.resolutions = ()
        config.model.bottleneck = {"name": "vq", "codebook_size": 64, "code_dim": 8}
        config.loss.bottleneck.codebook = 1.0
        config.model.update({"patch": (4, 4, 4), "width": 64, "encoder_blocks": "tw", "decoder_blocks": "t"})
        config.model.update({"temporal_depth": 1, "heads": 2, "head_dim": 32, "window": 4, "remat": False})
        config.optimizer.update({"lr": 1e-3, "warmup": 10, "end": 0.05})
        config.discriminator.optimizer.warmup = 10
        config.discriminator.update({"channels": 8, "layers": 2})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1", "virtual_camera": True})
        config.data.zoom = (1.0, 4.0)
        config.data.streams.image.update({"batch_size": 16, "resolutions": ((32, 32),)})
        config.data.streams.video.update({"frames": 5, "batch_size": 8, "resolutions": ((32, 32),)})
        config.log.every = 10
        config.evaluation.update({"every": 40, "max_items": 10})
        config.checkpoint.every = 80
    elif arg not in (None, "vae"):
        raise ValueError(f"unknown argument {arg!r} of configs/omnitokenizer_stage2.py. Accepted: smoke, vae.")
    return config
