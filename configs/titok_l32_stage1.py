"""TiTok-L-32 (https://arxiv.org/abs/2406.07550), first of two stages: 256x256 pixels as 32 tokens out of 4,096.

    python train.py --config=configs/titok_l32_stage1.py --config.data.path=<folder of ImageNet's train split>

Not pixels but the tokens of MaskGIT's VQGAN are reconstructed, by cross entropy. Its weight file
(maskgit-vqgan-imagenet-f16-256.bin, docs/convert_weights.md) gives the tokens, and the decoder through which held-out
pictures are seen, which stays as it is until the second stage (configs/titok_l32_stage2.py).

The authors' titok_l32.yaml: batch 256 on 8 A100 with 32 images each, 1,000,000 steps. The other two of the first
releases differ in their name alone:

    --config=configs/titok_l32_stage1.py:b64     base transformers, 64 tokens
    --config=configs/titok_l32_stage1.py:s128    small transformers, 128 tokens (its loss ends near 3.0)

Another VQGAN, say of other data, is a run of configs/maskgit_vqgan.py or a folder of `Tokenizer.save`, given twice;
where its sizes are not the published ones, config.model.proxy has them:

    --config.loss.tokens.path=<run> --config.init_parts.pixels.path=<run>

``smoke`` takes minutes on a CPU, with the tokens of a small VQGAN, on drawn shapes: those of the few embedded
photographs are soon known by heart. Train the VQGAN first, since through its decoder held-out pictures are seen;
without the two paths its weights are random, and pictures are noise until the second stage, though the cross entropy
falls.

    python train.py --config=configs/maskgit_vqgan.py:smoke --workdir=runs/vqgan
    python train.py --config=configs/titok_l32_stage1.py:smoke --workdir=runs/first \\
        --config.loss.tokens.path=runs/vqgan --config.init_parts.pixels.path=runs/vqgan
    python train.py --config=configs/titok_l32_stage2.py:smoke --config.init_from=runs/first
"""

from configs import base, maskgit_vqgan

# Embeddings are not among the matrices that decay.
UNDECAYED = ("encode_tokens/patches/kernel", "decode_tokens/embed/kernel")
ARGUMENTS = ("b64", "s128", "smoke")


def smoke(config):
    """Small sizes, which both stages share; the VQGAN is that of its own smoke run, which is returned."""
    vqgan = maskgit_vqgan.get_config("smoke").model
    codes, widths = vqgan.bottleneck, tuple(vqgan.widths)
    config.ema_decay = 0.9
    config.model.bottleneck.update({"codebook_size": 256, "code_dim": 8})
    config.model.update({"latent_channels": 8, "tokens": 32, "input_size": (32, 32), "remat": False})
    config.model.update({"encoder": (64, 2, 2), "decoder": (64, 2, 2), "patch": 2 ** (len(widths) - 1)})
    config.model.proxy = (codes.codebook_size, codes.code_dim, widths, vqgan.blocks)
    config.optimizer.update({"lr": 1e-3, "warmup": 20})
    config.data.update({"source": "shapes", "path": "", "held_out": "0.1"})
    config.data.streams.image.update({"batch_size": 16, "resolutions": ((32, 32),)})
    config.log.every = 10
    config.evaluation.update({"every": 100, "max_items": 10, "final_report": False})
    config.checkpoint.every = 0
    return vqgan


def get_config(arg=None):
    if arg not in (None, *ARGUMENTS):
        raise ValueError(f"unknown argument {arg!r} of configs/titok_l32_stage1.py. Accepted: {', '.join(ARGUMENTS)}.")
    config = base.get_base()
    config.steps = 1_000_000
    config.ema_decay = 0.999
    config.model.name = {"b64": "titok-b64", "s128": "titok-s128"}.get(arg, "titok-l32")
    config.model.bottleneck = {"name": "vq", "codebook_size": 4096, "code_dim": 12, "distance": "cosine"}
    config.model.remat = True

    config.optimizer = base.optimizer(
        name="adamw",
        lr=1e-4,
        schedule="cosine",
        warmup=10_000,
        warmup_from=0.0,
        end=0.1,
        b1=0.9,
        b2=0.99,
        weight_decay=1e-4,
        undecayed=UNDECAYED,
        clip=1.0,
        frozen=(r"to_pixels/(codebook|pixels)",),
    )
    config.loss.reconstruction = "tokens"
    vqgan = "maskgit-vqgan-imagenet256-f16-1024"
    config.loss.tokens.model.name = vqgan
    config.init_parts.pixels = base.part(
        model={"name": vqgan}, take=(("decoder", "to_pixels/pixels"), ("bottleneck/codebook", "to_pixels/codebook"))
    )
    config.loss.bottleneck.commitment = 0.25
    config.loss.bottleneck.codebook = 1.0

    config.data = base.data(source="images", path="data/imagenet/train", held_out="0.001", resample="bicubic")
    config.data.streams["image"] = base.stream(batch_size=256, resolutions=((256, 256),))
    config.evaluation.every = config.checkpoint.every = 10_000
    if arg == "smoke":
        config.steps = 800
        vqgan = smoke(config)
        config.ema_decay = 0.97
        config.evaluation.every = 200
        for part in (config.loss.tokens, config.init_parts.pixels):
            part.model.unlock()
            part.model.update(vqgan.to_dict())
            part.path = "random"
    return config
