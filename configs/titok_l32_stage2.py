"""TiTok-L-32 (https://arxiv.org/abs/2406.07550), second of two stages: from guessed tokens to pixels.

    python train.py --config=configs/titok_l32_stage2.py --config.data.path=<folder of ImageNet's train split> \\
        --config.init_from=<run of configs/titok_l32_stage1.py>

Encoder and codebook stay as they are, to the last bit; the decoder learns together with that of MaskGIT's VQGAN, whose
weights the run of the first stage holds: pixels, a tenth of ConvNeXt-S, and a discriminator from step 20,000 on.
ConvNeXt-S needs its weight file (docs/convert_weights.md).

The authors' titok_l32.yaml: batch 256 on 8 A100 with 32 images each, 500,000 steps. The released weights have an rFID
of 2.21 on ImageNet's validation set. The other two of the first releases differ in their name alone:

    --config=configs/titok_l32_stage2.py:b64     rFID 1.70
    --config=configs/titok_l32_stage2.py:s128    rFID 1.71

``smoke`` runs in minutes on a CPU, on drawn shapes and without weight files, with ``--config.init_from`` of
the other stage's smoke or from random weights.
"""

from configs import base, titok_l32_stage1

ARGUMENTS = titok_l32_stage1.ARGUMENTS


def get_config(arg=None):
    if arg not in (None, *ARGUMENTS):
        raise ValueError(f"unknown argument {arg!r} of configs/titok_l32_stage2.py. Accepted: {', '.join(ARGUMENTS)}.")
    config = base.get_base()
    config.steps = 500_000
    config.ema_decay = 0.999
    config.model.name = {"b64": "titok-b64", "s128": "titok-s128"}.get(arg, "titok-l32")
    config.model.bottleneck = {"name": "vq", "codebook_size": 4096, "code_dim": 12, "distance": "cosine"}
    config.model.remat = True

    adamw = {"name": "adamw", "lr": 1e-4, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4, "clip": 1.0}
    rate = {"schedule": "cosine", "warmup": 5_000, "warmup_from": 0.0, "end": 0.1}
    config.optimizer = base.optimizer(
        **adamw, **rate, undecayed=("decode_tokens/embed/kernel",), frozen=("model/encode_tokens/", "model/bottleneck/")
    )
    config.loss.reconstruction = "l2"
    config.loss.reconstruction_weight = 0.25  # theirs is for pixels in [0, 1]
    config.loss.convnext_weight = 0.1
    config.loss.bottleneck.commitment = 0.0
    config.loss.bottleneck.codebook = 0.0

    base.undamped(config.discriminator)
    config.discriminator.name = "maskbit_2d"
    config.discriminator.channels = 128
    config.discriminator.layers = 3
    config.discriminator.norm = "group"
    config.discriminator.start = config.discriminator.generator_start = 20_000
    config.discriminator.adaptive = False
    config.discriminator.weight = 0.01
    config.discriminator.lecam = "means"
    config.discriminator.lecam_weight = 0.001
    config.discriminator.optimizer = base.optimizer(**adamw, **rate)

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001", resample="bicubic")
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":
        config.steps = 600
        titok_l32_stage1.smoke(config)
        config.loss.convnext_weight = 0.0
        config.loss.reconstruction_weight = 1.0
        config.discriminator.update({"channels": 32, "layers": 1, "start": 540, "generator_start": 560})
    return config
