"""Evaluate any tokenizer.

A run, on its own held-out data:
    python eval.py --config=configs/eval_default.py --checkpoint=runs/quickstart
An official weight file, on a folder of images or clips:
    python eval.py --config=configs/eval_default.py --checkpoint=weights.safetensors --config.model.name=<variant> \
        --config.data.path=<folder> --config.data.streams.input.frames=17
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg=None):
    if arg is not None:
        raise ValueError(f"configs/eval_default.py takes no argument, got {arg!r}.")
    config = ConfigDict()
    config.model = ConfigDict(
        {"name": ""}
    )  # released variant of an official weight file; "" for runs and saved folders
    config.step = -1  # checkpoint of a run; -1 = the latest
    config.precision = "float32"
    config.protocol = "tokenbench"  # tokenbench, vidtok, ... : how PSNR, SSIM, FVD are defined
    config.metrics = (
        "psnr",
        "ssim",
        "ms_ssim",
        "lpips",
        "rfid",
        "inception_score",
        "fvd",
        "codebook",
        "bits",
        "latents",
        "throughput",
    )
    # Files of the frozen networks; empty = looked for in $TOKENIZERS_WEIGHTS.
    config.weights = ConfigDict({"lpips": "", "inception": "", "i3d": ""})
    config.baseline_items = 64  # items per stream for bicubic, JPEG, WebP; 0 = none, -1 = all
    config.preview_items = 8
    # Data of its own, all of it evaluated; with source and path empty, the held-out data of the run.
    config.data = base.data(source="", held_out="", crop="center", flip=False)
    config.data.streams["input"] = base.stream(frames=1, resolutions=((256, 256),), batch_size=8)
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1, "split": "height"})
    config.distributed = ConfigDict({"mode": "off", "coordinator": "", "processes": 1, "process": 0})
    config.compilation_cache = "~/.cache/tokenizers/compiled"
    return config
