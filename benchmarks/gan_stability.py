"""What happens to reconstructions when the discriminator starts: held-out PSNR, step by step, in several settings.

    python benchmarks/gan_stability.py [--steps 400] [--out docs/gan_stability.png]

A small VQGAN (4x4 pixels per token, FSQ) trains on the embedded photographs twice, from the same weights, on the same
batches; the settings differ in how the discriminator comes in. The published one is VQGAN's. Prints a table, and draws
the curves. Five minutes of CPU time.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import base  # noqa: E402
from tokenizers.train import loop  # noqa: E402

# Colour of the curve, and whether the discriminator comes in as VQGAN has it or as `configs.base` does.
SETTINGS = {"as published": ("#cf222e", True), "defaults": ("#1f6feb", False)}


def configuration(steps, published):
    """VQGAN's recipe in small, with the discriminator from half of the run on."""
    clip = 0.0 if published else 1.0
    config = base.get_base()
    config.steps = steps
    config.ema_decay = 0.0  # scores are of the weights as they are
    config.ema_warmup = False
    config.model.name = "vqgan"
    config.model.bottleneck = {"name": "fsq", "levels": (8,) * 6, "commitment": True}
    config.model.update({"latent_channels": 6, "z_channels": 6, "widths": (32, 64, 64), "stem": 32, "blocks": 1})
    config.model.update({"attention": (), "middle_attention": False})
    config.optimizer = base.optimizer(lr=1e-3, b1=0.5, b2=0.9, clip=clip)
    config.loss.bottleneck.commitment = 0.25
    part = config.discriminator
    if published:
        base.undamped(part)
    else:
        part.ramp = round(0.15 * steps)  # the default is for long runs
    part.update({"name": "patchgan_2d", "channels": 32, "layers": 2, "fresh_forward": True})
    part.start = part.generator_start = steps // 2
    part.optimizer = base.optimizer(lr=5e-4, b1=0.5, b2=0.9, clip=clip)
    config.data = base.data(source="embedded", held_out="0.1", zoom=(1.0, 4.0))
    config.data.streams["image"] = base.stream(batch_size=8, resolutions=((32, 32),))
    config.log.update({"every": 10, "tensorboard": False})
    config.evaluation.update({"every": 10, "max_items": 32, "final_report": False})
    config.checkpoint.update({"every": 0, "keep_best": 0, "keep_last": 1})
    return config


def curve(config):
    """(steps, held-out PSNR, skipped updates) of one run."""
    with tempfile.TemporaryDirectory() as folder:
        loop.run(config, pathlib.Path(folder) / "run")
        lines = [json.loads(line) for line in (pathlib.Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    scored = [(line["step"], line["held_out/psnr"]) for line in lines if "held_out/psnr" in line]
    skipped = max(line.get("skipped", 0) for line in lines)
    return *np.array(scored, float).T, int(skipped)


def draw(curves, start, path):
    figure = Figure(figsize=(6.4, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (steps, psnr, _) in curves.items():
        axes.plot(steps, psnr, color=SETTINGS[name][0], label=name, linewidth=1.4)
    axes.axvline(start, color="#8c959f", linestyle="--", linewidth=1)
    axes.annotate("the generator sees\nthe discriminator", (start, 0.03), (4, 0), ("data", "axes fraction"),
                  textcoords="offset points", fontsize=8, color="#57606a")  # fmt: skip
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("held-out PSNR, dB", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(path, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of each run; the discriminator comes in after half")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="PNG file for the curves")
    arguments = parser.parse_args()
    start = arguments.steps // 2
    curves = {name: curve(configuration(arguments.steps, published)) for name, (_, published) in SETTINGS.items()}
    print(f"{'setting':14} {'before':>8} {'lowest after':>13} {'at the end':>11} {'skipped':>8}")
    for name, (steps, psnr, skipped) in curves.items():
        before, after = psnr[steps <= start][-3:].mean(), psnr[steps > start]
        print(f"{name:14} {before:8.2f} {after.min():13.2f} {after[-3:].mean():11.2f} {skipped:8d}")
    if arguments.out is not None:
        draw(curves, start, arguments.out)


if __name__ == "__main__":
    main()
