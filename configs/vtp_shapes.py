"""VTP in miniature (https://arxiv.org/abs/2512.13687), on drawn shapes with captions: minutes on two CPU cores.

    python train.py --config=configs/vtp_shapes.py
    python eval.py --config=configs/eval_understanding.py --checkpoint=runs/vtp_shapes

All objectives of configs/vtp_large.py on pictures of 64 pixels, 16 tokens each, without LPIPS, which knows photographs.
The points of configs/scaling_shapes.py are runs of this config with other fields.

    --config=configs/vtp_shapes.py:smoke    seconds
"""

from configs import base, vtp_large


def get_config(arg=None):
    config = vtp_large.get_config("smoke")
    config.steps = 800
    config.model.update({"encoder": (96, 4, 3), "decoder": (96, 4, 3), "latent_channels": 32})
    config.model.text_tower = (("width", 64), ("layers", 2), ("heads", 2), ("context", 24), ("features", 64))
    config.optimizer = base.optimizer(
        name="adamw", lr=1e-3, schedule="cosine", warmup=50, b2=0.98, eps=1e-6, weight_decay=0.05
    )
    config.ema_decay = 0.99
    ssl = config.pretraining.distillation
    ssl.head.update({"prototypes": 256, "hidden": 256, "bottleneck": 64})
    ssl.parts.count = 2
    # Colours are what captions and classes are about: views keep them.
    ssl.whole.update({"jitter": 0.0, "gray": 0.0, "blur": (0.0,), "solarize": (0.0,), "flip": 0.0})
    ssl.parts.update({"jitter": 0.0, "gray": 0.0, "blur": (0.0,), "flip": 0.0})
    ssl.momentum.update({"start": 0.99, "steps": config.steps})
    ssl.teacher_temperature.points = ((0, 0.04), (200, 0.07))
    ssl.masks.group = 16
    config.data.streams.pairs.batch_size = 64
    config.log.update({"every": 50, "tensorboard": False})
    config.evaluation.update({"every": 500, "max_items": 64})
    config.checkpoint.update({"every": 500, "keep_last": 1, "keep_best": 0})
    if arg == "smoke":
        config.steps = 4
        config.data.streams.pairs.batch_size = 16
        config.log.every = 1
        config.evaluation.every = config.checkpoint.every = 2
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/vtp_shapes.py. Accepted: smoke.")
    return config
