"""Tokenizers that a package of PyTorch has as well, with ours next to them: for `pytorch.py`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import vistok


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same tokenizer twice.

    Attributes:
      theirs: a PyTorch module.
      parts: ``{name: function(theirs, tensor)}``, e.g. of ``encode``, whose results compare with `ours`'.
      ours: a `vistok.Tokenizer`.
      same: the weights are.
    """

    theirs: Any
    parts: Mapping[str, Callable]
    ours: Any
    same: bool = True


def _state(module):
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def _autoencoder(theirs, ours, same=True):
    parts = {"encode": lambda m, x: m.encode(x).latent_dist.mode(), "decode": lambda m, z: m.decode(z).sample}
    return Pair(theirs, parts, ours, same)


def _autoencoder_kl(system, **changes):
    import diffusers

    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        **changes,
    )
    config = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    ours = vistok.from_official(system, {"_class_name": "AutoencoderKL", **config}, _state(theirs))
    return _autoencoder(theirs, ours)


def kl_f8(size):
    """Stable Diffusion's autoencoder."""
    return _autoencoder_kl("ldm_kl", latent_channels=4)


def eq_vae(size):
    """The same network, trained to be equivariant."""
    return _autoencoder_kl("eqvae", latent_channels=4)


def flux(size):
    """FLUX.1's: sixteen channels, and no 1x1 convolutions around the latents."""
    quiet = {"use_quant_conv": False, "use_post_quant_conv": False}
    scale = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    return _autoencoder_kl("flux_vae", latent_channels=16, **quiet, **scale)


def cosmos_cv8x8x8(size):
    """Cosmos' continuous video tokenizer; diffusers has other names for its weights, so both are random."""
    import diffusers

    theirs = diffusers.AutoencoderKLCosmos(
        encoder_block_out_channels=(128, 256, 512, 512),
        decode_block_out_channels=(256, 512, 512, 512),
        temporal_compression_ratio=8,
        spatial_compression_ratio=8,
    )
    return _autoencoder(theirs, vistok.create("cosmos-1.0-cv8x8x8"), same=False)


def _compvis(**network):
    """(the authors' encoder and decoder, the arguments of both)."""
    from taming.modules.diffusionmodules import model

    network = {
        "ch": 128,
        "out_ch": 3,
        "ch_mult": (1, 1, 2, 2, 4),
        "num_res_blocks": 2,
        "attn_resolutions": (16,),
        "in_channels": 3,
        "resolution": 256,
        "dropout": 0.0,
        **network,
    }
    return {"encoder": model.Encoder(**network), "decoder": model.Decoder(**network)}, network


def vqgan(size):
    """VQGAN's ImageNet model with 1024 codes, from the authors' modules."""
    import torch
    from taming.modules.vqvae.quantize import VectorQuantizer2

    parts, network = _compvis(z_channels=256, double_z=False)
    theirs = torch.nn.ModuleDict(
        {
            **parts,
            "quant_conv": torch.nn.Conv2d(256, 256, 1),
            "quantize": VectorQuantizer2(1024, 256, beta=0.25),
            "post_quant_conv": torch.nn.Conv2d(256, 256, 1),
        }
    )
    parts = {
        "encode": lambda m, x: m["quantize"](m["quant_conv"](m["encoder"](x)))[0],
        "decode": lambda m, z: m["decoder"](m["post_quant_conv"](z)),
    }
    config = {"ddconfig": network, "n_embed": 1024, "embed_dim": 256}
    return Pair(theirs, parts, vistok.from_official("vqgan", config, _state(theirs)))


def va_vae(size):
    """VA-VAE's, whose encoder and decoder are VQGAN's."""
    import torch

    parts, network = _compvis(z_channels=32, double_z=True)
    convolutions = {"quant_conv": torch.nn.Conv2d(64, 64, 1), "post_quant_conv": torch.nn.Conv2d(32, 32, 1)}
    theirs = torch.nn.ModuleDict({**parts, **convolutions})
    parts = {
        "encode": lambda m, x: m["quant_conv"](m["encoder"](x))[:, :32],
        "decode": lambda m, z: m["decoder"](m["post_quant_conv"](z)),
    }
    config = {"ddconfig": network, "embed_dim": 32}
    return Pair(theirs, parts, vistok.from_official("vavae", config, _state(theirs)))


def dvae(size):
    """DALL-E's; its codes, one-hot, are what the decoder reads on both sides."""
    import torch
    from dall_e import Decoder, Encoder, map_pixels, unmap_pixels

    theirs = torch.nn.ModuleDict({"encoder": Encoder(use_mixed_precision=False)})
    theirs["decoder"] = Decoder(use_mixed_precision=False)

    def encode(m, x):
        codes = m["encoder"](map_pixels((x + 1) / 2)).argmax(1)
        return torch.nn.functional.one_hot(codes, 8192).movedim(-1, 1).to(x.dtype)

    def decode(m, z):
        return 2 * unmap_pixels(torch.sigmoid(m["decoder"](z)[:, :3])) - 1

    return Pair(theirs, {"encode": encode, "decode": decode}, vistok.from_official("dvae", {}, _state(theirs)))


def c_vivit(size):
    """Phenaki's, as the package that rebuilt it has it; its latents are the signs of 13 channels."""
    import torch
    from phenaki_pytorch import CViViT

    config = {
        "dim": 512,
        "codebook_size": 8192,
        "image_size": tuple(size),
        "patch_size": 8,
        "temporal_patch_size": 2,
        "spatial_depth": 4,
        "temporal_depth": 4,
    }
    theirs = CViViT(**config, use_vgg_and_gan=False)

    def encode(m, x):
        x = (x + 1) / 2
        tokens = torch.cat([m.to_patch_emb_first_frame(x[:, :, :1]), m.to_patch_emb(x[:, :, 1:])], 1)
        return torch.where(m.vq.project_in(m.encode(tokens)) > 0, 1.0, -1.0).to(x.dtype).movedim(-1, 1)

    def decode(m, z):
        return 2 * m.decode(m.vq.project_out(z.movedim(1, -1))) - 1

    return Pair(theirs, {"encode": encode, "decode": decode}, vistok.from_official("cvivit", config, _state(theirs)))


# The package that each needs, and what makes it for pixels of ``(height, width)``.
CASES = {
    "kl-f8": ("diffusers", kl_f8),
    "eq-vae": ("diffusers", eq_vae),
    "flux": ("diffusers", flux),
    "vqgan": ("taming", vqgan),
    "va-vae": ("taming", va_vae),
    "dvae": ("dall_e", dvae),
    "c-vivit": ("phenaki_pytorch", c_vivit),
    "cosmos-cv8x8x8": ("diffusers", cosmos_cv8x8x8),
}
