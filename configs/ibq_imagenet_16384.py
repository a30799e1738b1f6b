"""IBQ (https://arxiv.org/abs/2412.02692) on ImageNet at 256x256: 16x16 tokens out of 16,384 codes of 256 channels.

    python train.py --config=configs/ibq_imagenet_16384.py --config.data.path=data/imagenet/train

The authors' imagenet_ibqgan_16384.yaml: 330 epochs at batch 256 (64 accelerators with 4 images each), the rate falling
tenfold after epochs 250 and 300; the discriminator takes part from the start, and its turn comes first. Other sizes:
--config.model.name=ibq-imagenet-1024, ibq-imagenet-8192 (280 epochs, one fall after 250), ibq-imagenet-262144.
Released weights (averages) on ImageNet's validation set: rFID 1.37, LPIPS .2235, 96 % of the codes in use.
LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import base

_EPOCH = 1_281_167 // 256


def get_config(arg=None):
    config = base.get_base()
    config.steps = 330 * _EPOCH
    config.ema_decay = 0.999
    config.ema_warmup = False
    config.model.name = "ibq-imagenet-16384"

    adam = {"lr": 1e-4, "b1": 0.5, "b2": 0.9, "clip": 0.0}
    drops = {"schedule": "steps", "drops": (250 * _EPOCH, 300 * _EPOCH)}
    config.optimizer = base.optimizer(**adam, **drops)
    config.loss.reconstruction = "l1"
    config.loss.perceptual = "lpips_vgg"
    config.loss.perceptual_weight = 1.0
    config.loss.bottleneck.index_propagation = 1.0
    config.loss.bottleneck.commitment = 1.0
    config.loss.bottleneck.codebook = 0.25
    config.loss.bottleneck.entropy_sample = 0.05
    config.loss.bottleneck.entropy_codebook = -0.05

    base.undamped(config.discriminator)
    config.discriminator.name = "patchgan_2d"
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.norm = "batch"
    config.discriminator.generator_loss = "non_saturating_item"
    config.discriminator.discriminator_loss = "hinge"
    config.discriminator.adaptive = False
    config.discriminator.weight = 0.1
    config.discriminator.lecam_weight = 0.05
    config.discriminator.leads = True
    config.discriminator.ema_decay = 0.999
    config.discriminator.optimizer = base.optimizer(**adam, **drops)

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001")
    config.data.update({"flip": False, "resample": "bilinear"})
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # a minute, on the embedded photographs and without the weights of LPIPS
        config.steps = 60
        config.ema_decay = 0.9
        config.model.bottleneck = {"name": "ibq", "codebook_size": 256, "code_dim": 16}
        config.model.update({"latent_channels": 16, "z_channels": 16, "widths": (32, 32), "stem": 32, "blocks": 1})
        config.model.attention = ()
        config.optimizer = base.optimizer(lr=1e-3)
        config.loss.perceptual = None
        config.discriminator.update({"channels": 8, "layers": 2})
        config.discriminator.optimizer = base.optimizer(lr=1e-4)
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((32, 32),)})
        config.log.every = 10
        config.evaluation.update({"every": 20, "max_items": 16})
        config.checkpoint.every = 60
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of this config. Accepted: smoke.")
    return config
