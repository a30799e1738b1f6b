"""Where the weights of the frozen networks are: a given path, else the folder ``$TOKENIZERS_WEIGHTS``.

Nothing is downloaded and nothing is drawn at random in place of a missing file.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

from ..errors import pick

VARIABLE = "TOKENIZERS_WEIGHTS"


class MissingWeights(ValueError):
    """A weight file is needed and not there: says which, its accepted names, who publishes it, how to point to it."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A file of published weights: what it is, the names it is looked for under, who publishes it (and its md5)."""

    what: str
    names: tuple[str, ...]
    source: str
    md5: str = ""


def _lin(net: str, version: str, md5: str = "") -> Published:
    folder = f"v{version}"
    names = (f"lpips_{net}_{folder}.pth", f"lpips/{folder}/{net}.pth", f"{folder}/{net}.pth")
    if version == "0.1":  # the usual one needs no version in its name
        names += (f"lpips_{net}.pth", f"lpips/{net}.pth", f"{net}.pth")
    source = f"richzhang/PerceptualSimilarity, lpips/weights/{folder}/{net}.pth"
    return Published(f"the linear layers of LPIPS {version} ({net})", names, source, md5)


def _trunk(what: str, *names: str) -> Published:
    return Published(f"{what} trained on ImageNet", names, f"torchvision, {names[0]}")


