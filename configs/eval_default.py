"""Evaluate any tokenizer.

A run, on its own held-out data:
    python eval.py --config=configs/eval_default.py --checkpoint=runs/quickstart
An official weight file, on a folder of images or clips:
    python eval.py --config=configs/eval_default.py --checkpoint=weights.safetensors --config.model.name=<variant> \
        --config.data.path=<folder> --config.data.streams.input.frames=17
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

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
        "spectrum",
        "uniformity",
        "effective_rank",
        "scale_equivariance",
        "throughput",
    )
    # Files of the frozen networks; empty = looked for in $TOKENIZERS_WEIGHTS.
    config.weights = ConfigDict({"lpips": "", "inception": "", "i3d": ""})
    # For decoders that read captions (TA-TiTok): a network of texts (clip_vitl14_336; None = that of the run), and a
    # sentence with {} for the name of an item's class in place of its caption.
    config.captions = ConfigDict({"network": placeholder(str), "path": "", "template": ""})
    # Of the metrics zero_shot, retrieval, linear_probe and knn (tokenizers/evaluate/understanding.py).
    config.understanding = ConfigDict()
    config.understanding.class_names = ""  # a file with a name per line; "" = those of the data
    config.understanding.templates = ()  # sentences with {} for a name; () = seven of OpenAI's
    config.understanding.training = ""  # labelled data to learn from; "" = what is not held out
    config.understanding.training_items = 50_000  # at most; 0 = all
    config.understanding.views = 0  # random crops of each that linear probes see; 0 = the picture as it is evaluated
    config.understanding.blocks = (1, 4)  # last blocks that a linear probe reads
    config.understanding.epochs = 10
    config.understanding.batch_size = 256
    config.understanding.learning_rates = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    config.understanding.neighbours = 20
    config.understanding.temperature = 0.07
    config.baseline_items = 64  # items per stream for bicubic, JPEG, WebP; 0 = none, -1 = all
    config.preview_items = 8
    # Data of its own, all of it evaluated; with source and path empty, the held-out data of the run.
    config.data = base.data(source="", held_out="", crop="center", flip=False)
    config.data.streams["input"] = base.stream(frames=1, resolutions=((256, 256),), batch_size=8)
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1, "split": "height"})
    config.distributed = ConfigDict({"mode": "off", "coordinator": "", "processes": 1, "process": 0})
    config.compilation_cache = "~/.cache/tokenizers/compiled"
    return config
