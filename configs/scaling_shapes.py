"""What pre-training for more than reconstruction does to generation, in miniature: a study on drawn shapes.

    python -m tokenizers.scaling --config=configs/scaling_shapes.py --workdir=runs/scaling_shapes

VTP's question (https://arxiv.org/abs/2512.13687, section 4): as more compute goes into a tokenizer, do generators of
its latents get better? Reconstruction alone against the joint objective, at two amounts of compute, several seeds, one
generator and one budget for all of them. Under an hour on two CPU cores; docs/scaling_study.md has the outcome.
What is done is not done again, and a point that fails does not end the study.

    --config=configs/scaling_shapes.py:gpu      more compute points, larger models: minutes each on a GPU
    --config=configs/scaling_shapes.py:smoke    every part of it in a few minutes; its numbers mean nothing
"""

from ml_collections import ConfigDict

# Without its other objectives the model needs no tower of texts; every image is reconstructed.
RECONSTRUCTION = {
    "pretraining.contrast.weight": 0.0,
    "model.clip": False,
    "pretraining.distillation.weight": 0.0,
    "pretraining.reconstruction.weight": 1.0,
    "pretraining.reconstruction.every": 1,
}

# The budget of the generator, and what else the black box is told.
BLACK_BOX = {
    "data.drawings": 8_000, "data.streams.pictures.batch_size": 64, "latents.flip": False,
    "budget.size": (4, 96, 4), "budget.tokens": 16, "budget.steps": 400, "budget.batch_size": 128,
    "budget.samples": 1_000, "budget.points": 25, "training.optimizer.lr": 1e-3, "training.ema_decay": 0.99,
    "training.log.tensorboard": False, "reference_items": 4_000, "sample_batch_size": 100,
    "judge.channels": (16, 32, 64), "judge.steps": 300, "judge.batch_size": 64, "judge.held_out": 800,
}  # fmt: skip


def steps(count):
    """A whole run of that length: what follows its schedules as well."""
    return {"steps": count, "optimizer.warmup": count // 20, "pretraining.distillation.momentum.steps": count}


def get_config(arg=None):
    config = ConfigDict(convert_dict=False)
    config.training = "configs/vtp_shapes.py"
    config.overrides = {}  # of the training config, for all points
    config.seeds = 2
    # The points are all combinations of one value of each axis; of a value, the fields of the training config.
    config.axes = {
        "objective": {"reconstruction": RECONSTRUCTION, "joint": {}},
        "steps": {str(count): steps(count) for count in (150, 600)},
    }
    config.curves = "objective"  # the axis whose values are curves of their own, against operations
    # What says how good a run is: a config of eval.py, the file it writes, and the places of scores in there.
    config.judges = {"understanding": understanding(4_000, epochs=60), "generation": generation(BLACK_BOX)}
    # law: of value against operations, power (a C^b) or line (a + b log10 C)
    more = {"law": "line", "less_is_better": False}
    config.scores = {"PSNR": more, "linear probe": more, "zero-shot": more, "class consistency": more}
    config.scores |= {"Frechet distance of generated": {"law": "power", "less_is_better": True}}
    if arg == "smoke":
        config.training = "configs/vtp_shapes.py:smoke"
        config.seeds = 1
        config.overrides = {"data.drawings": 200}
        config.axes["steps"] = {str(count): steps(count) for count in (4, 8)}
        black_box = generation({"data.streams.pictures.resolutions": ((64, 64),)})
        black_box["config"] = "configs/generation_blackbox.py:smoke"
        config.judges = {"understanding": understanding(64, epochs=2), "generation": black_box}
    elif arg == "gpu":
        config.seeds = 3
        larger = {"model.encoder": (384, 8, 6), "model.decoder": (384, 8, 6), "data.streams.pairs.batch_size": 256}
        config.overrides = larger
        config.axes["steps"] = {str(count): steps(count) for count in (1_000, 3_000, 10_000)}
        config.judges = {"understanding": understanding(8_000, epochs=60), "generation": generation({})}
    elif arg is not None:
        raise ValueError(f"unknown argument {arg!r} of configs/scaling_shapes.py. Accepted: gpu, smoke.")
    return config


def understanding(training_items, epochs):
    """Held-out drawings: their reconstruction, and what probes and texts make of them."""
    rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    probe = {"training_items": training_items, "epochs": epochs, "learning_rates": rates}
    return {
        "config": "configs/eval_understanding.py",
        "result": "metrics.json",
        "overrides": {f"understanding.{name}": value for name, value in probe.items()},
        "scores": {
            "PSNR": ("overall", "psnr"),
            "linear probe": ("overall", "linear_probe"),
            "zero-shot": ("overall", "zero_shot_top1"),
        },
    }


def generation(overrides):
    """The black box: a generator trained on the latents of drawings."""
    return {
        "config": "configs/generation_blackbox.py:shapes",
        "result": "metrics.json",
        "overrides": overrides,
        "scores": {
            "Frechet distance of generated": ("scores", "generated", "fd_judge"),
            "class consistency": ("scores", "generated", "class_consistency"),
        },
    }
