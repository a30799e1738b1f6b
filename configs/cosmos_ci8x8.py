"""Cosmos CI8x8 (https://arxiv.org/abs/2501.03575): 16 channels for 8x8 pixels of a picture.

    python train.py --config=configs/cosmos_ci8x8.py --config.data.path=<pictures> --config.init_from=autoencoder.jit

The published post-training recipe (nvidia-cosmos/cosmos-predict1, tokenizer training, experiment video_basic): L1 and
0.1 of the L1 distance of VGG16 features, no discriminator, AdamW with weight decay on everything. The published
experiments are of videos; batch and number of steps here are ours. One GPU with 80 GB. The figure of the release shows
about 33.1 dB on COCO and ImageNet. VGG16 needs its weight file (docs/convert_weights.md).
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 100_000
    config.ema_decay = 0.9999
    config.ema_warmup = False
    config.model.name = "cosmos-ci8x8"
    config.optimizer = base.optimizer(
        name="adamw", lr=1e-4, warmup=4_999, b1=0.5, b2=0.999, eps=1e-8, weight_decay=0.01, decay="all", clip=1.0
    )
    config.loss.reconstruction = "l1"
    config.loss.content_weight = 0.1  # the authors call it lpips
    config.data = base.data(source="images", path="data/images/train", held_out="0.01")
    # Square, 4:3 and 16:9, lying and standing.
    sizes = ((256, 256), (192, 256), (256, 192), (144, 256), (256, 144))
    config.data.streams["image"] = base.stream(batch_size=64, resolutions=sizes)
    config.log.every = 100
    config.evaluation.every = config.checkpoint.every = 5_000
    if arg == "smoke":  # seconds, on the embedded photographs and without the weights of VGG16
        config.steps = 4
        config.loss.content_weight = 0.0
        config.optimizer.warmup = 2
        config.model.update({"channels": 8, "blocks": 1, "z_channels": 8, "num_groups": 4})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1"})
        config.data.streams.image.update({"batch_size": 8, "resolutions": ((32, 32),)})
        config.log.every = 1
        config.evaluation.update({"every": 2, "max_items": 4})
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/cosmos_ci8x8.py. Accepted: smoke.")
    return config
