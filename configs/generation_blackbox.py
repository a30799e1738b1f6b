"""Generation as a black box: what a fixed generator, under a fixed budget, makes of the latents of any tokenizer.

    python eval.py --config=configs/generation_blackbox.py:smoke --checkpoint=runs/quickstart
    python eval.py --config=configs/generation_blackbox.py:shapes --checkpoint=runs/quickstart
    python eval.py --config=configs/generation_blackbox.py --checkpoint=weights.safetensors \\
        --config.model.name=<variant> --config.data.source=images --config.data.path=<ImageNet> \\
        --config.data.labels=True

Latents -> LightningDiT -> samples -> distances, each part going on where it stopped; `docs/generation.md` explains it.
Without argument, the budget of VTP's scaling study (https://arxiv.org/abs/2512.13687): LightningDiT-B, 100,000 steps of
batch 1024, 10,000 samples; cost as in `configs/generation_lightningdit_b.py`. ``shapes``: drawings of 64 x 64 pixels,
7e16 operations, less than an hour of one A100 (reckoned, not measured). ``smoke``: two minutes on two CPU cores, to
see it work; its numbers say little.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base


def get_config(arg=None):
    config = ConfigDict()
    config.model = ConfigDict({"name": ""})  # released variant of an official weight file; "" for runs, saved folders
    config.step = -1  # checkpoint of a run; -1 = the latest
    config.precision = "float32"  # of the tokenizer

    # What is the same for all tokenizers that are compared. It is written into the results.
    config.budget = ConfigDict()
    config.budget.size = (12, 768, 12)  # of the generator: depth, width, heads
    config.budget.tokens = 256  # its patch is the smallest that leaves no more
    config.budget.steps = 100_000
    config.budget.batch_size = 1024
    config.budget.samples = 10_000
    config.budget.sampler = "euler"  # euler, dopri5 (whose steps depend on the batch)
    config.budget.points = 250  # in time; one more than steps of euler
    config.budget.shift = 0.0  # below 1: more of them near the noise; 0 = equal
    config.budget.guidance = 1.0  # scale of classifier-free guidance; 1 = none
    config.budget.guidance_start = placeholder(float)  # time before which there is none
    config.budget.guided_channels = placeholder(int)  # the first ones; None = all (published LightningDiT: 3)
    config.budget.seed = 0

    # How the generator is trained otherwise; steps, seed, size, patch, data and batch size are set from above.
    config.training = base.get_generator()
    config.training.log.every = 100
    config.training.checkpoint.update({"every": 5_000, "keep_best": 0})

    config.latents = ConfigDict()
    config.latents.posterior = "sample"  # of KL tokenizers: sample (VA-VAE), mean
    config.latents.flip = True  # mirrored copies
    config.latents.dtype = "float32"  # on disk: float32, bfloat16
    config.latents.shard_items = 4096
    config.latents.statistics_items = 10_000

    # All training items are encoded; without path or source, drawings.
    config.data = base.data(source="shapes", drawings=100_000, held_out="", crop="adm", flip=False)
    config.data.streams["pictures"] = base.stream(resolutions=((256, 256),), batch_size=64)
    config.reference_items = 50_000  # of the training items, spread evenly, that samples are compared with; 0 = all
    config.sample_batch_size = 64

    # Files of frozen networks; empty = looked for in $TOKENIZERS_WEIGHTS.
    config.weights = ConfigDict({"inception": "", "foundation": ""})
    config.foundation = "dinov2_large"  # dinov2_small, dinov2_base, dinov2_large, mae_large
    # A classifier of the drawings, trained here.
    config.judge = ConfigDict({"channels": (32, 64, 128, 256), "lr": 2e-3, "steps": 5_000, "batch_size": 128})
    config.judge.held_out = 2_000  # items that its accuracy is of

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1, "split": "height"})
    config.distributed = ConfigDict({"mode": "off", "coordinator": "", "processes": 1, "process": 0})
    config.compilation_cache = "~/.cache/tokenizers/compiled"

    if arg in ("shapes", "smoke"):
        config.data.streams.pictures.resolutions = ((64, 64),)
        config.budget.update({"size": (12, 384, 6), "tokens": 64, "steps": 20_000, "batch_size": 256, "points": 100})
        # At first the network predicts nothing, and the gradient of a direction that is none is without bound: Adam
        # needs hundreds of steps to forget it, which a short training does not have.
        config.training.flow.cosine = False
        config.training.ema_decay = 0.999
        config.reference_items = 10_000
    if arg == "smoke":
        config.data.drawings = 2_048
        config.data.streams.pictures.update({"resolutions": ((32, 32),), "batch_size": 32})
        config.budget.update({"size": (4, 64, 2), "tokens": 16, "steps": 400, "batch_size": 64, "samples": 256})
        config.budget.points = 20
        config.training.ema_decay = 0.98
        config.training.optimizer.lr = 1e-3
        config.training.log.update({"every": 50, "tensorboard": False})
        config.latents.shard_items = 512
        config.reference_items = 1_024
        config.judge.update({"channels": (16, 32, 64, 128), "steps": 400, "batch_size": 64, "held_out": 204})
    elif arg not in (None, "shapes"):
        raise ValueError(f"unknown argument {arg!r} of configs/generation_blackbox.py. Accepted: shapes, smoke.")
    return config
