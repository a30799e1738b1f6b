"""IBQ: VQGAN's network with codebooks of up to 262,144 codes of 256 channels, all of which learn in every step.

Shi et al., "Scalable image tokenization with index backpropagation quantization", https://arxiv.org/abs/2412.02692;
code TencentARC/SEED-Voken (`src/IBQ`). Encoder and decoder are VQGAN's (`nn.compvis`) with four residual blocks per
level; what is new is the quantizer (`quantize.ibq`).
"""

from __future__ import annotations

import flax.linen as nn

from ..quantize.ibq import IBQ
from ..types import Variant
from . import vqgan

SYSTEM = "ibq"


class Model(vqgan.Model):
    """VQGAN's model; the fields that differ.

    The released weights of the bottleneck's terms: ``index_propagation`` 1, ``commitment`` 1, ``codebook`` 0.25,
    ``entropy_sample`` 0.05, ``entropy_codebook`` -0.05.

    Attributes:
      bottleneck: `IBQ`.
      blocks: residual blocks per level of the encoder; the decoder has one more.
    """

    bottleneck: nn.Module = IBQ(16384, 256)
    blocks: int = 4


def _released(codes: int, data: str, file: str, note: str) -> Variant:
    return Variant(
        config={"bottleneck": {"name": "ibq", "codebook_size": codes, "code_dim": 256}},
        paper="https://arxiv.org/abs/2412.02692",
        source=f"https://github.com/TencentARC/SEED-Voken (weights: huggingface.co/TencentARC, {file})",
        license="Apache-2.0",
        note=f"{data}; {note}",
    )


VARIANTS = {
    "ibq-imagenet-1024": _released(1024, "ImageNet", "imagenet256_1024.ckpt", "rFID 2.24, LPIPS .2580"),
    "ibq-imagenet-8192": _released(8192, "ImageNet", "imagenet256_8192.ckpt", "rFID 1.87, LPIPS .2437"),
    "ibq-imagenet-16384": _released(16384, "ImageNet", "imagenet256_16384.ckpt", "rFID 1.37, LPIPS .2235"),
    "ibq-imagenet-262144": _released(262144, "ImageNet", "imagenet256_262144.ckpt", "rFID 1.00, LPIPS .2030"),
    "ibq-pretrain-16384": _released(
        16384, "100 M web images", "pretrain256_16384.ckpt", "rFID 2.06, PSNR 22.01 on ImageNet"
    ),
    "ibq-pretrain-262144": _released(
        262144, "100 M web images", "pretrain256_262144.ckpt", "rFID 1.53, PSNR 22.69 on ImageNet"
    ),
}
