"""TiTok-L-32 (https://arxiv.org/abs/2406.07550), first of two stages: 256x256 pixels as 32 tokens out of 4,096.

    python train.py --config=configs/titok_l32_stage1.py --config.data.path=<folder of ImageNet's train split>

Not pixels but the tokens of MaskGIT's VQGAN are reconstructed, by cross entropy. Its weight file
(maskgit-vqgan-imagenet-f16-256.bin, docs/convert_weights.md) gives the tokens, and the decoder through which held-out
pictures are seen, which stays as it is until the second stage (configs/titok_l32_stage2.py).

The authors' titok_l32.yaml: batch 256 on 8 A100 with 32 images each, 1,000,000 steps. The other two of the first
releases differ in their name alone:

    --config=configs/titok_l32_stage1.py:b64     base transformers, 64 tokens
    --config=configs/titok_l32_stage1.py:s128    small transformers, 128 tokens (its loss ends near 3.0)

``smoke`` shows that it runs: minutes on a CPU, on the embedded photographs, with the tokens of a small VQGAN of random
weights. Its cross entropy falls; held-out pictures, decoded by those random weights, are noise until the second stage.
"""

from configs import base

# Embeddings are not among the matrices that decay.
UNDECAYED = ("encode_tokens/patches/kernel", "decode_tokens/embed/kernel")
ARGUMENTS = ("b64", "s128", "smoke")


def smoke(config):
    """Small sizes, which both stages share; the VQGAN is a small one too, of random weights."""
    config.ema_decay = 0.9
    config.model.bottleneck.update({"codebook_size": 256, "code_dim": 8})
    config.model.update({"latent_channels": 8, "tokens": 16, "input_size": (32, 32), "patch": 8, "remat": False})
    config.model.update({"encoder": (64, 2, 2), "decoder": (64, 2, 2), "proxy": (64, 16, (32, 32, 32, 32), 1)})
    config.optimizer.update({"lr": 1e-3, "warmup": 20})
    config.data.update({"source": "embedded", "path": "", "held_out": "0.1", "zoom": (1.0, 4.0)})
    config.data.streams.image.update({"batch_size": 16, "resolutions": ((32, 32),)})
    config.log.every = 10
    config.evaluation.update({"every": 100, "max_items": 10, "final_report": False})
    config.checkpoint.every = 0


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
        config.steps = 300
        smoke(config)
        random_vqgan = {
            "name": "maskgit_vqgan",
            "bottleneck": {"name": "vq", "codebook_size": 64, "code_dim": 16},
            "latent_channels": 16,
            "widths": (32, 32, 32, 32),
            "blocks": 1,
        }
        config.loss.tokens.model.update(random_vqgan)
        config.loss.tokens.path = "random"
        config.init_parts.pixels.model.unlock()
        config.init_parts.pixels.model.update(random_vqgan)
        config.init_parts.pixels.path = "random"
    return config
