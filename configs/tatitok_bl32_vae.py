"""TA-TiTok (https://arxiv.org/abs/2501.07730), continuous: 256x256 pixels as 32 tokens of 16 channels.

    python train.py --config=configs/tatitok_bl32_vae.py --config.data.path=<images with texts>

The authors' recipe for DataComp (images whose sides differ by at most a factor of 2, the longer one of at least 256
pixels): batch 1,024 on 32 GPUs, 650,000 steps, L2, LPIPS with a tenth of ConvNeXt-S, and MaskBit's discriminator from
step 200,000. The released weights have an rFID of 1.53 and an inception score of 222.0 on ImageNet.

The decoder also reads the caption of an image, as features of CLIP ViT-L/14@336: data need texts, and its weight file
is needed beside those of LPIPS and ConvNeXt-S (docs/convert_weights.md). What decodes later gives such features, too:
``text=`` of decode and reconstruct. Evaluation on ImageNet: --config.captions.template="A photo of a {}." with labels.

``vq``: 8,192 codes instead, which move to inputs where they are not used (clustering VQ); rFID 3.95.
``tokens``: a decoder of the tokens alone, for images without texts.
"""

from configs import titok_bl64_vq8k


def get_config(arg=None):
    if arg not in (None, "vq", "tokens", "smoke"):
        raise ValueError(f"unknown argument {arg!r} of configs/tatitok_bl32_vae.py. Accepted: vq, tokens, smoke.")
    config = titok_bl64_vq8k.get_config("smoke" if arg == "smoke" else None)
    config.model.name = "tatitok-bl32-vq" if arg == "vq" else "tatitok-bl32-vae"
    if arg in ("tokens", "smoke"):
        config.model.text = None
    else:
        config.captions.network = "clip_vitl14_336"
        config.data.source = "captions"
    if arg != "smoke":
        config.steps = 650_000
        config.data.path = "data/datacomp"
        config.data.streams.image.batch_size = 1024
    if arg == "vq":
        config.model.bottleneck = {"name": "vq", "codebook_size": 8192, "code_dim": 64, "learning": "clustering"}
    else:
        config.model.bottleneck = {"name": "gaussian"}
        del config.loss.bottleneck.commitment, config.loss.bottleneck.codebook
        config.loss.bottleneck.kl = 1e-6
    return config
