"""C-ViViT, the tokenizer of Phenaki (https://arxiv.org/abs/2210.02399): 11 frames of 128x128 as 1,536 tokens of 8,192.

    python train.py --config=configs/cvivit.py --config.data.path=<videos>

Nobody published the recipe, weights or a cost. Losses, optimizer and weights are those of lucidrains/phenaki-pytorch,
written for one GPU; batch 64 and 500,000 steps are a guess. The paper has VQ in the place of LFQ; that code has LFQ.
Its pixels are in [0, 1]: its L2 is a quarter of ours, and gradients by its pixels are twice as large. VGG16's last
hidden layer and a small discriminator see one frame of each clip; the adversarial loss is as strong as VGG16's at the
last layer. That code takes another batch for the discriminator, and its optimizer also trains VGG16, here frozen.
VGG16 needs its weight file (docs/convert_weights.md).
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 500_000
    config.ema_decay = 0.9999
    config.model.name = "cvivit-phenaki"
    config.model.remat = True

    config.optimizer = base.optimizer(lr=3e-4, b1=0.9, b2=0.99, clip=0.5)
    config.loss.reconstruction = "l2"
    config.loss.reconstruction_weight = 0.25
    config.loss.vgg_hidden_weight = 1.0
    config.loss.frames = "one"
    config.loss.bottleneck.commitment = 0.0
    config.loss.bottleneck.entropy_sample = 0.1
    config.loss.bottleneck.entropy_codebook = -0.1

    base.undamped(config.discriminator)
    config.discriminator.name = "phenaki_2d"
    config.discriminator.channels = 16
    config.discriminator.layers = 0
    config.discriminator.norm = "none"
    config.discriminator.frames = "one"
    config.discriminator.factor = 2.0  # the hinge loss of that code has no 1/2
    config.discriminator.weight = 0.5  # so that both make 1 in the generator's loss
    config.discriminator.against = "perceptual"
    config.discriminator.fresh_forward = True
    config.discriminator.r1_every = 1
    config.discriminator.r1_weight = 40.0  # 10 (|gradient| - 1)^2 for pixels in [0, 1]
    config.discriminator.r1_norm = 0.5
    config.discriminator.optimizer = base.optimizer(lr=3e-4, b1=0.9, b2=0.99, clip=0.0)

    config.data = base.data(source="videos", path="data/videos/train", held_out="0.01")
    config.data.streams["video"] = base.stream(frames=11, batch_size=64, resolutions=((128, 128),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":  # two minutes, on embedded photographs that a virtual camera moves, without VGG16's weights
        config.steps = 204
        config.loss.vgg_hidden_weight = 0.0
        config.loss.reconstruction_weight = 1.0  # entropies of the paper's weight outweigh pixels in so few steps
        config.loss.bottleneck.update({"entropy_sample": 0.01, "entropy_codebook": -0.01})
        bits = {"name": "lfq", "bits": 10, "bit_order": "big", "entropy": "clamped"}
        config.model.update({"bottleneck": bits, "latent_channels": 10, "patch": (2, 4, 4), "width": 64})
        config.model.update({"spatial_depth": 1, "temporal_depth": 1, "heads": 2, "head_dim": 32, "remat": False})
        config.optimizer.update({"lr": 2e-3, "warmup": 4})
        config.discriminator.update({"channels": 4, "start": 200, "generator_start": 202, "against": "reconstruction"})
        config.discriminator.weight = 0.05
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1", "virtual_camera": True})
        config.data.streams.video.update({"frames": 5, "batch_size": 8, "resolutions": ((32, 32),)})
        config.ema_decay = 0.9
        config.log.every = 10
        config.evaluation.update({"every": 40, "max_items": 10})
        config.checkpoint.every = 100
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/cvivit.py. Accepted: smoke.")
    return config
