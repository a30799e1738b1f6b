"""What a tokenizer's encoder understands: classes and captions.

Zero-shot classification, retrieval, linear probes and nearest neighbours. A run, on the held-out part of its own data
(here of drawn shapes), learning from the rest:
    python eval.py --config=configs/eval_understanding.py --checkpoint=runs/mine
The released VTP on ImageNet (published for the large one: 78.2% zero-shot, of pictures squashed to squares instead of
cropped, with all 80 of OpenAI's templates; 85.7% linear, with as many views as epochs):
    python eval.py --config=configs/eval_understanding.py --checkpoint=model.safetensors \\
        --config.model.name=vtp-large-f16d64 --config.data.path=imagenet/val \\
        --config.understanding.training=imagenet/train --config.understanding.training_items=0 \\
        --config.understanding.views=1 \\
        --config.understanding.class_names=imagenet_names.txt
"""

from configs import eval_default


def get_config(arg=None):
    if arg is not None:
        raise ValueError(f"configs/eval_understanding.py takes no argument, got {arg!r}.")
    config = eval_default.get_config()
    config.metrics = ("psnr", "zero_shot", "retrieval", "linear_probe", "knn")
    config.baseline_items = 0
    config.preview_items = 0
    config.data.labels = True
    return config
