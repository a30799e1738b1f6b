"""Cosmos DV8x16x16 (https://arxiv.org/abs/2501.03575): one token of 64,000 for 16x16 pixels of 8 frames.

    python train.py --config=configs/cosmos_dv8x16x16.py --config.data.path=<videos> --config.init_from=autoencoder.jit

The published post-training recipe (nvidia-cosmos/cosmos-predict1, tokenizer training, experiment video_basic): L1 and
0.1 of the L1 distance of VGG16 features, no discriminator, no loss of the quantizer (FSQ needs none), AdamW
with weight decay on everything, 49 frames, one clip on each of eight GPUs with 80 GB. It continues from released
weights; how long is not published, the 100,000 steps here are a guess. The released weights reach 33.72 dB, SSIM 0.828
and an rFVD of 113.5 on TokenBench. VGG16 needs its weight file (docs/convert_weights.md).
"""

from configs import base


def get_config(arg=None):
    config = base.get_base()
    config.steps = 100_000
    config.ema_decay = 0.9999
    config.ema_warmup = False
    config.model.name = "cosmos-1.0-dv8x16x16"
    config.optimizer = base.optimizer(
        name="adamw", lr=1e-4, warmup=4_999, b1=0.5, b2=0.999, eps=1e-8, weight_decay=0.01, decay="all", clip=1.0
    )
    config.loss.reconstruction = "l1"
    config.loss.content_weight = 0.1  # the authors call it lpips
    config.data = base.data(source="videos", path="data/videos/train", held_out="0.01")
    # Square, 4:3 and 16:9, lying and standing.
    sizes = ((256, 256), (192, 256), (256, 192), (144, 256), (256, 144))
    config.data.streams["video"] = base.stream(frames=49, batch_size=8, resolutions=sizes)
    config.log.every = 100
    config.evaluation.every = config.checkpoint.every = 5_000
    if arg == "smoke":  # seconds, on the embedded photographs and without the weights of VGG16
        config.steps = 4
        config.loss.content_weight = 0.0
        config.optimizer.warmup = 2
        config.model.update({"channels": 8, "blocks": 1, "z_channels": 8})
        config.data.update({"source": "embedded", "path": "", "held_out": "0.1", "virtual_camera": True})
        config.data.streams.video.update({"batch_size": 8, "resolutions": ((32, 32),), "frames": 9})
        config.log.every = 1
        config.evaluation.update({"every": 2, "max_items": 4})
        config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/cosmos_dv8x16x16.py. Accepted: smoke.")
    return config
