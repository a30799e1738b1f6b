"""DALL-E's discrete VAE (https://arxiv.org/abs/2102.12092, appendix A.2) at 256x256: 32x32 tokens out of 8192.

    python train.py --config=configs/dvae_dalle.py --config.data.path=<folder of pictures>

The paper: 64 V100, batch 512, 3,000,000 updates on 250 million pictures with float16. The learning rate falls over the
first 1,200,000 of them, which are the steps here; go on from there with --config.init_from and its last rate, 1.25e-6.
The released weights have an rFID of 32.01 on ImageNet's validation set at 256x256 (taming-transformers' table).

Loss per pixel value: the logit-Laplace likelihood and beta / 192 times the KL of a position (64 pixels of 3 values).
beta grows to 6.6 in 5,000 steps, the temperature of the relaxed samples falls to 1/16 in 150,000.
"""

from configs import base

VALUES_PER_TOKEN = 8 * 8 * 3


def get_config(arg=None):
    config = base.get_base()
    config.steps = 1_200_000
    config.ema_decay = 0.999
    config.ema_warmup = False
    config.model.name = "dvae-dalle-f8-8192"

    config.optimizer = base.optimizer(
        name="adamw", lr=1e-4, schedule="cosine", end=0.0125, weight_decay=1e-4, b1=0.9, b2=0.999, clip=0.0
    )
    config.loss.reconstruction = "l1"
    config.loss.reconstruction_weight = 0.0  # watched only: the likelihood is the loss
    config.loss.bottleneck.nll = 1.0
    config.loss.bottleneck.kl = 6.6 / VALUES_PER_TOKEN
    config.schedules.loss.kl = base.schedule(start=0.0, end=6.6 / VALUES_PER_TOKEN, steps=5_000)
    config.schedules.model.temperature = base.schedule(start=1.0, end=1 / 16, steps=150_000)

    config.data = base.data(source="images", path="data/pictures", held_out="0.001")
    config.data.streams["image"] = base.stream(batch_size=512, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # seconds, on the embedded photographs
        config.steps = 4
        config.model.bottleneck = {
            "name": "gumbel",
            "codebook_size": 64,
            "code_dim": None,
            "project": False,
            "hard": False,
        }
        config.model.update({"latent_channels": 64, "hidden": 8, "blocks": 1, "embed": 16})
        config.schedules.loss.kl.steps = config.schedules.model.temperature.steps = 4
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((32, 32),)})
        config.log.every = 1
        config.evaluation.update({"every": 2, "max_items": 4})
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/dvae_dalle.py. Accepted: smoke.")
    return config
