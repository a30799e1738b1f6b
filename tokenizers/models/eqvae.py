"""EQ-VAE: Stable Diffusion's autoencoder, fine-tuned so that scaling or turning its latents scales or turns the image.

Kouzelis et al., "EQ-VAE: equivariance regularized latent space for improved generative image modeling",
https://arxiv.org/abs/2502.09509; code zelaki/eqvae. The network is latent diffusion's without a change. The method is
the objective: what decoder and losses see is transformed, see `losses.equivariance`; any tokenizer with a continuous
grid of latents can be trained or fine-tuned with it (``config.loss.equivariance``).
"""

from __future__ import annotations

from ..types import Variant
from .ldm_kl import Model

__all__ = ["SYSTEM", "VARIANTS", "Model"]

SYSTEM = "eqvae"


def _variant(name: str, note: str) -> Variant:
    return Variant(
        config={"latent_channels": 4, "widths": (128, 256, 512, 512), "scaling_factor": 0.18215},
        paper="https://arxiv.org/abs/2502.09509",
        source=f"https://huggingface.co/zelaki/{name}",
        license="see the source",
        note=note,
    )


VARIANTS = {
    "eq-vae": _variant("eq-vae", "kl-f8 fine-tuned for 5 epochs of OpenImages; rFID 0.82, PSNR 25.95"),
    "eq-vae-ema": _variant("eq-vae-ema", "kl-f8 fine-tuned for 44 epochs of ImageNet; rFID 0.55, PSNR 26.15"),
}