PUBLISHED: dict[str, Published] = {
    "vgg16": _trunk("VGG-16", "vgg16-397923af.pth", "vgg16.pth", "vgg16.safetensors"),
    "alexnet": _trunk("AlexNet", "alexnet-owt-7be5be79.pth", "alexnet.pth", "alexnet.safetensors"),
    "squeezenet1_1": _trunk("SqueezeNet 1.1", "squeezenet1_1-b8a52dc0.pth", "squeezenet1_1.pth"),
    "convnext_small": _trunk("ConvNeXt-S", "convnext_small-0c510722.pth", "convnext_small.pth"),
    "lpips_vgg": _lin("vgg", "0.1", "d507d7349b931f0638a25a48a722f98a"),
    "lpips_alex": _lin("alex", "0.1"),
    "lpips_squeeze": _lin("squeeze", "0.1"),
    "lpips_vgg_v0.0": _lin("vgg", "0.0"),
    "lpips_alex_v0.0": _lin("alex", "0.0"),
    "lpips_squeeze_v0.0": _lin("squeeze", "0.0"),
    "inception_fid": Published(
        "the Inception network of the Frechet inception distance",
        (
            "pt_inception-2015-12-05-6726825d.pth",
            "weights-inception-2015-12-05-6726825d.pth",
            "inception_fid.safetensors",
        ),
        "mseitzer/pytorch-fid (pt_inception) or toshas/torch-fidelity (weights-inception), release files",
    ),
    "i3d_kinetics400": Published(
        "I3D trained on Kinetics-400 RGB, the network of the Frechet video distance",
        ("i3d_pretrained_400.pt", "i3d_kinetics400.safetensors"),
        "the I3D file that VideoGPT's and OmniTokenizer's evaluation use, i3d_pretrained_400.pt",
    ),
    "raft_large": Published(
        "RAFT (large), optical flow",
        ("raft_large_C_T_SKHT_V2-ff5fadd5.pth", "raft_large.pth", "raft_large.safetensors"),
        "torchvision, raft_large_C_T_SKHT_V2-ff5fadd5.pth",
    ),
    "dinov2_vits14": Published(
        "DINOv2 ViT-S/14",
        ("dinov2_vits14_pretrain.pth", "vit_small_patch14_dinov2.lvd142m.safetensors"),
        "facebookresearch/dinov2 (without registers), or timm's vit_small_patch14_dinov2.lvd142m",
    ),
    "dinov2_vitb14": Published(
        "DINOv2 ViT-B/14",
        ("dinov2_vitb14_pretrain.pth", "vit_base_patch14_dinov2.lvd142m.safetensors"),
        "facebookresearch/dinov2 (without registers), or timm's vit_base_patch14_dinov2.lvd142m",
    ),
    "dinov2_vits14_reg4": Published(
        "DINOv2 ViT-S/14 with registers",
        ("dinov2_vits14_reg4_pretrain.pth", "vit_small_patch14_reg4_dinov2.lvd142m.safetensors"),
        "facebookresearch/dinov2 (with registers), or timm's vit_small_patch14_reg4_dinov2.lvd142m",
    ),
    "dinov2_vitb14_reg4": Published(
        "DINOv2 ViT-B/14 with registers",
        ("dinov2_vitb14_reg4_pretrain.pth", "vit_base_patch14_reg4_dinov2.lvd142m.safetensors"),
        "facebookresearch/dinov2 (with registers), or timm's vit_base_patch14_reg4_dinov2.lvd142m",
    ),
    "dinov2_vitl14_reg4": Published(
        "DINOv2 ViT-L/14 with registers",
        ("dinov2_vitl14_reg4_pretrain.pth", "vit_large_patch14_reg4_dinov2.lvd142m.safetensors"),
        "facebookresearch/dinov2 (with registers), or timm's vit_large_patch14_reg4_dinov2.lvd142m",
    ),
    "maskgit_vqgan": Published(
        "MaskGIT's VQGAN, ImageNet at 256 x 256",
        ("maskgit-vqgan-imagenet-f16-256.bin", "tokenizer_imagenet256_checkpoint"),
        "fun-research/TiTok, maskgit-vqgan-imagenet-f16-256.bin",
    ),
    "clip_vitl14_336": Published(
        "CLIP ViT-L/14 at 336 pixels",
        ("ViT-L-14-336px.pt", "clip_vitl14_336.safetensors", "clip_vitl14_336.pt"),
        "openai/CLIP, ViT-L-14-336px.pt, or the same weights in OpenCLIP's names",
    ),
    "dinov2_vitl14": Published(
        "DINOv2 ViT-L/14",
        ("dinov2_vitl14_pretrain.pth", "vit_large_patch14_dinov2.lvd142m.safetensors"),
        "facebookresearch/dinov2 (without registers), or timm's vit_large_patch14_dinov2.lvd142m",
    ),
    "mae_vitl16": Published(
        "MAE ViT-L/16",
        ("mae_pretrain_vit_large.pth", "vit_large_patch16_224.mae.safetensors"),
        "facebookresearch/mae, or timm's vit_large_patch16_224.mae",
    ),
}


# In place of a path: loaders give shapes for arrays, for programs that are compiled and never run.
SHAPES = "shapes"


def find(name: str, path: str | pathlib.Path | None = None) -> pathlib.Path:
    """The file that holds the weights ``name``, one of `PUBLISHED`.

    Args:
      name: which weights.
      path: a file, or a folder with a file of an accepted name; ``None`` means the folder ``$TOKENIZERS_WEIGHTS``.

    Raises:
      MissingWeights: there is no such file.
    """
    wanted = pick("weights", name, PUBLISHED)
    place = path if path is not None else os.environ.get(VARIABLE)
    if place:
        place = pathlib.Path(place).expanduser()
        if place.is_file():
            return place
        for accepted in wanted.names:
            if (place / accepted).is_file():
                return place / accepted
        tried = f"{str(place)!r} is neither a file nor a folder that holds one of these names."
    else:
        tried = f"No path was given and {VARIABLE} is not set."
    checksum = f", md5 {wanted.md5}" if wanted.md5 else ""
    raise MissingWeights(
        f"{wanted.what} ({name}) is needed. {tried} Accepted names: {', '.join(wanted.names)}. "
        f"Published as: {wanted.source}{checksum}. Give its path, or put it in a folder and set {VARIABLE} to it."
    )
