"""ViTok (https://arxiv.org/abs/2501.09755) of images, first of two stages: 256x256 pixels as 16x16x16 floats.

    python train.py --config=configs/vitok_image.py --config.data.path=<folder of images>
    python train.py --config=configs/vitok_image.py:b_l --config.data.path=<folder of images>

Batch 1024, 100,000 steps: 6 to 12 hours on 8 H100 for S-B, the default. ``:s_l``, ``:b_l`` and ``:l_l`` have other
encoders and decoders: a larger decoder helps (rFID of this stage 1.6 for B, 1.3 for L), a larger encoder does not.

What decides is E, the number of floats of an image's code: tokens x channels, here 4096. Set it by
``--config.model.latent_channels=32`` (8192: rFID 0.8) or ``--config.model.patch=(1,8,8)``; whatever the patch, log E
and log rFID are on one line. Generators prefer few channels: 16 with patches of 16, 4 with patches of 8.

After both stages S-B has an rFID of 0.50 and a PSNR of 24.36 on ImageNet, S-L 0.46 and 24.74; theirs have seen 450
million images besides. The loss is the paper's, L2 + LPIPS + KL (in the authors' code a smooth L1, weight 0.1, stands
in the place of L2). LPIPS needs a weight file.
"""

from configs import base

SIZES = {"s_b": "vitok-s-b-16", "s_l": "vitok-s-l-16", "b_l": "vitok-b-l-16", "l_l": "vitok-l-l-16"}


def get_config(arg=None):
    config = base.get_base()
    config.steps = 100_000
    config.ema_decay = 0.9999
    config.model.name = SIZES.get(arg, SIZES["s_b"])
    config.model.latent_channels = 16
    config.model.remat = "dots"

    config.optimizer = base.optimizer(
        name="adamw", lr=4e-4, schedule="cosine", warmup=2500, b1=0.9, b2=0.95, weight_decay=1e-4, clip=1.0
    )
    config.loss.reconstruction = "l2"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.bottleneck.kl = 1e-3 / 4096  # theirs is a mean over the values of a code, ours their sum

    config.data = base.data(source="images", path="data/images", held_out="0.001", resample="bicubic")
    config.data.streams["image"] = base.stream(batch_size=1024, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 5000
    if arg == "smoke":  # seconds, on the embedded photographs
        config.steps = 60
        config.ema_decay = 0.9
        config.model.update({"encoder": (48, 1, 2), "decoder": (48, 2, 2), "patch": (1, 8, 8), "latent_channels": 16})
        config.optimizer.update({"lr": 2e-3, "warmup": 5})
        config.loss.perceptual = None
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 16, "resolutions": ((32, 32),)})
        config.log.every = 10
        config.evaluation.update({"every": 20, "max_items": 8})
        config.checkpoint.every = 60
    elif arg is not None and arg not in SIZES:
        raise ValueError(
            f"unknown argument {arg!r} of configs/vitok_image.py. Accepted: {', '.join([*SIZES, 'smoke'])}."
        )
    return config
