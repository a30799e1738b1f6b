"""TiTok (https://arxiv.org/abs/2406.07550) in a single stage: 256x256 pixels as 64 tokens out of 8,192.

    python train.py --config=configs/titok_bl64_vq8k.py --config.data.path=<folder of ImageNet's train split>

Batch 256, 1,000,000 steps (200 epochs): about three weeks on 8 A100. The released weights have an rFID of 2.06. The
authors did not publish this file of theirs; by their words it is L2, LPIPS with a tenth of ConvNeXt-S, and MaskBit's
discriminator, with the numbers of TA-TiTok's. LPIPS and ConvNeXt-S need weight files (docs/convert_weights.md).
``b``, ``l`` in the name: a base encoder and a large decoder. Others differ in their name and bottleneck:

    --config.model.name=titok-bl128-vq8k    128 tokens, rFID 1.49
    --config.model.name=titok-sl256-vq8k    a small encoder, 256 tokens, rFID 1.03
    --config=configs/tatitok_bl32_vae.py    continuous tokens
"""

from configs import base


def get_config(arg=None):
    if arg not in (None, "smoke"):
        raise ValueError(f"unknown argument {arg!r} of configs/titok_bl64_vq8k.py. Accepted: smoke.")
    config = base.get_base()
    config.steps = 1_000_000
    config.ema_decay = 0.999
    config.model.name = "titok-bl64-vq8k"
    config.model.remat = True

    adamw = {"name": "adamw", "lr": 1e-4, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4, "clip": 1.0}
    rate = {"schedule": "cosine", "warmup": 10_000, "warmup_from": 0.0, "end": 0.1}
    undecayed = ("encode_tokens/patches/kernel", "decode_tokens/embed/kernel")
    config.optimizer = base.optimizer(**adamw, **rate, undecayed=undecayed)
    config.loss.reconstruction = "l2"
    config.loss.reconstruction_weight = 0.25  # theirs is for pixels in [0, 1]
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.convnext_weight = 0.1
    config.loss.bottleneck.commitment = 0.25
    config.loss.bottleneck.codebook = 1.0

    base.undamped(config.discriminator)
    config.discriminator.name = "maskbit_2d"
    config.discriminator.channels = 128
    config.discriminator.layers = 3
    config.discriminator.norm = "group"
    config.discriminator.start = config.discriminator.generator_start = 200_000
    config.discriminator.adaptive = False
    config.discriminator.weight = 0.1
    config.discriminator.lecam = "means"
    config.discriminator.lecam_weight = 0.001
    config.discriminator.optimizer = base.optimizer(**adamw, **rate)

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001", resample="bicubic")
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # a minute, on the embedded photographs and without weight files
        config.steps = 1000
        config.ema_decay = 0.9
        config.model.bottleneck = {"name": "vq", "codebook_size": 256, "code_dim": 8}
        config.model.update({"latent_channels": 8, "tokens": 32, "input_size": (32, 32), "patch": 8, "remat": False})
        config.model.update({"encoder": (64, 2, 2), "decoder": (64, 2, 2)})
        config.optimizer.update({"lr": 1e-3, "warmup": 50})
        config.loss.reconstruction_weight = 1.0
        config.loss.perceptual = None
        config.loss.convnext_weight = 0.0
        config.discriminator.update({"channels": 32, "layers": 1, "start": 940, "generator_start": 960, "weight": 0.01})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1", "zoom": (1.0, 4.0)})
        config.data.streams.image.update({"batch_size": 16, "resolutions": ((32, 32),)})
        config.log.every = 20
        config.evaluation.update({"every": 200, "max_items": 10, "final_report": False})
        config.checkpoint.every = 0
    return config
