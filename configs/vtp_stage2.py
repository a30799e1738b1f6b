"""VTP's second stage (https://arxiv.org/abs/2512.13687): the pixel decoder, fine-tuned against a discriminator.

    python train.py --config=configs/vtp_stage2.py:large --config.data.path=data/images

The encoder, its latents and all that it understands stay as they are, to the last bit. The start is the run of
configs/vtp_large.py (--config.init_from=<another run, folder or published file>). Which discriminator, weights, and how
long is open in the paper: these are this project's defaults (docs/gan_training.md).

    --config=configs/vtp_stage2.py:large     also: small, base
    --config=configs/vtp_stage2.py:smoke     on drawn shapes, after configs/vtp_large.py:smoke
"""

from configs import base, vtp_base, vtp_large, vtp_small

FIRST_STAGES = {"small": vtp_small, "base": vtp_base, "large": vtp_large, "smoke": vtp_large}


def get_config(arg="large"):
    if arg not in FIRST_STAGES:
        raise ValueError(f"unknown argument {arg!r} of configs/vtp_stage2.py. Accepted: {', '.join(FIRST_STAGES)}.")
    first = FIRST_STAGES[arg].get_config("smoke" if arg == "smoke" else None)
    config = base.get_base()
    config.model.update(first.model)
    config.init_from = "runs/vtp_large_smoke" if arg == "smoke" else f"runs/vtp_{arg}"
    config.steps = 50_000
    config.ema_decay = 0.9999
    frozen = ("model/trunk", "model/feature_bottleneck", "model/text_transformer", "model/visual_proj", "logit_scale")
    config.optimizer = base.optimizer(name="adamw", lr=1e-4, schedule="cosine", warmup=1_000, b2=0.95, frozen=frozen)
    config.loss.reconstruction = first.loss.reconstruction
    config.loss.perceptual = first.loss.perceptual
    config.discriminator.name = "patchgan_2d"
    config.discriminator.start = config.discriminator.generator_start = 2_000
    config.discriminator.optimizer = base.optimizer(name="adamw", lr=1e-4, schedule="cosine", warmup=1_000, b2=0.95)
    config.data = base.data(source="images", path="data/images", held_out="0.001")
    config.data.streams["image"] = base.stream(batch_size=512, resolutions=((256, 256),))
    config.mesh.update({"data": -1, "fsdp": 8})
    config.evaluation.every = config.checkpoint.every = 2_000
    if arg == "smoke":
        config.steps = 4
        config.discriminator.update({"channels": 8, "layers": 2, "start": 1, "generator_start": 2})
        config.optimizer.warmup = config.discriminator.optimizer.warmup = 1
        config.data = first.data
        config.mesh.update({"data": -1, "fsdp": 1})
        config.log.every = 1
        config.evaluation.update({"every": 2, "max_items": 4})
        config.checkpoint.every = 2
    return config
